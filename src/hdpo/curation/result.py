"""The files that a job leaves: rows that training takes as they are, and rows that say why they were dropped."""
from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hdpo.curation.chunks import Entry
from hdpo.curation.source import Source

_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_IMAGES = pa.list_(pa.struct([("bytes", pa.binary())]))
_ORIGIN = [("source", pa.string()), ("source_file", pa.string()), ("source_row", pa.int64())]
KEPT_SCHEMA = pa.schema([
    ("data_source", pa.string()), ("messages", _MESSAGES), ("images", _IMAGES),
    ("reward_model", pa.struct([("ground_truth", pa.string()), ("style", pa.string())])), ("extra_info", pa.string()), *_ORIGIN])
DROPPED_SCHEMA = pa.schema([*_ORIGIN, ("stage", pa.string()), ("reason", pa.string()), ("detail", pa.string()),
                            ("messages", _MESSAGES), ("images", _IMAGES), ("extra_info", pa.string())])
GROUP_ROWS = 64


class PartWriter:
    """A Parquet file that appears under its name when it is whole; a bounded number of rows in memory."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._path, self._part, self._rows = path, path.with_suffix(".part"), list[dict[str, Any]]()
        self._schema, self._writer = schema, pq.ParquetWriter(self._part, schema)

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        if kind is None:
            self._flush()
        self._writer.close()
        if kind is None:
            os.replace(self._part, self._path)
        else:
            self._part.unlink(missing_ok=True)

    def add(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        if len(self._rows) >= GROUP_ROWS:
            self._flush()

    def add_all(self, rows: Iterable[dict[str, Any]]) -> None:
        for row in rows:
            self.add(row)

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
            self._rows.clear()


def origin(source: Source, entry: Entry) -> dict[str, Any]:
    """Where a row comes from."""
    file, row = source.rows.source_row(entry.row)
    return {"source": source.name, "source_file": Path(file).name, "source_row": row}


def kept_row(source: Source, entry: Entry) -> dict[str, Any]:
    record = entry.record
    assert record is not None
    where = origin(source, entry)
    extra = {"index": f"{source.name}_{where['source_row']}", **record.extra}
    images = [{"bytes": data} for data in record.all_images()]
    return {"data_source": record.extra.get("data_source", source.name), "messages": record.messages(), "images": images,
            "reward_model": {"ground_truth": record.truth or record.answer, "style": "rule"},
            "extra_info": json.dumps(extra, sort_keys=True), **where}


def dropped_row(source: Source, entry: Entry, stage: str) -> dict[str, Any]:
    row = {**origin(source, entry), "stage": stage if entry.record is not None else "read", "reason": entry.reason,
           "detail": entry.detail}
    if (record := entry.record) is not None:
        row |= {"messages": record.messages(), "images": [{"bytes": data} for data in record.all_images()],
                "extra_info": json.dumps(record.extra, sort_keys=True)}
    return row
