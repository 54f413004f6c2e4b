"""Places for running cells and for opening sessions: so many at once, the short ones and the modest trajectories first.

A cell that turns out long gives its place up and goes on behind the others, by its niceness (sandbox/watch.py): a few endless
ones would hold up all the short ones else. Who waits for a place comes in the order of arrival, later by the time that the
trajectory's cells have taken before.
"""
from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
from collections.abc import AsyncIterator, Callable

PATIENCE_S, LONG = 0.15, 8
"""A cell, or the opening of a session, that takes longer, seconds, makes its place free, as long as there are not so many such
for each place."""
MOST_LATER_S = 5.0
"""By so much at most a trajectory's earlier cells put it back, seconds."""


class Places:
    """`count` of them, each for `patience_s` or less. Coroutines of one event loop."""

    def __init__(self, count: int, patience_s: float = PATIENCE_S) -> None:
        self.count = self.free = count
        self.patience_s = patience_s
        self.long = 0
        self._waiting: list[tuple[float, int, asyncio.Future[None]]] = []
        self._numbers = itertools.count()

    @contextlib.asynccontextmanager
    async def take(self, taken_s: float = 0.0) -> AsyncIterator[Callable[[], float]]:
        """A place, for a trajectory whose cells have taken so long before; what it yields tells how long this one has."""
        loop = asyncio.get_running_loop()
        await self._wait(loop.time() + min(taken_s, MOST_LATER_S))
        started, long = loop.time(), False

        def make_room() -> None:
            nonlocal long
            long = self.long < LONG * self.count
            if long:
                self.long += 1
                self._release()
        timer = loop.call_later(self.patience_s, make_room)
        try:
            yield lambda: loop.time() - started
        finally:
            timer.cancel()
            if long:
                self.long -= 1
            else:
                self._release()

    async def _wait(self, turn: float) -> None:
        if self.free:
            self.free -= 1
            return
        ready = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (turn, next(self._numbers), ready))
        try:
            await ready
        except asyncio.CancelledError:
            if ready.done() and not ready.cancelled():      # its turn had just come
                self._release()
            raise

    def _release(self) -> None:
        """Hand a place to the next who waits; nobody waits while one is free."""
        while self._waiting:
            ready = heapq.heappop(self._waiting)[2]
            if not ready.done():
                ready.set_result(None)
                return
        self.free += 1
