"""What every loop needs around its steps: stopping politely, the learning rate, when something is due."""
from __future__ import annotations

import ctypes
import math
import os
import signal
import sys
import time
from types import FrameType
from typing import Any, Protocol

from hdpo.config import OptimConfig

_PR_SET_PDEATHSIG = 1


class StopSignal:
    """Remembers SIGTERM and Ctrl-C. The first asks the loop to save and leave; a later one ends the process at once.

    At a terminal Ctrl-C arrives twice, from the terminal and from the launcher; signals within `SAME_S` are one request.
    """

    SAME_S = 2.0

    def __init__(self) -> None:
        self._asked = False        # no lock, such as an Event's: a signal may come while its own handler is at work
        self._first = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self._asked:
            self._first, self._asked = time.monotonic(), True
            _say("stopping: what is under way is brought to an end and saved; a second signal ends the run at once")
        elif time.monotonic() - self._first > self.SAME_S:
            _say("ended at once: what came after the newest checkpoint is lost; the same command goes on from there")
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, self._after if self._asked else handler)

    def _after(self, number: int, frame: FrameType | None) -> None:
        """After a stop the work is saved: a further signal ends what is left of the process, and has no news."""
        if time.monotonic() - self._first > self.SAME_S:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def is_set(self) -> bool:
        """As an Event says it (protocols.Flag)."""
        return self._asked


def name_the_end() -> None:
    """A SIGTERM while nothing is to be saved (loading, evaluating by itself) ends the process at once, with a line."""
    def end(number: int, frame: FrameType | None) -> None:
        _say("ended by SIGTERM outside of training; what is saved is kept, and the same command goes on from there")
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
    signal.signal(signal.SIGTERM, end)


def _say(text: str) -> None:
    """One line on rank 0's terminal. From a signal handler: Python's own stream may be in the middle of a write."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, f"\nhdpo: {text}\n".encode())


def follow_launcher() -> None:
    """Get SIGTERM when the launcher that started this rank dies, so that no rank trains on without it (Linux)."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def learning_rate(config: OptimConfig, step: int) -> float:
    """Rate of step `step` (from 0): linear warm-up, then the schedule down to 0 at `steps`. A function of the step alone."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return config.lr
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.lr * (0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done)


class Stream(Protocol):
    """A data stream as far as resuming goes (data/)."""

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: dict[str, Any]) -> None: ...


def go_on(stream: Stream, position: dict[str, Any] | None, new_rows: bool) -> None:
    """Continue where a checkpoint's data position says (None: at the beginning). Rows that are not the checkpoint's
    (`new_rows`, which run.allow let through) are gone through from the beginning, as the epoch after the one that was cut off.
    """
    if position is not None and new_rows:
        position = {**stream.state(), "epoch": position["epoch"] + 1, "position": 0}
    if position is not None:
        stream.restore(position)


def due(step: int, every: int) -> bool:
    """Whether something done every `every` steps is due after `step` steps are done; 0 is never."""
    return every > 0 and step % every == 0
