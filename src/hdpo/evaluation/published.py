"""Rows of a benchmark as its authors published them: Parquet, TSV, JSON and JSON Lines, one row in memory at a time.

What varies between copies of one benchmark (letter case, spaces and dashes of column names, numbers as text, empty cells)
is evened out here; what a column means is the benchmark's business. No torch and no pictures: a cell with an image is
handed on as it stands in the file.
"""
from __future__ import annotations

import csv
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from hdpo.errors import DataError, boundary

CHUNK = 1 << 20     # characters of a JSON array read at a time
BATCH_ROWS = 16     # rows of a Parquet file decoded at a time
IMAGE_COLUMNS = ("image", "bytes", "decodedimage", "imagebytes")
"""Normalised names of columns that hold encoded pictures: left out where only texts are wanted."""


@lru_cache(maxsize=4096)
def column_key(name: str) -> str:
    """"Question Type", "question_type" and "question-type" are one column."""
    return re.sub(r"[\s_-]+", "", name).casefold()


class Row:
    """One published row. `where` names it in messages; `key` is its key in a JSON object of rows, else ""."""

    def __init__(self, values: Mapping[str, Any], file: Path, number: int, key: str = "") -> None:
        self._values = {column_key(str(name)): value for name, value in values.items()}
        self.columns = [str(name) for name in values]
        self.file, self.number, self.key = file, number, key

    @property
    def where(self) -> str:
        return f"{self.file.name} row {self.key or self.number}"

    def __contains__(self, name: str) -> bool:
        return column_key(name) in self._values

    def raw(self, *names: str) -> Any:
        """The first of these columns that is there and not empty, as it is; None without one."""
        for name in names:
            value = self._values.get(column_key(name))
            if value is not None and not (isinstance(value, float) and math.isnan(value)) and value != "":
                return value
        return None

    def text(self, *names: str) -> str:
        """The same as stripped text; whole numbers without a fraction. "" for none."""
        return as_text(self.raw(*names))

    def require(self, *names: str) -> None:
        """Raises DataError when the row has none of these columns, whatever they hold."""
        if not any(name in self for name in names):
            raise DataError(f"{self.file}: column {' or '.join(names)} is missing; there are {', '.join(self.columns)}")


def as_text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).replace("\r\n", "\n").strip()


def natural(path: Path | str) -> list[Any]:
    """Sorts part 2 before part 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", str(path))]


def find_files(folder: Path, layouts: Sequence[Sequence[str]], exclude: str = "") -> list[Path]:
    """The files of the first layout that is there: its patterns' matches anywhere below `folder`, in their numbers' order.

    A layout is a list of patterns, each sorted by itself. Raises DataError for a folder that is missing or holds none.
    """
    if not folder.is_dir():
        raise DataError(f"--data: there is no folder {folder}; it must hold the published files of the benchmark {folder.name}")
    for layout in layouts:
        names = [path.relative_to(folder) for pattern in layout
                 for path in sorted(folder.rglob(pattern), key=natural) if path.is_file()]
        files = [folder / name for name in dict.fromkeys(names) if not any(part.startswith(".") for part in name.parts)
                 and not (exclude and re.search(exclude, str(name)))]
        if files:
            return files
    wanted = " or ".join(", ".join(layout) for layout in layouts)
    raise DataError(f"{folder}: no published file of {folder.name} is there; looked for {wanted}")


def read_rows(file: Path, images: bool = True) -> Iterator[Row]:
    """Rows in the file's order. Without `images`, columns of Parquet files that hold pictures are not read.

    Raises DataError for a file that can't be read.
    """
    reader = _READERS.get(file.suffix.lower())
    if reader is None:
        raise DataError(f"{file}: not a Parquet, TSV, CSV, JSON or JSON Lines file")
    with boundary(DataError, f"{file}: not readable", OSError, UnicodeDecodeError, ValueError, csv.Error):
        for number, (key, values) in enumerate(reader(file, images)):
            if not isinstance(values, Mapping):
                raise DataError(f"{file} row {key or number}: not an object with columns")
            yield Row(values, file, number, key)


def read_dataset(name: str, images: bool = True) -> Iterator[Row]:
    """Rows of a dataset on the hub, "owner/name:split", through `datasets`. Raises DataError for one that can't be had."""
    from hdpo.data.store import open_rows
    rows = open_rows([name])
    columns = [column for column in rows.columns if images or column_key(column) not in IMAGE_COLUMNS]
    for number in range(len(rows)):
        yield Row(rows.row(number, columns), Path(name), number)


