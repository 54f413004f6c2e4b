"""What a data source is, and its rows as Arrow batches, a bounded part in memory at a time.

A source is a file (Parquet, Arrow, JSON, JSON lines, CSV or TSV, the last three also with .gz), a pattern of files, a folder
of them, or the name of a dataset: `owner/name`, `owner/name:split` or `owner/name/config:split`.

Rows of JSON and CSV stay the text they were, one column ROW_COLUMN, and are parsed when a row is read: nothing is inferred
from other rows, so a ground truth may be a string here and a list there, and a line that is no JSON harms only its own row.
"""
from __future__ import annotations

import csv
import glob
import gzip
import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hdpo.errors import DataError

ROW_COLUMN = "__row__"
"""The column of a copy whose rows are JSON text."""

BATCH_BYTES, BUFFER_BYTES = 64 << 20, 1 << 20
"""Of rows copied at once, and of a column of a row group read at once: without the second a whole group would be held."""
_SUFFIXES = {".parquet": "parquet", ".pq": "parquet", ".arrow": "arrow", ".feather": "arrow", ".json": "json",
             ".jsonl": "json", ".ndjson": "json", ".csv": "csv", ".tsv": "csv"}
_DATASET = re.compile(r"[\w.-]+/[\w.-]+(/[\w.-]+)?(:[\w.\[\]%+:-]+)?")
_SPLIT = re.compile(r"(.+)-\d{5}-of-\d{5}")


@dataclass(frozen=True, slots=True)
class DatasetName:
    """A dataset as `datasets.load_dataset` knows it."""

    path: str
    config: str | None
    split: str

    def __str__(self) -> str:
        return f"{self.path}{'/' + self.config if self.config else ''}:{self.split}"


def resolve(source: str) -> list[Path] | DatasetName:
    """The files of a source, in order, or the dataset it names. Raises DataError for one that is not there."""
    path = Path(source).expanduser()
    if path.is_dir():
        return _files_of_folder(path)
    if path.exists():
        return [path]
    if any(character in source for character in "*?["):
        if found := sorted(glob.glob(str(path), recursive=True)):
            return [Path(file) for file in found]
        if not _DATASET.fullmatch(source):
            raise DataError(f"{source}: no data file matches")
    if _DATASET.fullmatch(source) and kind_of(path, sniff=False) is None:
        name, _, split = source.partition(":")
        owner, title, *config = name.split("/")
        return DatasetName(f"{owner}/{title}", config[0] if config else None, split or "train")
    raise DataError(f"{source}: no such data file")


def _files_of_folder(folder: Path) -> list[Path]:
    state = folder / "state.json"       # datasets' save_to_disk
    if state.is_file():
        return [folder / part["filename"] for part in json.loads(state.read_text())["_data_files"]]
    files = sorted(file for file in folder.iterdir() if file.is_file() and kind_of(file, sniff=False)
                   and not file.name.startswith((".", "dataset_info", "dataset_dict")))
    if splits := sorted(part.parent.name for part in folder.glob("*/state.json")):
        raise DataError(f"{folder}: holds several splits ({', '.join(splits)}); name one, as in {folder}/{splits[0]}")
    if not files:
        raise DataError(f"{folder}: no data files in this folder ({', '.join(_SUFFIXES)}); name the files, or a folder of them")
    splits = sorted({found[1] for file in files if (found := _SPLIT.fullmatch(file.name.split(".")[0]))})
    if len(splits) > 1:
        raise DataError(f"{folder}: holds several splits ({', '.join(splits)}); name one, as in {folder}/{splits[0]}-*")
    return files


def kind_of(file: Path, sniff: bool = True) -> str | None:
    """parquet, arrow, json or csv by the file's name, or by its first bytes; None if neither tells."""
    suffix = Path(file.name.removesuffix(".gz")).suffix.lower()
    if suffix in _SUFFIXES or not sniff:
        return _SUFFIXES.get(suffix)
    with file.open("rb") as opened:
        start = opened.read(8)
    return "parquet" if start.startswith(b"PAR1") else "arrow" if start.startswith(b"ARROW1") else None


@dataclass(frozen=True, slots=True)
class Batches:
    """Rows of one file: how many there are (None: not known beforehand), about how many bytes they take, and the rows."""

    num_rows: int | None
    nbytes: int
    batches: Iterator[pa.RecordBatch]


def read_file(file: Path) -> Batches:
    """Raises DataError, also while the batches are read, for a file that can't be read."""
    kind = kind_of(file)
    if kind == "parquet":
        return _parquet(file)
    if kind == "arrow":
        return Batches(None, file.stat().st_size, _guarded(file, "Arrow", _arrow(file)))
    if kind == "json":
        return Batches(None, file.stat().st_size, _guarded(file, "JSON", _packed(_json_lines(file))))
    if kind == "csv":
        return Batches(None, file.stat().st_size, _guarded(file, "CSV", _packed(_csv_lines(file))))
    raise DataError(f"{file}: not a data file that can be read; known are {', '.join(_SUFFIXES)}")


