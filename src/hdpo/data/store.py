"""Rows of files and datasets by number, memory-mapped: opening reads nothing, a row costs what its own bytes cost.

    rows = open_rows(["a.parquet", "more/*.jsonl", "owner/name:test"])
    len(rows), rows.columns                # of the first source
    rows[17]                               # {"prompt": [...], "images": [{"bytes": b"...", "path": None}], ...}
    rows.row(17, ["question"])             # these columns alone: what is not asked for is not read
    rows.name(17)                          # "a.parquet row 17": how messages name it
    encoded_images(rows[17]["images"], rows.folders(17))     # (pictures.py) its pictures as encoded files

Every process of a node may open the same rows: the first makes the Arrow copy (see copies.py), the others map it, and pages
that several of them read are in memory once. A RowStore may be shared by threads, and pickled.
"""
from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import datasets

from hdpo.data import pages
from hdpo.data.copies import cache_folder, mapped
from hdpo.data.sources import ROW_COLUMN, DatasetName, resolve
from hdpo.data.values import MappedFile
from hdpo.errors import DataError

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Part:
    """The rows of one file or dataset."""

    source: int                # number of the source it came from
    name: str
    folder: Path | None        # where relative paths in it start
    rows: datasets.Dataset     # memory-mapped, in Arrow format
    columns: tuple[str, ...]
    as_text: bool
    fingerprint: str


class RowStore(Sequence[Row]):
    """See the module's docstring. Made by `open_rows`."""

    def __init__(self, parts: Sequence[_Part], image_root: str = "") -> None:
        self._parts, self._image_root = list(parts), image_root
        self._starts = [0, *accumulate(len(part.rows) for part in parts)]
        self._opened = {part.name: state for part in parts if (state := file_state(part.name))[1] >= 0}
        self._files: dict[int, MappedFile] = {}      # by number of the part; of this process

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": {}}

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def columns(self) -> tuple[str, ...]:
        """Of the first file; other files may have others, and rows that were JSON each their own."""
        return self._parts[0].columns

    @property
    def fingerprint(self) -> str:
        """Equal for equal rows in equal order, wherever they lie."""
        return "|".join(part.fingerprint for part in self._parts)

    def rewritten(self) -> list[str]:
        """Files that are no longer what was opened, each told once. The rows stay those that were opened: they are a copy."""
        found = [name for name, state in self._opened.items() if file_state(name) != state]
        for name in found:
            del self._opened[name]
        return found

    def source_sizes(self) -> list[int]:
        """Rows of each source, in the order in which they were given."""
        sizes = [0] * (1 + max(part.source for part in self._parts))
        for part in self._parts:
            sizes[part.source] += len(part.rows)
        return sizes

    def require(self, columns: Iterable[str]) -> None:
        """Raises DataError naming the first file that lacks one of them."""
        for part in self._parts:
            require(part.name, columns, part.columns)

    def name(self, index: int) -> str:
        part, row = self._place(index)
        return f"{Path(part.name).name} row {row}"

    def source_row(self, index: int) -> tuple[str, int]:
        """(the file's path or the dataset's name, number of the row in it)."""
        part, row = self._place(index)
        return part.name, row

    def folders(self, index: int) -> list[Path]:
        """Where a relative path in the row may start: data.image_root, then the folder of its file."""
        folder = self._place(index)[0].folder
        return [Path(self._image_root)] * bool(self._image_root) + ([folder] if folder is not None else [])

    def all_folders(self) -> list[str]:
        """Every place where a relative path of some row may start."""
        return sorted({str(folder.resolve()) for start in self._starts[:-1] for folder in self.folders(start)})

    def row(self, index: int, columns: Sequence[str] | None = None) -> Row:
        """The row as Python values; with `columns` only those of them that it has. Raises DataError for a broken JSON row."""
        part, number = self._place(index)
        if not part.as_text:
            wanted = None if columns is None else [name for name in columns if name in part.columns]
            table = part.rows[number] if wanted is None else part.rows[number].select(wanted)
            try:
                return self._file(index).row(table)
            except (UnicodeDecodeError, OverflowError) as exc:      # text that is no UTF-8, a date beyond Python's
                raise DataError(f"a value can't be read ({exc})") from None
        try:
            row = json.loads(self._file(index).row(part.rows[number])[ROW_COLUMN])
        except ValueError as exc:
            raise DataError(f"not valid JSON ({exc})") from None
        if not isinstance(row, dict):
            raise DataError("not a JSON object")
        return row if columns is None else {name: row[name] for name in columns if name in row}

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self.row(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self.row(index % len(self))

    def __iter__(self) -> Iterator[Row]:
        return (self.row(index) for index in range(len(self)))

    def touch(self, indices: Iterable[int]) -> int:
        """Read the rows' pages into memory without making anything of them, for whoever asks next; returns their bytes."""
        return sum(self._file(index).touch(part.rows[number]) for index in indices for part, number in [self._place(index)])

    def _file(self, index: int) -> MappedFile:
        place = bisect_right(self._starts, index) - 1
        if place not in self._files:
            self._files[place] = MappedFile(self._parts[place].rows.data.table)
        return self._files[place]

    def _place(self, index: int) -> tuple[_Part, int]:
        number = bisect_right(self._starts, index) - 1
        return self._parts[number], index - self._starts[number]


def file_state(path: str) -> list[Any]:
    """[path, bytes, modified], -1 for a file that is not there."""
    try:
        status = os.stat(path)
        return [path, status.st_size, status.st_mtime_ns]
    except OSError:
        return [path, -1, -1]


def require(name: str, columns: Iterable[str], present: Sequence[str]) -> None:
    """Raises DataError naming the file and the first column that is not `present`."""
    for column in columns:
        if column not in present:
            raise DataError(f"{name}: column {column} is missing; there are {', '.join(present)}")


def open_rows(sources: Sequence[str], *, cache: str = "", image_root: str = "") -> RowStore:
    """The rows of all sources, one after another; see sources.py for what a source may be.

    `cache`: folder of the copies (data.cache). `image_root`: where relative picture paths start besides the file's own folder.
    Raises DataError, one line that names the source, for one that is missing, unreadable or empty.
    """
    parts: list[_Part] = []
    for number, source in enumerate(sources):
        found = resolve(str(source))
        if isinstance(found, DatasetName):
            parts.append(_dataset(number, found))
            continue
        folder = cache_folder(cache)
        for file in found:
            copy, rows = mapped(file, folder)
            pages.read_at_random(copy.arrow)
            parts.append(_Part(number, str(file), file.parent, rows, copy.columns, copy.as_text, copy.fingerprint))
    if not parts:
        raise DataError("no data files are given (data.train, data.val)")
    return RowStore(parts, image_root)


def _dataset(number: int, name: DatasetName) -> _Part:
    """Its own memory-mapped Arrow files, made by `datasets` once a machine (HF_DATASETS_CACHE). Raises DataError."""
    try:
        rows = datasets.load_dataset(name.path, name.config, split=name.split)
    except Exception as exc:     # noqa: BLE001  a network's boundary: hubs fail in many ways
        reason = " ".join(str(exc).split()) or type(exc).__name__
        raise DataError(f"{name}: no such data file, and no dataset that can be loaded ({reason})") from exc
    if not len(rows):
        raise DataError(f"{name}: the dataset holds no rows")
    return _Part(number, str(name), None, rows.with_format("arrow"), tuple(rows.column_names), False, rows._fingerprint)
