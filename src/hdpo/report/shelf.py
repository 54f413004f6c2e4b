"""What a folder holds to look at, a dump at a time: lists of rows, single rows, their pictures, text search.

A folder is a training run (rollouts/, eval/), an evaluation (eval/) or a curation (kept.parquet, dropped.parquet). Nothing is
read before it is asked for, so that a run of any length opens at once; what was read last is kept.
"""
from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from hdpo.errors import DataError, boundary
from hdpo.report import curated, rows
from hdpo.state.dump import rollout_parts
from hdpo.state.trained import find_trained, read_trained, trained_parts

STAGES = {"sft": (0, "after SFT"), "rl": (2, "after RL"), "no_tools": (0, "without tools"), "tools": (2, "with tools")}
"""Order and name of an evaluation's dumps; others keep their own name, between the two."""

_SHEETS, _PICTURES, _GROUPS, _TRAINED = 12, 6, 4, 2
"""Kept in memory: lists of rows, pictures and other columns of so many row groups, the trainer's log-probs of so many steps."""
_STEP = re.compile(r"step_[0-9]+")
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Dump:
    """`id` names it in addresses: step_000012, eval/sft, kept. `parts` are its files, in the order of their rows."""

    id: str
    kind: str               # step, eval or curation
    label: str
    step: int | None
    parts: tuple[Path, ...]

    def public(self, run: int = 0) -> dict[str, Any]:
        return {"id": f"{run}/{self.id}", "run": run, "kind": self.kind, "label": self.label, "step": self.step}


