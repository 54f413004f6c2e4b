"""Counts of what came from outside in a shape nobody asked for and was survived: metrics show it as odd/NAME.

A run of days meets half emojis, broken pictures and busy providers. None of them may end it, and none may pass unseen.
Names are "kind/where". Safe from any thread; a tool call collects its own (`collected`), so that a reply can carry them to
the trainer. Standard library only.
"""
from __future__ import annotations

import contextlib
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

PREFIX = "odd/"
_NAME = re.compile(r"[a-z0-9_]{1,40}(/[a-z0-9_.]{1,40}){0,2}")
_MOST_NAMES = 64
_lock = threading.Lock()
_counts: Counter[str] = Counter()
_collected: ContextVar[Counter[str] | None] = ContextVar("collected", default=None)


def count(name: str, times: int = 1) -> None:
    with _lock:
        _counts[name] += times
        mine = _collected.get()
        if mine is not None:
            mine[name] += times


def take() -> dict[str, float]:
    """"odd/NAME" -> times since the previous call."""
    with _lock:
        taken = {PREFIX + name: float(times) for name, times in _counts.items()}
        _counts.clear()
    return taken


def totals() -> dict[str, int]:
    """All counts, which stay."""
    with _lock:
        return dict(_counts)


@contextlib.contextmanager
def collected() -> Iterator[Counter[str]]:
    """What is counted within the block, by this coroutine and the tasks and threads it starts; it counts in all besides."""
    mine: Counter[str] = Counter()
    token = _collected.set(mine)
    try:
        yield mine
    finally:
        _collected.reset(token)


def count_reported(report: Any) -> None:
    """Count what another process says it met: {name: times}. Anything else in it is ignored."""
    if not isinstance(report, dict):
        return
    for name, times in list(report.items())[:_MOST_NAMES]:
        if isinstance(name, str) and _NAME.fullmatch(name) and type(times) is int and 0 < times < 1 << 20:
            count(name, times)
