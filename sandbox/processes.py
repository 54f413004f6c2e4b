"""The processes of one session as /proc shows them to its supervisor. Standard library only."""
from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

PAGE = os.sysconf("SC_PAGE_SIZE")
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Process:
    """A line of /proc: identity, state letter, clock ticks used, threads, bytes resident and mapped."""

    pid: int
    state: str
    ticks: int
    threads: int
    resident: int
    mapped: int


class Below:
    """All below this process, a supervisor, by the /proc that it has now."""

    def __init__(self) -> None:
        self.proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY)

    def processes(self) -> list[Process]:
        """All that is alive, the session's first process first."""
        found, waiting = [], [os.getpid()]
        while waiting:
            for pid in self._children(waiting.pop()):
                process = self._process(pid)
                waiting.append(pid)
                if process is not None and process.state not in "ZX":
                    found.append(process)
        return found

    def _children(self, pid: int) -> Iterator[int]:
        for task in self._list(f"{pid}/task"):
            yield from map(int, self._text(f"{pid}/task/{task}/children").split())

    def _process(self, pid: int) -> Process | None:
        fields = self._text(f"{pid}/stat").rpartition(b")")[2].split()
        if len(fields) < 22:
            return None
        return Process(pid, fields[0].decode(), int(fields[11]) + int(fields[12]) + int(fields[13]) + int(fields[14]),
                       int(fields[17]), int(fields[21]) * PAGE, int(fields[20]))

    def _list(self, path: str) -> list[str]:
        try:
            folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY, dir_fd=self.proc)
        except OSError:
            return []
        try:
            return os.listdir(folder)
        except OSError:
            return []
        finally:
            os.close(folder)

    def _text(self, path: str) -> bytes:
        """A file of /proc; empty when its process is gone, or may not be looked at."""
        try:
            fd = os.open(path, os.O_RDONLY, dir_fd=self.proc)
        except OSError:
            return b""
        try:
            return b"".join(iter(lambda: os.read(fd, 1 << 16), b""))
        except OSError:
            return b""
        finally:
            os.close(fd)

    def turns(self, process: Process) -> Iterator[tuple[str, int, int]]:
        """(thread, nanoseconds it has run, nanoseconds it was ready to and had to wait); none where the kernel doesn't count."""
        for thread in self._list(f"{process.pid}/task") if process.threads > 1 else [str(process.pid)]:
            counts = self._text(f"{process.pid}/task/{thread}/schedstat").split()
            if len(counts) == 3:
                yield thread, int(counts[0]), int(counts[1])
