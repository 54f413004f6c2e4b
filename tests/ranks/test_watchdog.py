"""Ranks as real processes: whoever dies, is stopped or hangs is named by all others; whoever is only slow is not."""
from __future__ import annotations

import ctypes
import datetime
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from hdpo.errors import USER_STATUS, WORLD_STATUS
from hdpo.ranks.watchdog import Limits, Watchdog

SIZE, SILENT_S, STUCK_S, PATIENCE_S = 3, 3.0, 6.0, 60.0


def _wait_for_the_end() -> None:
    time.sleep(PATIENCE_S)
    raise AssertionError("the watchdog did not end this rank")


def leave_one_by_one(rank: int, watchdog: Watchdog) -> None:
    for step in range(3):
        watchdog.phase("update", step)
        time.sleep(0.1 + 0.5 * rank)       # rank 0, which hosts the store, is the first to be done


def be_slow(rank: int, watchdog: Watchdog) -> None:
    watchdog.phase("rollout", 2)
    if rank == 1:
        ctypes.PyDLL(None).sleep(1)        # native code that holds the interpreter lock
        time.sleep(1.6 * SILENT_S)


def be_busy(rank: int, watchdog: Watchdog) -> None:
    """One phase far beyond the limit in which one rank finishes something now and then, as in a long evaluation."""
    watchdog.phase("evaluation", 0)
    for _ in range(6):
        time.sleep(STUCK_S / 3)
        if rank == 1:
            watchdog.progress()


def be_killed(culprit: int, signal_number: int) -> Callable[[int, Watchdog], None]:
    def behave(rank: int, watchdog: Watchdog) -> None:
        watchdog.phase("rollout", 2)
        if rank == culprit:
            time.sleep(1.0)
            os.kill(os.getpid(), signal_number)
        _wait_for_the_end()
    return behave


def hang(rank: int, watchdog: Watchdog) -> None:
    watchdog.phase("update", 2)
    if rank != 1:
        time.sleep(0.5)
        watchdog.phase("save")
    _wait_for_the_end()


def fail(rank: int, watchdog: Watchdog) -> None:
    watchdog.phase("load", 0)
    if rank == 0:
        time.sleep(0.5)
        watchdog.failed("model.path: no such folder: /nowhere", mendable=True)
    else:
        blame = watchdog.blame(PATIENCE_S)      # what the main thread asks when its collective broke
        os.write(2, f"asked: {blame.line if blame else None}\n".encode())
        _wait_for_the_end()


SCENARIOS = {
    "leave": leave_one_by_one, "slow": be_slow, "busy": be_busy, "hang": hang, "fail": fail,
    "kill": be_killed(1, signal.SIGKILL), "stop": be_killed(1, signal.SIGSTOP),
    "kill_host": be_killed(0, signal.SIGKILL), "stop_host": be_killed(0, signal.SIGSTOP)}


def live(scenario: str, rank: int, port: int, log: Path) -> None:
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
    os.environ["RANK"] = str(rank)
    store = dist.TCPStore("127.0.0.1", port, SIZE, rank == 0, datetime.timedelta(seconds=PATIENCE_S), wait_for_workers=False)
    watchdog = Watchdog(store, rank, SIZE, Limits(SILENT_S, STUCK_S))
    SCENARIOS[scenario](rank, watchdog)
    watchdog.close()


class Outcome:
    """Exit statuses, what each rank wrote, and the seconds until the last survivor ended."""

    def __init__(self, codes: list[int | None], logs: list[str], seconds: float) -> None:
        self.codes, self.logs, self.seconds = codes, logs, seconds


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """All scenarios at once."""
    folder = tmp_path_factory.mktemp("ranks")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "hdpo.ranks.watchdog"])
    running = {}
    for scenario in SCENARIOS:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        running[scenario] = [context.Process(target=live, args=(scenario, rank, port, folder / f"{scenario}{rank}"))
                             for rank in range(SIZE)]
        for process in running[scenario]:
            process.start()
    started = time.monotonic()
    found = {}
    for scenario, processes in running.items():
        culprit = {"stop": 1, "stop_host": 0}.get(scenario)
        for rank, process in enumerate(processes):
            if rank != culprit:
                process.join(PATIENCE_S)
        seconds = time.monotonic() - started
        if culprit is not None:
            processes[culprit].kill()
            processes[culprit].join()
        found[scenario] = Outcome([process.exitcode for process in processes],
                                  [(folder / f"{scenario}{rank}").read_text() for rank in range(SIZE)], seconds)
    return found


@pytest.mark.parametrize("scenario", ["leave", "slow", "busy"])
def test_ranks_that_leave_in_any_order_are_only_slow_or_go_on_within_a_phase_raise_no_alarm(
        outcomes: dict[str, Outcome], scenario: str) -> None:
    assert outcomes[scenario].codes == [0, 0, 0] and outcomes[scenario].logs == ["", "", ""]


@pytest.mark.parametrize(("scenario", "culprit", "what"), [
    ("kill", 1, "died"), ("stop", 1, "gave no sign of life for 3 s"),
    ("kill_host", 0, "died"), ("stop_host", 0, "gave no sign of life for 3 s")])
def test_a_killed_or_stopped_rank_is_named_with_host_and_phase_by_all_others_which_end(
        outcomes: dict[str, Outcome], scenario: str, culprit: int, what: str) -> None:
    outcome = outcomes[scenario]
    for rank in {0, 1, 2} - {culprit}:
        assert outcome.codes[rank] == WORLD_STATUS
        (line,) = [line for line in outcome.logs[rank].splitlines() if line.startswith("hdpo")]   # torch warns too
        assert line.startswith(f"hdpo (rank {rank}): error: rank {culprit} on {socket.gethostname()} (pid ")
        assert what in line and line.endswith("in rollout of step 3; this rank stops")


def test_a_hanging_main_thread_is_named_with_the_phase_it_did_not_leave(outcomes: dict[str, Outcome]) -> None:
    assert outcomes["hang"].codes == [WORLD_STATUS] * 3
    for log in outcomes["hang"].logs:
        assert f"hang: rank 1 on {socket.gethostname()} did not come out of update of step 3" in log
        assert "others wait in save of step 3" in log
        assert "_wait_for_the_end" in log      # where this rank's main thread is


def test_the_others_learn_the_error_of_the_rank_that_failed(outcomes: dict[str, Outcome]) -> None:
    codes, logs = outcomes["fail"].codes, outcomes["fail"].logs
    assert codes == [0, USER_STATUS, USER_STATUS] and logs[0] == ""
    for log in logs[1:]:
        assert "asked: rank 0 on" in log and "failed: model.path: no such folder: /nowhere, in load of step 1" in log
