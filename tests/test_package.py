"""The wheel carries everything that a checkout has: code, assets, launch files, the sandbox's worker; it starts from anywhere."""
from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import urllib.request
import zipfile
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    files = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True,
                           text=True, check=True).stdout.split()
    for name in files:   # a copy, so that building leaves nothing in the checkout
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
            (source / name).chmod((ROOT / name).stat().st_mode)
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir",
                    str(folder), str(source)], check=True, capture_output=True)
    (built,) = folder.glob("hdpo-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """The package as pip lays it out in an environment whose Python is this one with the wheel in front."""
    prefix = wheel.parent / "environment"
    site = prefix / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (prefix / "bin").mkdir()
    (prefix / "bin" / "python").write_text(f"#!/bin/sh\nPYTHONPATH={site} exec {sys.executable} \"$@\"\n")
    (prefix / "bin" / "python").chmod(0o755)
    return site / "hdpo"


def test_the_wheel_carries_everything_a_run_needs(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {f"hdpo/{f.relative_to(ROOT / 'src/hdpo')}" for f in (ROOT / "src/hdpo").rglob("*.py")}
    assert modules <= names
    for needed in ("hdpo/toyworld/assets/toy-base/model.safetensors", "hdpo/report/assets/report.css",
                   "hdpo/report/assets/app.js", "hdpo/py.typed", "hdpo/launch/configs/demo_rl.yaml",
                   "hdpo/launch/accelerate/cpu2.yaml", "hdpo/launch/common.sh", "hdpo/sandbox/worker.py",
                   "hdpo/sandbox/Dockerfile"):
        assert needed in names, needed


def environment(**variables: str) -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k not in ("PYTHON", "PYTHONPATH", "RUN_FOLDER", "RUN_NAME")} | variables


@pytest.mark.parametrize("stand", ["elsewhere", "package"])
def test_the_wheels_scripts_take_their_own_environment_and_write_where_the_user_stands(
        installed: Path, tmp_path: Path, stand: str) -> None:
    before = set(installed.rglob("*"))
    folder = tmp_path if stand == "elsewhere" else installed
    log = tmp_path / "runs" / "tool_server.log"
    done = subprocess.run(
        ["bash", str(installed / "launch" / "start_tool_server.sh"), "0", "1"], cwd=folder, capture_output=True, text=True,
        timeout=120, env=environment(TOOL_SERVER_ARGS="--tools python --i-trust-the-model", RUN_FOLDER=str(log.parent)))
    servers = [process for process in psutil.process_iter() if str(installed.parent) in _path(process)]
    try:
        assert done.returncode == 0, done.stderr
        with urllib.request.urlopen(done.stdout.strip() + "/health", timeout=10) as answer:
            assert answer.status == 200
        assert len(servers) >= 1 and log.is_file()
        assert {file for file in installed.rglob("*") if "__pycache__" not in str(file)} <= before
    finally:
        for process in servers:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def _path(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return process.environ().get("PYTHONPATH", "")
    return ""


def test_a_shipped_configuration_is_found_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", str(installed / "launch" / "train_metis.sh"), "0.1", "--print-config"], cwd=tmp_path, text=True, timeout=120,
        capture_output=True, env=environment(MODEL_PATH="m", GPUS_PER_NODE="1", ACCELERATE_CONFIG="cpu2", CONFIG="demo_rl"))
    assert done.returncode == 0 and "w_tool: 0.1\n" in done.stdout and "path: m\n" in done.stdout, done.stderr


@pytest.mark.skipif(not shutil.which("curl"), reason="no curl")
def test_the_readmes_curl_gets_an_observation(tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text()
    block = next(part for part in readme.split("```") if "/get_observation" in part and "curl" in part)
    before = {process.pid for process in psutil.process_iter()}
    try:
        done = subprocess.run(["bash", "-euc", block], cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment(
            PYTHON=sys.executable, RUN_FOLDER=str(tmp_path), TOOL_SERVER_ARGS="--sandbox process --tools python"))
        assert "42" in json.dumps(json.loads(done.stdout)["observations"][0]), done.stdout + done.stderr
    finally:
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.pid not in before and process.environ().get("RUN_FOLDER") == str(tmp_path):
                    process.kill()
