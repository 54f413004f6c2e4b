"""`--dry-run` and `hdpo doctor`: say what is missing before a device is touched, one line for each thing."""
from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from hdpo.config import Config
from hdpo.config.file import add_config_options, load_config
from hdpo.descriptors import check_limit
from hdpo.doctor.machine import Found, check_sandbox, describe_devices, machine
from hdpo.doctor.own_code import check_own
from hdpo.errors import HdpoError, UserError
from hdpo.keys import environment_with_keys, key
from hdpo.ranks.devices import check_torch_sees_devices


def dry_run(config: Config, command: str) -> int:
    """Check what `command` will need. Prints a line for each check; returns 0, or 2 when something is missing."""
    checks: list[tuple[str, Callable[[], str]]] = [("devices", describe_devices), ("model", lambda: check_model(config))]
    if command != "eval":
        checks.append(("training data", lambda: check_data(config, config.data.train, "data.train (TRAIN_DATA)", command)))
    if command == "eval" or config.data.val and (command != "sft" or config.eval.every_steps):
        checks.append(("held-out data", lambda: check_data(config, config.data.val, "data.val (VAL_DATA)", command)))
    if command == "sft" and config.eval.tasks:
        checks.append(("held-out tasks", lambda: check_data(config, config.eval.tasks, "eval.tasks", "rl")))
    if config.rolls_out(command):
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
    from hdpo.data.copies import cache_folder
    from hdpo.data.tasks import check_columns
    cache_folder(config.data.cache)
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


def search_once(config: Config) -> str:
    """One real query to the search provider that a run would ask. Raises SearchError, ConfigError."""
    from hdpo.toolserver.providers import hosted_provider
    provider = hosted_provider(config.tools.search_provider, config.tools.search_results, environment_with_keys())
    if provider is None:
        return f"no hosted provider; tools.text_index is {config.tools.text_index or 'not set'}"

    async def ask() -> int:
        try:
            return len(await provider.search("height of Mount Fuji"))
        finally:
            await provider.close()
    return f"{provider.name} gave {asyncio.run(ask())} results"


def checks_of(config: Config, sft: bool, online: bool) -> list[tuple[str, Callable[[], str]]]:
    """What a run with this configuration needs beside memory and disk."""
    if not config.rolls_out("sft" if sft else "rl"):
        return []
    found: list[tuple[str, Callable[[], str]]] = [("tools", lambda: check_tools(config))]
    if not config.tools.url and "python" in config.tools.allowed:
        found.append(("sandbox", lambda: check_sandbox(config.tools.sandbox)))
    if config.tools.own or config.tools.mcp or config.reward.function:
        found.append(("own code", lambda: ", ".join(check_own(config))))
    found.append(("judge", lambda: check_judge(config)))
    if online and "text_search" in config.tools.allowed:
        found.append(("search", lambda: search_once(config)))
    return found


def main(argv: Sequence[str]) -> int:
    """Versions, devices, space and services of this machine; with --config what an RL run will need. Returns 1 where something
    that is needed is missing."""
    parser = argparse.ArgumentParser(
        prog="hdpo doctor", description="What this machine has for training; with --config the memory an RL run "
        "will need, by phase, and the disk space, then tools, sandbox, own code and judge (one question). Exit status 1 "
        "where something needed is missing or a plan can't fit, with the way out in its line; 2 for settings that can't be "
        "read; with --gpu a check of its GPU in minutes.")
    add_config_options(parser)
    parser.add_argument("--gpus", type=int, metavar="N", help="plan for so many devices instead of this machine's")
    parser.add_argument("--gpu-gib", type=float, metavar="GIB", help="plan for devices of this size, GiB")
    parser.add_argument("--host-gib", type=float, metavar="GIB", help="plan for nodes with so much memory, GiB")
    parser.add_argument("--sft", action="store_true", help="plan an SFT run instead of an RL run")
    parser.add_argument("--gpu", action="store_true",
                        help="prove this machine's GPU in minutes: kernels, a ZeRO-3 step and the engine beside it, with limits")
    parser.add_argument("--online", action="store_true", help="ask the search provider one real question, which it may bill")
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
    configured = bool(options.config or options.overrides)
    missing = False
    for found in _of_run(options) if configured else _of_machine(options.online):
        print(found.line(), flush=True)
        missing |= found.missing
    if configured:
        print(f"{'':14} `hdpo {'sft' if options.sft else 'rl'} --dry-run` with the same settings checks model and data too")
    return int(missing)


def _of_machine(online: bool) -> Iterator[Found]:
    yield from machine()
    if online:
        yield _line("search", lambda: search_once(Config()))


def _of_run(options: argparse.Namespace) -> Iterator[Found]:
    """What a run with these settings needs, here or on the machine that the options plan for."""
    gpus, gpu_gib, host_gib, sft = options.gpus or 0, options.gpu_gib or 0.0, options.host_gib or 0.0, options.sft
    config = load_config(options.config, options.overrides)
    if not gpus:
        devices = _line("devices", describe_devices)
        yield devices
        if devices.missing:      # every plan would be that of another machine
            return
    yield _line("memory", lambda: check_memory(config, gpus, gpu_gib, host_gib, sft))
    yield _line("disk", lambda: check_disk(config, gpus, gpu_gib, sft))
    if config.rolls_out("sft" if sft else "rl"):
        yield _line("open files", lambda: check_files(config, gpus))
    if not (gpus or gpu_gib or host_gib):
        yield from (_line(name, check) for name, check in checks_of(config, sft, options.online))


def _line(name: str, check: Callable[[], str]) -> Found:
    try:
        return Found(name, check())
    except HdpoError as exc:
        return Found(name, str(exc), missing=True)
