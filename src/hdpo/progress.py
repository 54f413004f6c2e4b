"""Progress bars: live at a terminal, a line now and then in a log."""
from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm as Bar

AT_TERMINAL_S, IN_LOG_S = 0.5, 30.0
"""Least time between two states of a bar, seconds. A log keeps each of them."""


def progress(what: str, unit: str, items: Iterable[Any] | None = None, *, total: int | None = None, initial: int = 0,
             delay_s: float = 0.0, shown: bool = True) -> Bar:
    """A bar on stderr, counted by going through `items` or by its `update`, with rate and time left. Nothing is drawn in the
    first `delay_s` seconds. A context manager, as tqdm's own.
    """
    return Bar(items, desc=what, unit=unit, total=total, initial=initial, delay=delay_s, disable=not shown, dynamic_ncols=True,
               mininterval=AT_TERMINAL_S if sys.stderr.isatty() else IN_LOG_S, maxinterval=IN_LOG_S, smoothing=0.05)


def say(text: str) -> None:
    """A line for the person at the terminal, above any bar."""
    Bar.write(text)
