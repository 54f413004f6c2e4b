"""Rows of Parquet files as training records: tasks of the Metis-RL schema, and demonstrations.

A stream's order is a function of the seed and the row counts alone, every rank computes the same one and takes its share
of what `take` returns. Rows are read when they are taken; images stay encoded at their original size.
"""
from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from PIL.Image import Image

from hdpo import oddities
from hdpo.agent.chat import ChatFormat
from hdpo.agent.demonstration import demonstration_length
from hdpo.agent.images import check_image, decode_image
from hdpo.config import DataConfig
from hdpo.data.rows import checked_extra, checked_images, checked_messages, checked_truth, row_text
from hdpo.errors import DataError
from hdpo.types import Task

log = logging.getLogger(__name__)

T = TypeVar("T")
Row = dict[str, Any]

TASK_COLUMNS = ("data_source", "prompt", "images", "reward_model")
DEMONSTRATION_COLUMNS = ("messages", "images")


class ParquetRows:
    """Random access to the rows of several files, one row group in memory at a time. Raises DataError for a file that is
    missing or unreadable, or lacks a column."""

    def __init__(self, files: Sequence[str], required: Sequence[str], optional: Sequence[str] = ()) -> None:
        if not files:
            raise DataError("no data files are given (data.train, data.val)")
        self._groups: list[tuple[str, int, int]] = []     # file, row group, number of its first row in the file
        self._starts: list[int] = []                      # number of its first row over all files
        self._columns: dict[str, list[str]] = {}
        self.num_rows = 0
        for file in files:
            self._add(str(file), required, optional)
        if not self.num_rows:
            raise DataError(f"{files[0]}: the data files hold no rows")

    def _add(self, file: str, required: Sequence[str], optional: Sequence[str]) -> None:
        try:
            with pq.ParquetFile(file) as parquet:
                names, metadata = parquet.schema_arrow.names, parquet.metadata
        except FileNotFoundError:
            raise DataError(f"{file}: no such data file") from None
        except (OSError, pa.ArrowException) as exc:
            raise DataError(f"{file}: not a readable Parquet file ({' '.join(str(exc).split())})") from exc
        for column in required:
            if column not in names:
                raise DataError(f"{file}: column {column} is missing; there are {', '.join(names)}")
        self._columns[file] = [name for name in (*required, *optional) if name in names]
        in_file = 0
        for group in range(metadata.num_row_groups):
            self._groups.append((file, group, in_file))
            self._starts.append(self.num_rows)
            count = metadata.row_group(group).num_rows
            in_file += count
            self.num_rows += count

    def name(self, index: int) -> str:
        """"file.parquet row 12": how messages name a row."""
        group = self._group_of(index)
        file, _, first = self._groups[group]
        return f"{Path(file).name} row {first + index - self._starts[group]}"

    def _group_of(self, index: int) -> int:
        low, high = 0, len(self._starts)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._starts[middle] <= index else (low, middle)
        return low

    def read(self, indices: Sequence[int]) -> list[Row | DataError]:
        """Rows in the order of `indices`, an error for one that can't be read; each row group is read once."""
        wanted: dict[int, list[int]] = {}
        for index in indices:
            wanted.setdefault(self._group_of(index), []).append(index)
        rows: dict[int, Row | DataError] = {}
        for group, members in wanted.items():
            file, number, _ = self._groups[group]
            with pq.ParquetFile(file) as parquet:
                table = parquet.read_row_group(number, columns=self._columns[file])
            rows.update((i, _row(table, i - self._starts[group])) for i in members)
        return [rows[index] for index in indices]


def _row(table: pa.Table, index: int) -> Row | DataError:
    try:
        return table.slice(index, 1).to_pylist()[0]     # not take: it knows no string_view
    except (UnicodeDecodeError, OverflowError) as exc:   # text that is no UTF-8, a date beyond Python's
        return DataError(f"a value can't be read ({exc})")