Keyed = tuple[str, Any]


def _parquet(file: Path, images: bool) -> Iterator[Keyed]:
    import pyarrow as pa
    import pyarrow.parquet as pq
    with boundary(DataError, f"{file}: not a readable Parquet file", pa.ArrowException), pq.ParquetFile(file) as parquet:
        schema = parquet.schema_arrow
        columns = [name for name in schema.names if images or not _is_picture(name, schema.field(name).type)]
        for batch in parquet.iter_batches(batch_size=BATCH_ROWS, columns=columns):
            for values in batch.to_pylist():
                yield "", values


def _is_picture(name: str, kind: Any) -> bool:
    import pyarrow.types as types
    return column_key(name) in IMAGE_COLUMNS or types.is_struct(kind) and "bytes" in {field.name for field in kind}


def _table(file: Path, images: bool) -> Iterator[Keyed]:
    csv.field_size_limit(sys.maxsize)     # a cell may hold a picture of tens of megabytes
    with file.open(newline="", encoding="utf-8-sig") as handle:
        for values in csv.DictReader(handle, delimiter="\t" if file.suffix.lower() == ".tsv" else ","):
            values.pop(None, None)        # type: ignore[call-overload]   # cells beyond the header
            yield "", values


def _lines(file: Path, images: bool) -> Iterator[Keyed]:
    with file.open(encoding="utf-8-sig") as handle:
        for line in handle:
            if line.strip():
                yield "", json.loads(line)


def _json(file: Path, images: bool) -> Iterator[Keyed]:
    """Rows of an array, of an object of rows, or of an object that holds an array of rows; else the object is one row."""
    with file.open(encoding="utf-8-sig") as handle:
        start = handle.read(64).lstrip()[:1]
        handle.seek(0)
        if start == "[":
            yield from (("", item) for item in _array(handle.read))
            return
        found = json.load(handle)
    if not isinstance(found, dict):
        raise DataError(f"{file}: neither a list of rows nor an object")
    if found and all(isinstance(value, dict) for value in found.values()):
        yield from found.items()
        return
    rows = next((v for v in found.values() if isinstance(v, list) and v and all(isinstance(item, dict) for item in v)), None)
    yield from (("", item) for item in ([found] if rows is None else rows))


def _array(read: Callable[[int], str]) -> Iterator[Any]:
    """Items of a JSON array, without holding it."""
    decoder, text, at = json.JSONDecoder(), read(CHUNK), 0
    at = text.index("[") + 1
    while True:
        while at < len(text) and text[at] in " \t\r\n,":
            at += 1
        if at == len(text):
            text, at = read(CHUNK), 0
            if not text:
                raise ValueError("the list has no end")
            continue
        if text[at] == "]":
            return
        try:
            item, end = decoder.raw_decode(text, at)
            complete = end < len(text)      # a number at the end may go on in the next chunk
        except ValueError:
            complete = False
        if complete:
            yield item
            at = end
        else:
            more = read(max(CHUNK, len(text) - at))     # doubles, so that a long item is not scanned again and again
            if not more:
                decoder.raw_decode(text, at)            # says what is wrong
                raise ValueError("the list has no end")
            text, at = text[at:] + more, 0


_READERS: dict[str, Callable[[Path, bool], Iterator[Keyed]]] = {
    ".parquet": _parquet, ".tsv": _table, ".csv": _table, ".json": _json, ".jsonl": _lines}
