"""Whether torch can use the devices that this machine has, or that a run was started for. Without a word it would not."""
from __future__ import annotations

import os
import shutil
import subprocess

from hdpo.errors import ConfigError

DRIVERS = {"13": 580, "12": 525}
"""The oldest NVIDIA driver that works with a CUDA version."""


def check_torch_sees_devices() -> None:
    """Raises ConfigError, with torch's own reason, where there are GPUs, or should be, and torch can use none.

    A driver that is too old is no error to torch, which then trains on the CPU. An empty CUDA_VISIBLE_DEVICES asks for the CPU,
    and so does ACCELERATE_USE_CPU=true.
    """
    import torch

    if torch.cuda.device_count() or wants_cpu():
        return
    listed, driver = nvidia_smi()
    if listed:
        found = f"nvidia-smi lists {listed} GPU{'s' * (listed > 1)} (driver {driver})"
    elif asked := _asked_for():
        found = f"GPUs were asked for ({asked})"
    else:
        return
    raise ConfigError(f"{found}, and torch {torch.__version__} can use none: {_reason()}; {_way_out()}; CUDA_VISIBLE_DEVICES= "
                      "(empty) trains on the CPU on purpose")


def wants_cpu() -> bool:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible is not None and visible.strip() in ("", "-1") or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"


def nvidia_smi() -> tuple[int, str]:
    """(GPUs that the driver knows, its version); (0, "") where there is no driver or it does not answer within 20 s."""
    if not shutil.which("nvidia-smi"):
        return 0, ""
    try:
        done = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True,
                              text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return 0, ""
    versions = [line.strip() for line in done.stdout.splitlines() if line.strip()[:1].isdigit()]
    return (len(versions), versions[0]) if done.returncode == 0 and versions else (0, "")


def _asked_for() -> str:
    visible, per_node = os.environ.get("CUDA_VISIBLE_DEVICES", ""), os.environ.get("GPUS_PER_NODE", "0")
    if visible:
        return f"CUDA_VISIBLE_DEVICES={visible}"
    return f"GPUS_PER_NODE={per_node}" if per_node.isdigit() and int(per_node) else ""


def _reason() -> str:
    """torch's own words for why it has no device."""
    import torch

    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as exc:
        return (str(exc).strip().splitlines() or [type(exc).__name__])[0].rstrip(".")
    return "it finds no device"


def _way_out() -> str:
    import torch

    if torch.version.cuda is None:
        return "this is torch's CPU build: `make install EXTRA=gpu` installs the other"
    oldest = DRIVERS.get(torch.version.cuda.split(".")[0])
    return f"it is built for CUDA {torch.version.cuda}" + (f", which needs driver {oldest} or newer" if oldest else "")
