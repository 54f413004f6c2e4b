"""One asyncio event loop in a thread of its own, for everything that waits: tools, judge, images.

The main thread steps the engine and trains; network waits go on here meanwhile. Imports the standard library only.
"""
from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import gc
import sys
import threading
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


SWITCH_INTERVAL_S = 5e-4
"""How long a thread may keep the interpreter while another wants it. Python's 5 ms, waited for at every lock and socket
that the loop touches while threads decode pictures, add up to tenths of a second (benchmarks/bench_rollout.py)."""

LAG_PERIOD_S = 0.02


class BackgroundLoop:
    """Starts on construction. `submit` may be called from any thread; `close` cancels what is left and joins."""

    def __init__(self, name: str = "hdpo-background") -> None:
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    def submit(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def run(self, work: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
        """Run a coroutine here and wait for it from another thread."""
        return self.submit(work).result(timeout)

    def abandon(self) -> None:
        """`close` for a loop that may be blocked by code that is not ours: after a second it is left behind."""
        def end() -> None:
            for task in asyncio.all_tasks(self.loop):
                task.cancel()
            self.loop.call_soon(self.loop.stop)
        self.loop.call_soon_threadsafe(end)
        self._thread.join(timeout=1)

    def close(self) -> None:
        if not self._thread.is_alive():
            return

        async def cancel_rest() -> None:
            rest = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
            for task in rest:
                task.cancel()
            await asyncio.gather(*rest, return_exceptions=True)

        self.run(cancel_rest(), timeout=10)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(timeout=10)
        self.loop.close()


async def watch_lag(found: list[float]) -> None:
    """How late the loop wakes a sleeper, seconds, over and over: whatever blocks it delays everything on it."""
    while True:
        due = time.monotonic() + LAG_PERIOD_S
        await asyncio.sleep(LAG_PERIOD_S)
        found.append(max(0.0, time.monotonic() - due))


def freeze_heap() -> None:
    """Keep what is loaded by now out of garbage collection: call once when everything is built.

    A full collection walks millions of objects of torch, transformers and the engine, which are there to stay; it holds
    every thread for tens of milliseconds, and it costs 40 % of the time of scoring a step from the cache.
    """
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)   # at exit all may go; extensions complain of leaks otherwise