class Shelf:
    """The dumps of one folder. Safe to use from several threads.

    Methods raise DataError for a dump or row that isn't there, or a file that can't be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, folder.resolve().name
        self._sheets: _Recent[rows.Sheet] = _Recent(_SHEETS)
        self._pictures: _Recent[pa.ChunkedArray] = _Recent(_PICTURES)
        self._groups: _Recent[pa.Table] = _Recent(_GROUPS)
        self._trained: _Recent[list[pa.Table]] = _Recent(_TRAINED)
        self._tasks: dict[Path, tuple[float, dict[str, list[Any]]]] = {}

    def dumps(self) -> list[Dump]:
        """Evaluations in the order of training, steps by number, then what a curation has kept and dropped."""
        steps = sorted({path.name.split(".")[0] for path in (self.folder / "rollouts").glob("step_*.parquet")})
        found = [*self._evaluations(), *(self._step(name) for name in steps if _STEP.fullmatch(name)), *self._curated()]
        return [dump for dump in found if dump.parts]

    def _evaluations(self) -> Iterator[Dump]:
        stages = {path.name.removesuffix(".parquet").split(".rank")[0] for path in (self.folder / "eval").glob("*.parquet")}
        for stage in sorted(stages, key=lambda stage: (STAGES.get(stage, (1, ""))[0], stage)):
            yield Dump(f"eval/{stage}", "eval", f"held out, {STAGES.get(stage, (1, stage))[1]}", None,
                       tuple(rollout_parts(self.folder / "eval" / f"{stage}.parquet")))

    def _step(self, name: str) -> Dump:
        number = int(name.removeprefix("step_"))
        return Dump(name, "step", f"step {number}", number, tuple(rollout_parts(self.folder / "rollouts" / f"{name}.parquet")))

    def _curated(self) -> Iterator[Dump]:
        for name in ("dropped", "kept", "rl_dropped"):
            if (path := self.folder / f"{name}.parquet").is_file():
                yield Dump(name, "curation", name.replace("_", " "), None, (path,))

    def dump(self, name: str) -> Dump:
        """A step is looked for by its name: there may be thousands."""
        if _STEP.fullmatch(name) and (step := self._step(name)).parts:
            return step
        for dump in (*self._evaluations(), *self._curated()):
            if dump.id == name:
                return dump
        raise DataError(f"{self.folder}: no dump named {name}")

    def sheet(self, name: str) -> rows.Sheet:
        """What the list of a dump shows and is filtered by."""
        dump = self.dump(name)
        return self._sheets.get(_stamp(dump), lambda: _make(dump).sheet(self._read(dump, _make(dump).SHEET)))

    def row(self, name: str, number: int) -> dict[str, Any]:
        """One row as a conversation; pictures by (dump, row, place), see `picture`."""
        dump = self.dump(name)
        return _make(dump).detail(self._one(dump, number, _make(dump).DETAIL))

    def tokens(self, name: str, number: int) -> dict[str, Any]:
        """Token by token: ids, mask, log-probs of engine and trainer. Raises DataError where a dump has none."""
        dump = self.dump(name)
        if dump.kind == "curation":
            raise DataError(f"{name} holds no tokens")
        row, trained = self._one(dump, number, rows.TOKENS), None
        if row.get("index") is not None and row["advantages"]:
            trained = self._trained_row(row["step"], row["index"], row["sample_index"])
        return rows.tokens(row, trained)

    def _trained_row(self, step: int, group: int, sample: int) -> tuple[list[float], list[float]] | None:
        parts = trained_parts(self.folder / "rollouts", step)
        key = tuple((part, part.stat().st_mtime_ns) for part in parts)
        return find_trained(self._trained.get(key, lambda: [read_trained(part) for part in parts]), group, sample)

    def picture(self, name: str, number: int, place: int) -> bytes:
        """The encoded file of picture `place` of a row."""
        dump = self.dump(name)
        part, group, local = _find(dump, number)

        def read() -> pa.ChunkedArray:
            leaf = "images.list.element.bytes" if dump.kind == "curation" else "images.list.element"
            with _reading(part), pq.ParquetFile(part, read_dictionary=[leaf]) as file:
                return file.read_row_group(group, columns=["images"]).column("images")
        images = self._pictures.get((part, part.stat().st_mtime_ns, group), read)[local].as_py() or []
        if not 0 <= place < len(images):
            raise DataError(f"{name}: row {number} has no picture {place}")
        return images[place]["bytes"] if dump.kind == "curation" else images[place]

    def search(self, name: str, text: str) -> list[int]:
        """Numbers of the rows that hold `text` anywhere: question, turns, observations, answer, truth, names; any case."""
        dump, wanted = self.dump(name), text.casefold()
        table = self._read(dump, _make(dump).SEARCH)
        columns = [table.column(column).to_pylist() for column in table.column_names]
        return [number for number, values in enumerate(zip(*columns, strict=True))
                if any(wanted in found.casefold() for found in _texts(values))]

    def history(self, task: str) -> list[dict[str, Any]]:
        """Where else a task was rolled out: {"dump", "row", "verdict", "calls"}, in the order of the dumps."""
        dumps = [dump for dump in self.dumps() if dump.kind != "curation"]
        with ThreadPoolExecutor(8) as pool:
            known = list(pool.map(self._task_columns, [part for dump in dumps for part in dump.parts]))
        found, columns = [], iter(known)
        for dump in dumps:
            first = 0
            for _ in dump.parts:
                part = next(columns)
                found += [{"dump": dump.id, "label": dump.label, "row": first + row, "verdict": part["verdict"][row],
                           "calls": part["num_tool_calls"][row]}
                          for row, name in enumerate(part["task_id"]) if name == task]
                first += len(part["task_id"])
        return found

    def _task_columns(self, part: Path) -> dict[str, list[Any]]:
        changed = part.stat().st_mtime
        held = self._tasks.get(part)
        if held is None or held[0] != changed:
            try:
                held = changed, pq.read_table(part, columns=list(rows.HISTORY), use_threads=False).to_pydict()
            except (pa.ArrowException, OSError):      # who opens that dump is told so
                held = changed, {name: [] for name in rows.HISTORY}
            self._tasks[part] = held
        return held[1]

    def _read(self, dump: Dump, columns: Sequence[str]) -> pa.Table:
        tables = []
        for part in dump.parts:
            with _reading(part):
                with pq.ParquetFile(part) as file:
                    tables.append(file.read(columns=_present(dump, part, file, columns)))
        return pa.concat_tables(tables, promote_options="default")

    def _one(self, dump: Dump, number: int, columns: tuple[str, ...]) -> dict[str, Any]:
        part, group, local = _find(dump, number)

        def read() -> pa.Table:
            with _reading(part), pq.ParquetFile(part) as file:
                return file.read_row_group(group, columns=_present(dump, part, file, columns))
        return self._groups.get((part, part.stat().st_mtime_ns, group, columns), read).slice(local, 1).to_pylist()[0]


class _Recent(Generic[Value]):
    """The values asked for last, at most so many. Two threads that ask for the same one at once both make it."""

    def __init__(self, most: int) -> None:
        self._most, self._lock = most, threading.Lock()
        self._held: OrderedDict[Hashable, Value] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
                return self._held[key]
        value = make()
        with self._lock:
            self._held[key] = value
            while len(self._held) > self._most:
                self._held.popitem(last=False)
        return value


def _make(dump: Dump) -> ModuleType:
    return curated if dump.kind == "curation" else rows


def _stamp(dump: Dump) -> Hashable:
    """Changes when a file of the dump does."""
    return dump.id, *((part, part.stat().st_mtime_ns) for part in dump.parts)


def _find(dump: Dump, number: int) -> tuple[Path, int, int]:
    """(file, row group, place in it) of a dump's row."""
    if number >= 0:
        for part in dump.parts:
            with _reading(part), pq.ParquetFile(part) as file:
                for group in range(file.metadata.num_row_groups):
                    count = file.metadata.row_group(group).num_rows
                    if number < count:
                        return part, group, number
                    number -= count
    raise DataError(f"{dump.id}: no such row")


def _reading(part: Path) -> AbstractContextManager[None]:
    return boundary(DataError, f"{part}: not a readable dump", pa.ArrowException, OSError, UnicodeError)


def _present(dump: Dump, part: Path, file: pq.ParquetFile, columns: Sequence[str]) -> list[str]:
    """Those that the file has. Raises DataError where it lacks one that every dump has."""
    there = set(file.schema_arrow.names)
    if lacking := [name for name in columns if name not in there | _make(dump).OPTIONAL]:
        raise DataError(f"{part}: no dump of hdpo's, it has no column {lacking[0]}")
    return [name for name in columns if name in there]


def _texts(values: Iterable[Any]) -> Iterator[str]:
    """Every string in nested lists and dicts."""
    for value in values:
        if isinstance(value, str):
            yield value
        elif isinstance(value, list):
            yield from _texts(value)
        elif isinstance(value, dict):
            yield from _texts(value.values())
