"""What the server keeps per trajectory, and the sandbox as the server sees it.

A trajectory's calls run one after the other, each request id once. Sessions idle for too long are closed, so that a
trainer that dies without `finish` leaves nothing behind.
"""
from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import OrderedDict, deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from hdpo.errors import InfrastructureError
from hdpo.toolserver.journal import Journal
from hdpo.toolserver.wire import Reply

log = logging.getLogger(__name__)
REMEMBERED_IDS = 64
"""Answered request ids kept per trajectory. Calls are sequential, so a retry can only concern the newest, whose reply is kept;
an older one is known and not executed again."""
FORGOTTEN = Reply("Tool unavailable: this call was answered before, and so was a later one", valid=False, infrastructure=True)


class SandboxError(InfrastructureError):
    """No session could be had, or the sandbox failed in a way the cell did not cause."""


class SessionLostError(SandboxError):
    """What a session held is gone through no doing of its code; the message says how."""


@dataclass(frozen=True, slots=True)
class CellResult:
    """What one cell did. `images` are PNG files the session claims to have drawn, bounded in bytes and pixels."""

    stdout: str
    stderr: str
    images: tuple[bytes, ...]
    ok: bool
    restarted: bool            # the namespace was lost by the code's own doing, before or during this cell
    timed_out: bool
    ended: str = ""            # how, when it was
    ends_with_value: bool = False             # stdout's last text is a value that was shown
    opened: frozenset[int] = frozenset()      # which images were shown by `image.show()`


class Sandbox(Protocol):
    """Runs model-written code, one session per trajectory. Coroutines of one event loop; ids are path-safe."""

    async def open(self, session_id: str, images: Sequence[bytes]) -> None:
        """Start a session with image_1 .. image_n. Raises SandboxError."""
        ...

    async def run(self, session_id: str, code: str, timeout_s: float) -> CellResult:
        """Execute one cell. What the code does wrong is in the result; SandboxError is for the sandbox's own failures.

        A cell is never executed twice. A session that its code has ended answers `restarted`, one that was lost otherwise
        raises SessionLostError, before or during the cell; the next cell then finds a fresh namespace with the images.
        """
        ...

    async def close(self, session_id: str) -> None:
        """End the session and everything it started. Unknown ids are ignored."""
        ...

    async def shutdown(self) -> None: ...


@dataclass(slots=True)
class Trajectory:
    """Server-side state of one rollout."""

    images: Sequence[bytes]            # read when they are needed
    index: str = ""
    lost: str = ""                     # how the session it relies on was lost, through no fault of its own
    session_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    session_open: bool = False
    python_calls: int = 0
    cells_s: float = 0.0               # that they have taken
    calls_lost: int = 0                # executed in a session that a former server had, for a client that doesn't know
    image_searches: int = 0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    replies: OrderedDict[str, asyncio.Task[Reply]] = field(default_factory=OrderedDict)    # the last, and what is not done
    answered: deque[str] = field(default_factory=lambda: deque(maxlen=REMEMBERED_IDS))
    used: float = field(default_factory=time.monotonic)

    def once(self, request_id: str, work: Callable[[], Coroutine[Any, Any, Reply]]) -> asyncio.Task[Reply]:
        """The task that answers `request_id`; started now unless it was before. Empty ids are never the same."""
        self.used = time.monotonic()
        task = self.replies.get(request_id) if request_id else None
        if task is None and request_id in self.answered:
            return asyncio.ensure_future(_forgotten())
        if task is None:
            task = asyncio.ensure_future(self._in_turn(work))
            for older in [name for name, reply in self.replies.items() if reply.done()]:
                del self.replies[older]
                self.answered.append(older)
            self.replies[request_id or uuid.uuid4().hex] = task
        return task

    async def _in_turn(self, work: Callable[[], Coroutine[Any, Any, Reply]]) -> Reply:
        async with self.lock:
            try:
                return await work()
            finally:
                self.used = time.monotonic()

    @property
    def busy(self) -> bool:
        return any(not task.done() for task in self.replies.values())


async def _forgotten() -> Reply:
    return FORGOTTEN


class Sessions:
    """All trajectories of a server."""

    def __init__(self, sandbox: Sandbox | None, idle_limit_s: float) -> None:
        self.sandbox = sandbox
        self.journal = Journal(None)
        self.idle_limit_s = idle_limit_s
        self.trajectories: dict[str, Trajectory] = {}

    def get(self, trajectory_id: str) -> Trajectory | None:
        return self.trajectories.get(trajectory_id)

    def create(self, trajectory_id: str, images: Sequence[bytes], index: str, lost: str) -> Trajectory:
        trajectory = self.trajectories[trajectory_id] = Trajectory(images, index, lost)
        return trajectory

    async def finish(self, trajectory_id: str) -> None:
        """Release the trajectory; a call still running is answered from the death of its session."""
        trajectory = self.trajectories.pop(trajectory_id, None)
        if trajectory is not None and trajectory.python_calls:
            self.journal.ended(trajectory_id)
        if trajectory is not None and trajectory.session_open and self.sandbox is not None:
            await self.sandbox.close(trajectory.session_id)

    async def reap_idle(self) -> None:
        """Close trajectories nobody asked about for `idle_limit_s`. Runs until cancelled."""
        while True:
            await asyncio.sleep(max(0.05, min(30.0, self.idle_limit_s / 4)))
            limit = time.monotonic() - self.idle_limit_s
            for trajectory_id, trajectory in list(self.trajectories.items()):
                if trajectory.used < limit and not trajectory.busy:
                    log.info("closing a trajectory idle for more than %g s", self.idle_limit_s)
                    await self.finish(trajectory_id)
