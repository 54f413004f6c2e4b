"""`accelerate launch`, with the same options, ending the way a user expects: `python -m hdpo.adapters.launcher ...`

It starts the ranks of this node through accelerate and torch's agent, in this process, and adds four things. A failed
rank's own line stays the last one, instead of the agent's traceback. SIGTERM and Ctrl-C are handed to the ranks, which
get the time they need to finish their step and save, instead of 30 seconds. A node 0 that can't be reached is one line.
With `--max_restarts`, what only the user can mend (a setting, a missing file, a full disk) is not tried again.
`--config_file zero3` and `train_rl.py` mean the shipped files from any folder.
Exit status: 0 done, or stopped by SIGTERM and saved; 130 after Ctrl-C; otherwise that of the rank which failed first.
"""
from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import accelerate.utils.launch
import psutil
import torch.distributed.launcher.api
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed import DistStoreError
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from hdpo.config.shipped import launch_folder, shipped_file
from hdpo.errors import USER_STATUS, WORLD_STATUS, ConfigError, UserError
from hdpo.keys import hide
from hdpo.ranks.nodes import join_timeout_s, wait_for_master

TOLD = (USER_STATUS, WORLD_STATUS, 130)   # statuses with which a rank has already printed its one line (see hdpo.cli)


class Signals:
    """Hands SIGTERM, Ctrl-C and a hang-up to the ranks as SIGTERM, and remembers which came first."""

    def __init__(self) -> None:
        self.first: int | None = None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._hand_on)

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        ranks = [child for child in psutil.Process().children() if _is_rank(child)]
        if not ranks:   # nothing has been started, or all has ended
            raise SystemExit(130 if number == signal.SIGINT else 128 + number)
        self.first = self.first or number
        for rank in ranks:
            try:
                rank.send_signal(signal.SIGTERM)
            except psutil.NoSuchProcess:
                continue


class Agent(LocalElasticAgent):
    """Starts ranks again only where that can help: not after a mistake of the user's, and not when told to stop."""

    signals: Signals

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if self.signals.first is not None or any(failure.exitcode == USER_STATUS for failure in result.failures.values()):
            self._remaining_restarts = 0
        elif result.failures and self._remaining_restarts:
            rank, failure = min(result.failures.items(), key=lambda item: item[1].timestamp)
            count = worker_group.spec.max_restarts
            _print(f"{_what(rank, failure)}; all ranks start again (restart {count - self._remaining_restarts + 1} of {count})")
        return result


def _is_rank(process: psutil.Process) -> bool:
    try:
        return "LOCAL_RANK" in process.environ()
    except psutil.AccessDenied:      # it hides its environment (keys.py), as ranks do
        return True
    except psutil.Error:
        return False


def main(argv: Sequence[str]) -> int:
    """Launch; returns the exit status."""
    hide()      # the keys in its environment are for the ranks
    parser = launch_command_parser()
    parser.error = lambda message: sys.exit(   # type: ignore[method-assign, assignment]
        _say(f"{message} (python -m hdpo.adapters.launcher --help lists the options)", 2))
    arguments = parser.parse_args(list(argv))
    try:
        _find_shipped(arguments)
    except UserError as exc:
        return _say(str(exc), 2)
    # The agent's own handlers would kill ranks 30 s after a signal.
    os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGQUIT"
    # accelerate would put the folder one stands in before Python's own modules: a types.py there would end every rank.
    accelerate.utils.launch.env_var_path_add = lambda name, path: os.environ.get(name, "")   # type: ignore[assignment]
    # What the agent logs about a failed rank is said below in one line.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    Agent.signals = signals = Signals()
    torch.distributed.launcher.api.LocalElasticAgent = Agent   # type: ignore[misc]
    try:
        nodes, node = arguments.num_machines or 1, arguments.machine_rank or 0
        if nodes > 1:
            arguments.rdzv_conf = arguments.rdzv_conf or f"timeout={join_timeout_s():.0f}"
        if nodes > 1 and node > 0:
            wait_for_master(arguments.main_process_ip, arguments.main_process_port, node, join_timeout_s())
        launch_command(arguments)
        status = 0
    except DistStoreError:
        return _say(f"node {node}: not all of {nodes} nodes came to {arguments.main_process_ip}:{arguments.main_process_port} "
                    f"within {join_timeout_s():g} s; start the same command on each, with its own NODE_RANK, or set NNODES", 2)
    except (UserError, ConnectionError) as exc:    # ConnectionError: accelerate found the port taken
        return _say(str(exc), 2)
    except ChildFailedError as exc:
        status = _failed(exc, signals.first)
    except subprocess.CalledProcessError as exc:   # one process needs no agent
        status = exc.returncode
    return 130 if signals.first == signal.SIGINT and status == 0 else status


def _find_shipped(arguments: argparse.Namespace) -> None:
    """Put the paths of shipped files in place of their names. Raises ConfigError for an accelerate file that isn't there."""
    for name, kind in (("config_file", "accelerate"), ("training_script", "")):
        given = getattr(arguments, name)
        if not given or Path(given).exists() or (name == "training_script" and arguments.module):
            continue
        found = shipped_file(given, kind)
        if found is not None:
            setattr(arguments, name, str(found))
        elif name == "config_file":
            names = sorted(file.stem for file in (launch_folder() / kind).glob("*.yaml"))
            raise ConfigError(f"--config_file {given}: no such file; shipped ones are {', '.join(names)}")


def _failed(exc: ChildFailedError, stopped_by: int | None) -> int:
    rank, failure = exc.get_first_failure()
    code = failure.exitcode
    if stopped_by is not None and code == -signal.SIGTERM:   # before its first step a rank has nothing to save
        return 128 + stopped_by
    if code < 0:
        hint = "; the kernel kills so when memory runs out" if code == -signal.SIGKILL else ""
        return _say(_what(rank, failure) + hint, 1)
    return code if code in TOLD else _say(f"{_what(rank, failure)}; its own message is above", code)


def _what(rank: int, failure: ProcessFailure) -> str:
    code = failure.exitcode
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
    return f"rank {rank} on {socket.gethostname()} (pid {failure.pid}) {how}"


def _say(line: str, status: int) -> int:
    _print(f"error: {line}")
    return status


def _print(line: str) -> None:
    print(f"\nhdpo: {line}", file=sys.stderr, flush=True)   # a rank may have left its progress bar's line unfinished


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
