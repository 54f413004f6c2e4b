"""Between coroutines that want completions and an engine that one thread steps.

Coroutines on the background loop await `EnginePump.generate`; the main thread runs `EnginePump.run`, which hands requests
to the engine, steps it and wakes the coroutines. A trajectory that waits for its tool is simply not in the engine.
"""
from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from hdpo.agent.trajectory import Key
from hdpo.errors import RequestRefused
from hdpo.protocols import Engine, Flag, GenerateRequest, SharedEngine
from hdpo.types import Completion, StopReason

T = TypeVar("T")
CLOSE_S = 20.0
"""How long coroutines may take to close what they hold when they are cancelled, seconds."""
STOP_POLL_S = 0.2
"""How often a blocked pump looks at the stop event, seconds."""
MEET_S = 0.005
"""How long a rank without work waits before it meets those that share its engine, seconds."""


_NOTHING = Completion([], [], StopReason.CUT, weight_version=-1)


@dataclass(slots=True)
class _Pending:
    key: Key
    request: GenerateRequest
    reply: asyncio.Future[Completion]
    request_id: str


class EnginePump:
    """One collection of trajectories. `engine_steps` (with a request of this rank), `engine_seconds` and `idle_seconds`
    (blocked: all trajectories were waiting for tools) are complete when `run` has returned.

    With `deterministic`, requests are submitted, sorted by key, and the engine is stepped only while every live trajectory
    has a request in it: how long tools take then cannot change any batch.

    An engine that ranks share is stepped all the time, because the others' requests need it: until all of them are done, and
    with `deterministic` while all of them are ready.
    """

    def __init__(self, engine: Engine, loop: asyncio.AbstractEventLoop, *, deterministic: bool = False,
                 progress: Callable[[], None] = lambda: None) -> None:
        """`progress` is called whenever generations have finished."""
        self._progress = progress
        self._engine, self._loop, self._deterministic = engine, loop, deterministic
        self._shared = engine if isinstance(engine, SharedEngine) else None
        self._live: set[Key] = set()
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()   # what coroutines ask, done by `run`
        self._waiting: dict[Key, _Pending] = {}
        self._running: dict[str, _Pending] = {}
        self._count = 0
        self._closed = self._over = False
        self.engine_steps, self.engine_seconds, self.idle_seconds = 0, 0.0, 0.0

    # -- called on the event loop ---------------------------------------------------------------------------------

    def started(self, key: Key) -> None:
        """The trajectory is going to send requests."""
        self._inbox.put(lambda: self._live.add(key))

    async def generate(self, key: Key, request: GenerateRequest) -> Completion:
        """One generation; cancelling it drops the request from the engine. Raises RequestRefused."""
        self._count += 1
        pending = _Pending(key, request, self._loop.create_future(), f"{key.prompt}-{key.sample}-{self._count}")
        self._inbox.put(lambda: self._waiting.__setitem__(key, pending))
        try:
            return await pending.reply
        except asyncio.CancelledError:
            self._inbox.put(lambda: self._drop(pending))
            raise

    def cut(self) -> None:
        """End every generation as CUT, with what it has sampled so far; those asked for later with nothing."""
        self._inbox.put(self._cut)

    def ended(self, key: Key) -> None:
        """The trajectory sends no further request."""
        self._inbox.put(lambda: self._live.discard(key))

    def close(self) -> None:
        """Make `run` return. Safe from any thread."""
        self._inbox.put(lambda: setattr(self, "_closed", True))

    # -- called on the thread that drives the engine ----------------------------------------------------------------

    def drive(self, work: Coroutine[Any, Any, T], stop: Flag | None = None,
              on_stop: Callable[[], object] = lambda: None) -> T:
        """Step the engine until `work`, on the loop, is done. `on_stop` is called on the loop once `stop` is set.

        Whatever ends this thread's part, Ctrl-C for one, cancels `work`, waits until it has closed what it holds, drops its
        requests, and is raised.
        """
        ended = threading.Event()
        outcome = asyncio.run_coroutine_threadsafe(_then(work, ended.set), self._loop)
        outcome.add_done_callback(lambda _: self.close())
        try:
            self.run(stop, lambda: self._loop.call_soon_threadsafe(on_stop))
        except BaseException:
            outcome.cancel()
            ended.wait(CLOSE_S)
            self.abort_all()
            raise
        return outcome.result()

    def run(self, stop: Flag | None = None, on_stop: Callable[[], object] | None = None) -> None:
        """Step the engine until `close`. When `stop` is set, `on_stop` is called once, and pumping goes on."""
        while not self._closed:
            if stop is not None and stop.is_set() and on_stop is not None:
                on_stop()
                on_stop = None
            self._receive()
            if self._ready():
                self._submit()
                self._step()
            elif self._shared is not None and self._deterministic:
                self._shared.hold()
            elif self._shared is not None:
                self._step()
        if self._shared is not None:
            started = time.monotonic()
            self._shared.finish()
            self.engine_seconds += time.monotonic() - started

    def abort_all(self) -> None:
        """Drop every request from the engine."""
        if self._running:
            self._engine.abort(list(self._running))
        self._running.clear()
        self._waiting.clear()

    def _ready(self) -> bool:
        if self._deterministic and len(self._waiting) + len(self._running) < len(self._live):
            return False
        return bool(self._waiting or self._running)

    def _receive(self) -> None:
        """Do everything asked so far; with nothing for the engine to do, wait for the next word."""
        if not self._ready():
            started = time.monotonic()
            try:
                self._inbox.get(timeout=self._patience())()
            except queue.Empty:
                pass
            self.idle_seconds += time.monotonic() - started
        while True:
            try:
                self._inbox.get_nowait()()
            except queue.Empty:
                return

    def _patience(self) -> float:
        if self._shared is None:
            return STOP_POLL_S
        return 0.0 if self._shared.num_unfinished() and not self._deterministic else MEET_S

    def _submit(self) -> None:
        if self._over:
            self._end([(pending, _NOTHING) for pending in self._waiting.values()])
            self._waiting.clear()
        order = sorted(self._waiting) if self._deterministic else list(self._waiting)
        for key in order:
            pending = self._waiting.pop(key)
            try:
                self._engine.add_request(pending.request_id, pending.request)
            except RequestRefused as refused:
                self._loop.call_soon_threadsafe(_refuse, pending.reply, refused)
            else:
                self._running[pending.request_id] = pending

    def _step(self) -> None:
        started = time.monotonic()
        try:
            finished = self._engine.step()
        except RequestRefused as refused:    # of an engine that ranks share
            finished = []
            if (pending := self._running.pop(refused.request_id, None)) is not None:
                self._loop.call_soon_threadsafe(_refuse, pending.reply, refused)
        self.engine_seconds += time.monotonic() - started
        self.engine_steps += bool(self._running)
        replies = [(self._running.pop(name).reply, completion) for name, completion in finished if name in self._running]
        if replies:
            self._progress()
            self._loop.call_soon_threadsafe(_resolve, replies)

    def _cut(self) -> None:
        self._over = True
        found = [(pending, self._engine.so_far(name)) for name, pending in self._running.items()]
        if self._running:
            self._engine.abort(list(self._running))
            self._running.clear()
        self._end([(pending, replace(it, stop=StopReason.CUT) if it.stop is StopReason.ABORTED else it) for pending, it in found])

    def _end(self, found: list[tuple[_Pending, Completion]]) -> None:
        if found:
            self._loop.call_soon_threadsafe(_resolve, [(pending.reply, completion) for pending, completion in found])

    def _drop(self, pending: _Pending) -> None:
        if self._waiting.get(pending.key) is pending:
            del self._waiting[pending.key]
        elif self._running.pop(pending.request_id, None) is not None:
            self._engine.abort([pending.request_id])


def _refuse(reply: asyncio.Future[Completion], refused: RequestRefused) -> None:
    if not reply.done():
        reply.set_exception(refused)


def _resolve(replies: list[tuple[asyncio.Future[Completion], Completion]]) -> None:
    for reply, completion in replies:
        if not reply.done():
            reply.set_result(completion)


async def _then(work: Coroutine[Any, Any, T], done: Callable[[], object]) -> T:
    try:
        return await work
    finally:
        done()
