"""A machine whose GPUs torch can't use says so in one line and with status 2, wherever training could silently use the CPU."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hdpo.errors import ConfigError
from hdpo.ranks import devices

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="torch has a device here")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A driver of two GPUs, older than torch needs."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nprintf '550.54.15\\n550.54.15\\n'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name in ("CUDA_VISIBLE_DEVICES", "GPUS_PER_NODE", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    return tool


def test_gpus_that_torch_cannot_use_are_named_with_their_driver_and_the_way_out(
        machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"lists 2 GPUs \(driver 550.54.15\), and torch .* none: .*CUDA_VISIBLE_DEV"):
        devices.check_torch_sees_devices()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", lambda: (_ for _ in ()).throw(RuntimeError("The driver is too old (found 12040).")))
    with pytest.raises(ConfigError, match="too old \\(found 12040\\); it is built for CUDA 13.0, which needs driver 580 or n"):
        devices.check_torch_sees_devices()


@pytest.mark.parametrize(("name", "value"), [("CUDA_VISIBLE_DEVICES", ""), ("CUDA_VISIBLE_DEVICES", "-1"),
                                             ("ACCELERATE_USE_CPU", "true")])
def test_a_run_that_asks_for_the_cpu_gets_it(machine: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    devices.check_torch_sees_devices()


@pytest.mark.parametrize(("name", "value", "fails"), [
    ("GPUS_PER_NODE", "8", True), ("CUDA_VISIBLE_DEVICES", "0,1", True), ("GPUS_PER_NODE", "0", False),
    ("PATH", "/nowhere", False)])
def test_gpus_that_were_asked_for_must_be_there_and_a_machine_without_any_is_a_cpu(
        machine: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, fails: bool) -> None:
    machine.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed because it could not talk to the driver'; exit 9\n")
    monkeypatch.setenv(name, value)
    if not fails:
        return devices.check_torch_sees_devices()
    with pytest.raises(ConfigError, match=f"GPUs were asked for \\({name}={value}\\)"):
        devices.check_torch_sees_devices()


@pytest.mark.parametrize("command", [["rl"], ["sft", "--dry-run"], ["doctor"]])
def test_training_the_dry_run_and_the_doctor_end_with_that_line_and_their_status(
        machine: Path, tiny_folder: Path, command: list[str], tmp_path: Path) -> None:
    settings = [] if command == ["doctor"] else ["--set", f"model.path={tiny_folder}", "--set", f"run.folder={tmp_path}"]
    done = subprocess.run([sys.executable, "-m", "hdpo", *command, *settings], capture_output=True, text=True, cwd=ROOT)
    told = [line for line in (done.stdout + done.stderr).splitlines() if "nvidia-smi lists 2 GPUs (driver 550.54.15)" in line]
    assert done.returncode == (1 if command == ["doctor"] else 2), done.stderr[-2000:]
    assert len(told) == 1 and "Traceback" not in done.stderr, done.stderr[-2000:]
