"""A control group of its own for each session's memory, where this machine lets the server make one.

The kernel then holds a session to its limit, whatever its memory is made of and however busy the machine is. It takes a
server that is root on the machine of its templates; elsewhere supervisors count for themselves (sandbox/watch.py).
A supervisor puts its session there by an open `cgroup.procs`, which is passed to it and is all that it gets.
"""
from __future__ import annotations

import contextlib
import logging
import os
import time
from pathlib import Path

log = logging.getLogger(__name__)
ROOT = Path("/sys/fs/cgroup")
LEAVING_S = 10.0
"""Time for the processes of sessions to end after their template, seconds."""


class SessionGroups:
    """Groups below the one that the process `pid`, a template, is in. Raises OSError where that is not permitted."""

    def __init__(self, pid: int, limit: int, must_contain: str = "") -> None:
        lines = [line.split(":", 2) for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines()]
        first = next((path for _, kinds, path in lines if "memory" in kinds.split(",")), None)
        base = ROOT / "memory" if first is not None else ROOT
        path = first if first is not None else next(path for _, kinds, path in lines if not kinds)
        if must_contain not in path:
            raise OSError(f"process {pid} is not where it was looked for: {path}")
        self._old = first is not None
        self.limit = limit
        self._home = base / path.strip("/") / f"sessions-{os.getpid()}-{pid}"
        self._made: list[Path] = []
        self._count = 0
        if not self._old:
            self._leave_room(self._home.parent)
        for left in self._home.parent.glob("sessions-*"):      # of servers that were killed; what is in use can't be removed
            for group in [*left.glob("*/"), left]:
                _removed(group)
        self._home.mkdir()
        if not self._old:
            (self._home / "cgroup.subtree_control").write_text("+memory")
        elif (self._home / "memory.use_hierarchy").exists():
            with contextlib.suppress(OSError):       # is set already, and then it can't be written
                (self._home / "memory.use_hierarchy").write_text("1")

    @staticmethod
    def _leave_room(parent: Path) -> None:
        """Version 2: a group whose children have controllers holds no processes, unless it is the root."""
        if parent != ROOT:
            own = parent / "template"
            own.mkdir(exist_ok=True)
            for pid in (parent / "cgroup.procs").read_text().split():
                (own / "cgroup.procs").write_text(pid)
        (parent / "cgroup.subtree_control").write_text("+memory")

    def make(self) -> tuple[Path, int]:
        """(a new group, descriptor by which processes are put there). Raises OSError."""
        self._made = [path for path in self._made if not _removed(path)]
        self._count += 1
        path = self._home / str(self._count)
        path.mkdir(parents=True)
        (path / ("memory.limit_in_bytes" if self._old else "memory.max")).write_text(str(self.limit))
        return path, os.open(path / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)

    def leave(self, path: Path) -> None:
        """To be removed when it is empty."""
        if not _removed(path):
            self._made.append(path)

    def close(self) -> None:
        """Remove all; called when the template has ended, and waits for what follows it."""
        deadline = time.monotonic() + LEAVING_S
        while not _removed(self._home) and time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                for path in [path for path in self._home.iterdir() if path.is_dir()]:
                    _removed(path)
            time.sleep(0.02)


def _removed(path: Path) -> bool:
    try:
        path.rmdir()
    except FileNotFoundError:
        return True
    except OSError:      # its processes are still leaving
        return False
    return True


def session_groups(pid: int, limit: int, must_contain: str = "") -> SessionGroups | None:
    """None where groups can't be made."""
    if os.geteuid() != 0 or not limit:
        return None
    try:
        return SessionGroups(pid, limit, must_contain)
    except (OSError, StopIteration) as exc:
        log.info("no control groups for sessions (%s); their supervisors count their memory", exc)
        return None
