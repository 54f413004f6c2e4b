"""Readings of parts far below a run's log, such as how long a tool call waited: metrics show their mean and largest of a step.

Safe from any thread. Standard library only.
"""
from __future__ import annotations

import threading
from dataclasses import dataclass


@dataclass(slots=True)
class Readings:
    """Of one name since they were taken last."""

    count: int = 0
    total: float = 0.0
    most: float = float("-inf")


_lock = threading.Lock()
_read: dict[str, Readings] = {}


def note(name: str, value: float) -> None:
    with _lock:
        held = _read.setdefault(name, Readings())
        held.count, held.total, held.most = held.count + 1, held.total + value, max(held.most, value)


def take() -> dict[str, Readings]:
    """All readings since the previous call, by name."""
    global _read
    with _lock:
        taken, _read = _read, {}
    return taken
