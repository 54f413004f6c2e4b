"""When a judge is down, and how long one verdict may take. Used on one event loop."""
from __future__ import annotations

import asyncio
import time

from hdpo.errors import JudgeError


class WentDownError(Exception):
    """The judge was found to be down between the decision to ask it and the request."""


class Outage:
    """Decides that a judge is down: failures and not one success for `after_s` seconds.

    While it is down, `admit` lets one request through as a probe; everybody else waits for it and shares its fate.
    """

    def __init__(self, after_s: float, name: str) -> None:
        self._after_s, self._name = after_s, name
        self._failing_since: float | None = None
        self._probe: asyncio.Future[None] | None = None

    @property
    def is_down(self) -> bool:
        return self._failing_since is not None and time.monotonic() - self._failing_since > self._after_s

    def failed(self) -> None:
        self._failing_since = self._failing_since or time.monotonic()

    def succeeded(self) -> None:
        self._failing_since = None

    async def admit(self) -> bool:
        """True if the caller is the probe and must call `settle(True)`; raises JudgeError after a failed probe."""
        if not self.is_down:
            return False
        if self._probe is None:
            self._probe = asyncio.get_running_loop().create_future()
            return True
        await asyncio.shield(self._probe)
        if self.is_down:
            raise JudgeError(f"the judge at {self._name} is down")
        return False

    def settle(self, probing: bool) -> None:
        if probing and self._probe is not None:
            self._probe.set_result(None)
            self._probe = None


class Deadline:
    """A time limit that begins with the first `start`."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._end = seconds, 0.0

    def start(self) -> None:
        self._end = self._end or time.monotonic() + self._seconds

    def left(self) -> float:
        return self._end - time.monotonic() if self._end else self._seconds
