"""The training image, built for real from a bare Debian without a network: hdpo is installed and its command runs.

With --no-deps: torch and vLLM are some gigabytes, which `make image` fetches.
"""
from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BASES = ("hdpo-sandbox-base:bookworm", "python:3.11-slim", "python:3.11-bookworm")
TAG = "hdpo-test-image"
LEFT_OUT = (".git", ".venv", "runs", "__pycache__", ".build", "build", "dist", "scratch", "results", ".*_cache", "*.egg-info")


def docker(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["docker", *arguments], capture_output=True, text=True, timeout=300)


@pytest.mark.docker
@pytest.mark.slow
def test_the_training_image_is_built_and_its_command_runs(tmp_path: Path) -> None:
    base = next((name for name in BASES if docker("image", "inspect", name).returncode == 0), None)
    if base is None:
        pytest.skip("no base image here: `make sandbox` makes one")
    context = tmp_path / "context"
    shutil.copytree(ROOT, context, ignore=shutil.ignore_patterns(*LEFT_OUT))
    subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest",
                    str(context / "wheels"), "pip", "setuptools", "wheel", "packaging"], check=True, timeout=300)
    try:
        built = docker("build", "--network", "none", "--tag", TAG, "--file", str(context / "launch/Dockerfile"),
                       "--build-arg", f"BASE={base}", "--build-arg", "APT=",
                       "--build-arg", "PIP_ARGS=--no-index --find-links wheels --no-deps", str(context))
        assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
        said = docker("run", "--rm", "--network", "none", TAG)
        assert said.returncode == 0 and "hdpo COMMAND --help" in said.stdout, said.stderr
        shipped = docker("run", "--rm", "--network", "none", "--entrypoint", "sh", TAG, "-c",
                         "ls /opt/hdpo/lib/python3*/site-packages/hdpo/launch/train_metis.sh && pwd")
        assert shipped.returncode == 0 and shipped.stdout.endswith("/work\n")
    finally:
        docker("image", "rm", "--force", TAG)
