"""Rows of like lengths in the same step, in an order that is still seeded."""
from __future__ import annotations

import random
from collections.abc import Sequence


def by_length(order: Sequence[int], lengths: Sequence[int], rows_per_step: int, steps: int, start: int,
              coin: random.Random | None) -> list[int]:
    """The rows of an epoch, each once: those of `steps` steps at a time are sorted by length and cut into steps again, which
    `coin` shuffles (None: they stay sorted).

    `start`: rows that all epochs before had. The epoch's first rows complete the step that those began, and what is too few
    for a step at its end is left to the next epoch: these stay in the order that is given.
    """
    head = -start % rows_per_step
    found = list(order[:head])
    for first in range(head, len(order), rows_per_step * steps):
        window = order[first:first + rows_per_step * steps]
        whole = len(window) - len(window) % rows_per_step
        rows = sorted(window[:whole], key=lambda row: lengths[row])     # of equal lengths in the given order
        parts = [rows[place:place + rows_per_step] for place in range(0, whole, rows_per_step)]
        if coin is not None:
            coin.shuffle(parts)
        found += [row for part in parts for row in part] + list(window[whole:])
    return found