class RowStream(Generic[T]):
    """An endless, seeded, resumable sequence of parsed rows. `parse(row, name)` raises DataError for a bad row, which is
    then skipped, logged once and counted in `skipped` (name -> reason), or ends the run, as `config.bad_row` says."""

    def __init__(self, rows: ParquetRows, parse: Callable[[Row, str], T], config: DataConfig, seed: int) -> None:
        self._rows, self._parse, self._config, self._seed = rows, parse, config, seed
        self._pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="hdpo-data")
        self.epoch, self.position = 0, 0      # the next row is number `position` of this epoch's order
        self.skipped: dict[str, str] = {}
        self._order = self._order_of(0)

    def __len__(self) -> int:
        """Rows of one epoch, bad ones included."""
        return self._rows.num_rows

    def _order_of(self, epoch: int) -> list[int]:
        order = list(range(self._rows.num_rows))
        if self._config.shuffle:
            random.Random(f"{self._seed}/{epoch}").shuffle(order)
        return order

    def state(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position, "rows": self._rows.num_rows, "seed": self._seed}

    def restore(self, state: dict[str, int]) -> None:
        """Continue exactly where `state` was taken. Raises DataError if the data or the seed are not the same."""
        for key, value in (("rows", self._rows.num_rows), ("seed", self._seed)):
            if state[key] != value:
                raise DataError(f"the checkpoint was made with {key} = {state[key]}, the data stream has {value}")
        self.epoch, self.position = state["epoch"], state["position"]
        self._order = self._order_of(self.epoch)

    def take(self, count: int) -> list[T]:
        """The next `count` good rows, over the ends of epochs. The same on every rank."""
        records: list[T] = []
        in_vain = 0
        while len(records) < count:
            indices = self._advance(count - len(records))
            good = self._parse_all(indices)
            records += good
            in_vain = 0 if good else in_vain + len(indices)
            if in_vain >= self._rows.num_rows:
                name, reason = next(iter(self.skipped.items()))
                raise DataError(f"no usable row in the data; the first problem: {name}: {reason}")
        return records

    def all(self) -> list[T]:
        """Every good row in file order, without moving the stream: for held-out data."""
        return self._parse_all(range(self._rows.num_rows))

    def _advance(self, count: int) -> list[int]:
        if self.position == len(self._order):
            self.epoch, self.position = self.epoch + 1, 0
            self._order = self._order_of(self.epoch)
        indices = self._order[self.position:self.position + count]
        self.position += len(indices)
        return indices

    def _parse_all(self, indices: Sequence[int]) -> list[T]:
        names = [self._rows.name(index) for index in indices]
        outcomes = self._pool.map(self._try, self._rows.read(indices), names)
        records: list[T] = []
        for name, outcome in zip(names, outcomes):
            if not isinstance(outcome, DataError):
                records.append(outcome)
                continue
            if self._config.bad_row == "stop":
                raise DataError(f"{name}: {outcome} (data.bad_row = skip leaves such rows out)") from outcome
            if name not in self.skipped:
                log.warning("skipped %s: %s", name, outcome)
                oddities.count("row/skipped")
                self.skipped[name] = str(outcome)
        return records

    def _try(self, row: Row | DataError, name: str) -> T | DataError:
        if isinstance(row, DataError):
            return row
        try:
            return self._parse(row, name)
        except DataError as exc:
            return exc


class TaskStream(RowStream[Task]):
    """RL rows: data_source, prompt [{role, content}], images [{bytes}], reward_model {ground_truth}, extra_info.

    The task's id is extra_info.index, or file and row. A row is bad if an image is broken, a field has a shape that
    `hdpo.data.rows` can't read, or the prompt is longer than config.max_prompt_tokens.
    """

    def __init__(self, files: Sequence[str], chat: ChatFormat, config: DataConfig, seed: int) -> None:
        self._chat = chat
        super().__init__(ParquetRows(files, TASK_COLUMNS, ("extra_info",)), self._task, config, seed)

    def _task(self, row: Row, name: str) -> Task:
        extra, truth = checked_extra(row.get("extra_info")), checked_truth(row["reward_model"])
        messages, images = checked_messages(row["prompt"], "prompt"), checked_images(row["images"])
        sizes = [check_image(data, f"image {i}") for i, data in enumerate(images)]
        length = self._chat.prompt_length(messages, sizes)
        if length > self._config.max_prompt_tokens:
            raise DataError(f"the prompt has {length} tokens, data.max_prompt_tokens is {self._config.max_prompt_tokens}")
        task = Task(name, row_text(str(row["data_source"] or "unknown")), messages, images, truth, extra)
        return replace(task, id=task.row_index or name)


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A recorded conversation, checked; `images` decodes the encoded files at original size."""

    id: str
    messages: list[dict[str, str]]
    encoded_images: tuple[bytes, ...]
    num_tokens: int

    @property
    def images(self) -> list[Image]:
        return [decode_image(data, f"{self.id}: image {i}") for i, data in enumerate(self.encoded_images)]


class DemonstrationStream(RowStream[Demonstration]):
    """SFT rows: messages [{role, content}] (see hdpo.agent.demonstration), images [{bytes}].

    A row is bad if its messages have another shape, an image is broken, or it is longer than `max_tokens` (0: no limit).
    """

    def __init__(self, files: Sequence[str], chat: ChatFormat, config: DataConfig, seed: int, max_tokens: int = 0) -> None:
        self._chat, self._max_tokens = chat, max_tokens
        super().__init__(ParquetRows(files, DEMONSTRATION_COLUMNS), self._demonstration, config, seed)

    def _demonstration(self, row: Row, name: str) -> Demonstration:
        messages, images = checked_messages(row["messages"], "messages"), checked_images(row["images"])
        sizes = [check_image(data, f"image {i}") for i, data in enumerate(images)]
        length = demonstration_length(self._chat, messages, sizes)
        if self._max_tokens and length > self._max_tokens:
            raise DataError(f"the demonstration has {length} tokens, the limit is {self._max_tokens}")
        return Demonstration(name, messages, images, length)


def read_tasks(files: Sequence[str], chat: ChatFormat, config: DataConfig, rows: int = 0) -> list[Task]:
    """Held-out tasks in file order; the first `rows` good ones, 0 for all."""
    tasks = TaskStream(files, chat, config, seed=0).all()
    return tasks[:rows] if rows else tasks


def check_columns(files: Sequence[str], *, demonstrations: bool) -> int:
    """Rows in files of RL rows or demonstrations, without reading them. Raises DataError for a missing file or column."""
    return ParquetRows(files, DEMONSTRATION_COLUMNS if demonstrations else TASK_COLUMNS).num_rows
