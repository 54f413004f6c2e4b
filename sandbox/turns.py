"""Whether a cell that ran out of time had its turns on the processors, or stood in the queue for them.

The kernel counts for each thread how long it ran and how long it was ready to run and waited (/proc/PID/schedstat). A cell that
was kept waiting is not to blame for its time; one that burned it, slept, or crowded itself out is. Standard library only.
"""
from __future__ import annotations

import time

from processes import TICKS, Below, Process
from watch import MANY

WAITED_SHARE, FEW_CORES = 0.5, 0.25
"""A cell was starved when it waited for more than this part of its time, and ran for less than this part of it on one core."""


class Turns:
    """Of a session, from now on; `look` as often as the session is looked at, or threads that end in between are missed."""

    def __init__(self, session: Below) -> None:
        self._session = session
        processes = session.processes()
        self._since = time.monotonic()
        self._ticks = sum(process.ticks for process in processes)
        self._seen = self._threads(processes)
        self._ran = self._waited = 0
        self._crowd = False

    def look(self, processes: list[Process]) -> None:
        """Count what has happened since the last look."""
        seen = self._threads(processes)
        before = {thread: self._seen.get(thread, (0, 0)) for thread in seen}
        self._ran += sum(ran - before[thread][0] for thread, (ran, _) in seen.items())
        # of threads that wait side by side, one
        self._waited += max((waited - before[thread][1] for thread, (_, waited) in seen.items()), default=0)
        self._seen = seen
        self._crowd |= sum(process.threads for process in processes) > MANY

    def starved(self) -> bool:
        """At the end of a cell's time. One with so many threads that it comes last for them has done that itself."""
        processes = self._session.processes()
        self.look(processes)
        wall = time.monotonic() - self._since
        ticks = sum(process.ticks for process in processes) - self._ticks      # with children that have ended since
        ran = max(self._ran / 1e9, ticks / TICKS)
        return not self._crowd and self._waited / 1e9 > WAITED_SHARE * wall and ran < FEW_CORES * wall

    def _threads(self, processes: list[Process]) -> dict[str, tuple[int, int]]:
        return {thread: (ran, waited) for process in processes for thread, ran, waited in self._session.turns(process)}
