"""An endless, seeded, resumable sequence of rows that are read when they are asked for.

The order is a function of the seed, the row counts, `data.mix` and, where rows are grouped by it, their lengths, so every rank
computes the same one. `take` returns the step's rows unread: whoever asks for one reads it, and the pages of the next step's
rows are fetched meanwhile.
"""
from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar, overload

from hdpo import oddities
from hdpo.config import DataConfig
from hdpo.data.grouping import by_length
from hdpo.data.index import RowIndex
from hdpo.data.store import RowStore
from hdpo.errors import DataError

log = logging.getLogger(__name__)

T = TypeVar("T")

_NAMED = 10
"""Bad rows that are named one by one in the log."""


class Unread(Sequence[T]):
    """Records of some rows, each made anew whenever it is asked for: keep what you need. A slice reads nothing."""

    def __init__(self, make: Callable[[int], T], indices: Sequence[int]) -> None:
        self._make, self.indices = make, indices

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> Unread[T]: ...

    def __getitem__(self, index: int | slice) -> T | Unread[T]:
        if isinstance(index, slice):
            return Unread(self._make, self.indices[index])
        return self._make(self.indices[index])


def bad_rows(rows: RowStore, index: RowIndex, config: DataConfig) -> dict[str, str]:
    """name -> reason of the rows that are left out, logged. Raises DataError if no row is good, or data.bad_row says so."""
    skipped = {rows.name(row): reason for row, reason in index.bad.items()}
    for name, reason in skipped.items():
        if config.bad_row == "stop":
            raise DataError(f"{name}: {reason} (data.bad_row = skip leaves such rows out)")
        if len(skipped) == len(rows):
            raise DataError(f"no usable row in the data; the first problem: {name}: {reason}")
    if os.environ.get("RANK", "0") == "0":
        oddities.count("row/skipped", len(skipped))
        for name, reason in list(skipped.items())[:_NAMED]:
            log.warning("skipped %s: %s", name, reason)
        if len(skipped) > _NAMED:
            log.warning("skipped %d of %d rows", len(skipped), len(rows))
    return skipped


class RowStream(Generic[T]):
    """See the module's docstring. `make(index)` reads a row. Bad rows are left out, named and counted in `skipped` (name ->
    reason), or end the run at once, as `config.bad_row` says. Raises DataError when no row is good. `rows_per_step`: rows that
    are taken at a time, for data.group_by_length; 0 leaves that setting out of account."""

    def __init__(self, rows: RowStore, index: RowIndex, make: Callable[[int], T], config: DataConfig, seed: int,
                 rows_per_step: int = 0) -> None:
        self.rows, self.index, self._make, self._config, self._seed = rows, index, make, config, seed
        self._grouped = [rows_per_step, config.group_by_length] if rows_per_step and config.group_by_length else []
        self.epoch, self.position = 0, 0      # the next row is number `position` of this epoch's order
        self.skipped = bad_rows(rows, index, config)
        self._mix = _Mix(rows.source_sizes(), index, config.mix, seed, config.shuffle) if config.mix else None
        self._order = self._order_of(0)
        self._threads = ThreadPoolExecutor(1, "hdpo-prefetch")
        self._share = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))

    def __len__(self) -> int:
        """Rows of one epoch, bad ones included."""
        return len(self.rows)

    def _order_of(self, epoch: int) -> list[int]:
        if self._mix is not None:
            return self._mix.order(epoch)
        order = self.index.good() if self._grouped else list(range(len(self.rows)))
        if self._config.shuffle:
            random.Random(f"{self._seed}/{epoch}").shuffle(order)
        if self._grouped:
            coin = random.Random(f"{self._seed}/{epoch}/steps") if self._config.shuffle else None
            rows, steps = self._grouped
            order = by_length(order, self.index.lengths, rows, steps, epoch * len(order), coin)
        return order

    def state(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self.position, "rows": len(self.rows), "seed": self._seed,
                **({"mix": self._config.mix} if self._config.mix else {}),
                **({"grouped": self._grouped} if self._grouped else {})}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state` was taken. Raises DataError if the data, the seed, the mix or the groups (rows a step
        and steps) are not the same."""
        for key, value in (("rows", len(self.rows)), ("seed", self._seed), ("mix", self._config.mix), ("grouped", self._grouped)):
            if state.get(key, []) != value:
                raise DataError(f"the checkpoint was made with {key} = {state.get(key, [])}, the data stream has {value}")
        self.epoch, self.position = state["epoch"], state["position"]
        self._order = self._order_of(self.epoch)

    def take(self, count: int) -> Unread[T]:
        """The next `count` good rows, over the ends of epochs. The same on every rank."""
        indices, self.epoch, self.position, self._order = self._next(count)
        for file in self.rows.rewritten() if os.environ.get("LOCAL_RANK", "0") == "0" else ():
            log.warning("%s was rewritten: this run goes on with the rows it began with, a resumed one will refuse it", file)
        rank, ranks = self._share
        self._threads.submit(self.rows.touch, self._next(count)[0][rank::ranks])
        return Unread(self._make, indices)

    def peek(self, count: int) -> Unread[T]:
        """What `take` will return next, without moving on."""
        return Unread(self._make, self._next(count)[0])

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)

    def _next(self, count: int) -> tuple[list[int], int, int, list[int]]:
        """(rows, and the epoch, position and order after them)."""
        found: list[int] = []
        epoch, position, order = self.epoch, self.position, self._order
        while len(found) < count:
            if position == len(order):
                epoch, position = epoch + 1, 0
                order = self._order_of(epoch)
            if self.index.lengths[order[position]] >= 0:
                found.append(order[position])
            position += 1
        return found, epoch, position, order


class _Mix:
    """Orders in which each source has its share of every stretch of rows, whatever its size.

    An epoch has as many rows as there are good ones. A source goes through its own rows over and over, each time in
    another order, and goes on in the next epoch where it was.
    """

    def __init__(self, sizes: Sequence[int], index: RowIndex, weights: Sequence[float], seed: int, shuffle: bool) -> None:
        if len(weights) != len(sizes):
            raise DataError(f"data.mix has {len(weights)} weights for {len(sizes)} sources in data.train")
        self._seed, self._shuffle = seed, shuffle
        self._rows: list[list[int]] = []
        first = 0
        for number, size in enumerate(sizes):
            self._rows.append([row for row in range(first, first + size) if index.lengths[row] >= 0])
            first += size
            if weights[number] > 0 and not self._rows[-1]:
                raise DataError(f"data.mix: source {number + 1} of data.train has no usable row")
        total = sum(map(len, self._rows))
        exact = [total * weight / sum(weights) for weight in weights]
        self._quotas = [int(share) for share in exact]
        by_rest = sorted(range(len(exact)), key=lambda source: self._quotas[source] - exact[source])
        for source in by_rest[:total - sum(self._quotas)]:
            self._quotas[source] += 1

    def order(self, epoch: int) -> list[int]:
        places = sorted(((i + 0.5) / quota, source, epoch * quota + i)
                        for source, quota in enumerate(self._quotas) for i in range(quota))
        laps: dict[tuple[int, int], list[int]] = {}
        order = []
        for _, source, number in places:
            lap, place = divmod(number, len(self._rows[source]))
            if (source, lap) not in laps:
                laps[source, lap] = self._lap(source, lap)
            order.append(laps[source, lap][place])
        return order

    def _lap(self, source: int, lap: int) -> list[int]:
        rows = list(self._rows[source])
        if self._shuffle:
            random.Random(f"{self._seed}/{source}/{lap}").shuffle(rows)
        return rows