def _guarded(file: Path, kind: str, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    try:
        yield from batches
    except (OSError, EOFError, ValueError, csv.Error, pa.ArrowException) as exc:
        raise DataError(f"{file}: not a readable {kind} file ({' '.join(str(exc).split())})") from exc


def parquet_footer(file: Path) -> tuple[int, list[str]]:
    """(rows, columns), from the footer alone."""
    with _open_parquet(file) as parquet:
        return parquet.metadata.num_rows, parquet.schema_arrow.names


def _open_parquet(file: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file, pre_buffer=False, buffer_size=BUFFER_BYTES)
    except (OSError, pa.ArrowException) as exc:
        raise DataError(f"{file}: not a readable Parquet file ({' '.join(str(exc).split())})") from exc


def _parquet(file: Path) -> Batches:
    """By `iter_batches` with few rows at a time: a row group as a whole may hold more than Arrow can nest (2 GiB)."""
    parquet = _open_parquet(file)
    groups = [parquet.metadata.row_group(group) for group in range(parquet.metadata.num_row_groups)]
    nbytes, rows = sum(group.total_byte_size for group in groups), parquet.metadata.num_rows
    size = max(1, min(1024, BATCH_BYTES * rows // max(1, nbytes)))

    def batches() -> Iterator[pa.RecordBatch]:
        with parquet:
            yield from parquet.iter_batches(size, use_threads=False)
    return Batches(rows, nbytes, _guarded(file, "Parquet", batches()))


def _arrow(file: Path) -> Iterator[pa.RecordBatch]:
    with pa.memory_map(str(file)) as mapped:
        whole = mapped.read(6) == b"ARROW1"
        mapped.seek(0)
        if whole:
            reader = pa.ipc.open_file(mapped)
            yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            yield from pa.ipc.open_stream(mapped)


def _open_text(file: Path, **options: Any) -> IO[str]:
    return gzip.open(file, "rt", encoding="utf-8-sig", **options) if file.suffix == ".gz" else file.open(
        encoding="utf-8-sig", **options)


def _json_lines(file: Path) -> Iterator[str]:
    """The text of every row: of a list (also under "data" or "rows"), or else of every line that is not blank."""
    with _open_text(file) as opened:
        start = opened.read(1 << 16).lstrip()
        opened.seek(0)
        if start.startswith("[") or (start.startswith("{") and ".json" == Path(file.name.removesuffix(".gz")).suffix.lower()):
            try:
                whole = json.load(opened)
            except json.JSONDecodeError:
                if start.startswith("["):
                    raise
                opened.seek(0)
            else:
                rows = whole if isinstance(whole, list) else next(
                    (whole[key] for key in ("data", "rows") if isinstance(whole.get(key), list)), [whole])
                yield from (json.dumps(row) for row in rows)
                return
        yield from (line.strip() for line in opened if line.strip())


def _csv_lines(file: Path) -> Iterator[str]:
    csv.field_size_limit(sys.maxsize)       # a picture in base64 is a long field
    tabs = Path(file.name.removesuffix(".gz")).suffix.lower() == ".tsv"
    with _open_text(file, newline="") as opened:
        yield from (json.dumps(row) for row in csv.DictReader(opened, delimiter="\t" if tabs else ",", restkey="__more__"))


def _packed(lines: Iterable[str]) -> Iterator[pa.RecordBatch]:
    """Batches of at most 256 lines and about BATCH_BYTES."""
    lines = iter(lines)
    while chunk := list(islice(lines, 1)):
        held = len(chunk[0])
        while len(chunk) < 256 and held < BATCH_BYTES and (more := next(lines, None)) is not None:
            chunk.append(more)
            held += len(more)
        yield pa.record_batch({ROW_COLUMN: pa.array(chunk, pa.large_string())})


def first_columns(batch: pa.RecordBatch) -> list[str]:
    """The columns of a file that begins with this batch; those of JSON rows are the keys of the first that is an object."""
    if batch.schema.names != [ROW_COLUMN]:
        return list(batch.schema.names)
    for text in batch[0]:
        try:
            row = json.loads(text.as_py())
        except ValueError:
            continue
        if isinstance(row, dict):
            return list(row)
    return []


def plain_type(kind: pa.DataType) -> pa.DataType:
    """The type that `kind` is copied as: views and dictionaries as what they hold, which `datasets` can read and take from."""
    if pa.types.is_string_view(kind):
        return pa.large_string()
    if pa.types.is_binary_view(kind):
        return pa.large_binary()
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return plain_type(kind.value_type)
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(plain_type(field.type)) for field in kind])
    if pa.types.is_large_list(kind):
        return pa.large_list(plain_type(kind.value_type))
    if pa.types.is_list(kind) or pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind):
        return pa.list_(plain_type(kind.value_type))
    if pa.types.is_map(kind):
        return pa.list_(pa.struct([("key", plain_type(kind.key_type)), ("value", plain_type(kind.item_type))]))
    if isinstance(kind, pa.BaseExtensionType):
        return plain_type(kind.storage_type)
    return kind


def plain(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """The batch in its plain types. Raises what pyarrow raises for values that do not fit them."""
    columns = [pc.run_end_decode(column) if pa.types.is_run_end_encoded(column.type) else column for column in batch.columns]
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names).cast(schema)
