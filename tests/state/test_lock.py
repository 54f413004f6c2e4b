"""One run at a time in a folder: real processes hold it, die and are refused."""
from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from vector_policy import VectorPolicy, config, names

from hdpo.errors import CheckpointError, ConfigError
from hdpo.state.checkpoint import Checkpoints
from hdpo.state.lock import RunLock

HOLD = """
import sys, time
from pathlib import Path
from hdpo.state.lock import RunLock
lock = RunLock(Path(sys.argv[1]), steal="--steal" in sys.argv)
print("held", flush=True)
child = __import__("subprocess").Popen(["sleep", "60"]) if "--child" in sys.argv else None
for line in sys.stdin:
    print(lock.lost() or "ours", flush=True)
"""


class Holding:
    def __init__(self, folder: Path, *flags: str) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder), *flags], text=True, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.first = self.process.stdout.readline().strip()      # type: ignore[union-attr]

    def ask(self) -> str:
        self.process.stdin.write("\n")      # type: ignore[union-attr]
        self.process.stdin.flush()          # type: ignore[union-attr]
        return self.process.stdout.readline().strip()      # type: ignore[union-attr]


@pytest.fixture
def holding() -> Iterator[list[Holding]]:
    started: list[Holding] = []
    yield started
    for one in started:
        one.process.kill()
        one.process.communicate()


def refusal(folder: Path) -> str:
    with pytest.raises(ConfigError) as error:
        RunLock(folder)
    return str(error.value)


def test_the_second_start_learns_in_one_line_who_holds_the_folder_and_touches_nothing(
        tmp_path: Path, holding: list[Holding]) -> None:
    folder = tmp_path / "run"
    holding.append(Holding(folder))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    line = refusal(folder)
    assert f"{folder} is in use by pid {holding[0].process.pid} on {os.uname().nodename}" in line
    assert "since 20" in line and "run.name" in line and "--steal-lock" in line and "\n" not in line
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert holding[0].ask() == "ours"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_lock_dies_with_its_holder_even_when_a_child_lives_on(
        tmp_path: Path, holding: list[Holding], number: signal.Signals) -> None:
    holding.append(Holding(tmp_path, "--child"))
    refusal(tmp_path)
    holding[0].process.send_signal(number)
    holding[0].process.wait()
    RunLock(tmp_path).release()


def test_one_process_cannot_hold_a_folder_twice_and_asking_does_not_give_it_up(tmp_path: Path, holding: list[Holding]) -> None:
    lock = RunLock(tmp_path)
    assert "in use by pid" in refusal(tmp_path)
    holding.append(Holding(tmp_path))
    assert holding[0].first == ""           # refused too: our refusal has not dropped the lock
    lock.release()
    lock.release()
    holding.append(Holding(tmp_path))
    assert holding[1].first == "held"


def test_a_stolen_folder_belongs_to_the_thief_and_its_old_holder_writes_no_checkpoint_any_more(
        tmp_path: Path, holding: list[Holding]) -> None:
    c = config(tmp_path)
    with Checkpoints(VectorPolicy(), c, RunLock(c.run.path)) as checkpoints:
        checkpoints.save_last(1, {})
        holding.append(Holding(c.run.path, "--steal"))
        assert holding[0].first == "held" and holding[0].ask() == "ours"
        for save in (checkpoints.save, lambda step, data: checkpoints.save_weights(step)):
            with pytest.raises(CheckpointError, match=f"was taken over by pid {holding[0].process.pid} on .*--steal-lock"):
                save(2, {})
    assert names(c) == ["step_000001"] and f"pid {holding[0].process.pid}" in refusal(c.run.path)


@pytest.mark.parametrize(("host", "pid", "free"), [
    ("", 2 ** 22 + 1, True), ("", os.getpid(), False), ("another-machine", 1, False), (None, 0, True)])
def test_where_a_file_system_has_no_locks_the_holders_file_decides(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str | None, pid: int, free: bool) -> None:
    def none(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(fcntl, "lockf", none)
    holder = {"host": host or os.uname().nodename, "pid": pid, "since": "2026-01-01 00:00:00", "command": "hdpo rl"}
    (tmp_path / ".lock").write_text("" if host is None else json.dumps(holder))
    if free:
        RunLock(tmp_path).release()
    else:
        assert f"pid {pid} on {holder['host']} (hdpo rl), since 2026-01-01" in refusal(tmp_path)
        RunLock(tmp_path, steal=True).release()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="run.folder .*file/run: .*Not a directory"):
        RunLock(tmp_path / "file" / "run")
