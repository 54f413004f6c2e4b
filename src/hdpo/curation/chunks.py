"""What a job has finished, in chunks of source rows: one Parquet file for each stage, source and chunk.

A chunk's file is written whole under its name or not at all, and depends on nothing but its rows and the settings, so any
number of ranks, killed at any moment and started again in any number, write the same files.
"""
from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hdpo.agent.parse import ParsedCall
from hdpo.curation.record import Observation, Record, Step

KEPT, DROPPED, UNREADABLE, WAITING = "kept", "dropped", "unreadable", "waiting"

_STEP = pa.struct([("reasoning", pa.string()), ("name", pa.string()), ("arguments", pa.string()), ("observation", pa.string()),
                   ("images", pa.list_(pa.binary()))])
_SCHEMA = pa.schema([
    ("row", pa.int64()), ("state", pa.string()), ("reason", pa.string()), ("detail", pa.string()), ("source", pa.string()),
    ("system", pa.string()), ("question", pa.string()), ("images", pa.list_(pa.binary())), ("steps", pa.list_(_STEP)),
    ("reasoning", pa.string()), ("answer", pa.string()), ("truth", pa.string()), ("extra", pa.string())])


@dataclass(frozen=True, slots=True)
class Entry:
    """A row and what became of it in one stage. `record` is None where it could not be read."""

    row: int
    state: str
    record: Record | None
    reason: str = ""
    detail: str = ""


def chunk_path(out: Path, stage: str, source: str, chunk: int) -> Path:
    return out / "work" / f"stage_{stage}" / source / f"{chunk:06d}.parquet"


def write_chunk(path: Path, entries: Sequence[Entry]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".part{os.getpid()}")
    pq.write_table(pa.Table.from_pylist([_line(entry) for entry in entries], schema=_SCHEMA), part)
    os.replace(part, path)


def read_chunk(path: Path) -> list[Entry] | None:
    """None where it is not finished, or can't be read: it is made again."""
    try:
        lines = pq.read_table(path).to_pylist()
    except (OSError, pa.ArrowException):
        return None
    return [_entry(line) for line in lines]


def read_states(path: Path) -> dict[int, str] | None:
    """The state of each of its rows, without reading anything else; None as `read_chunk`."""
    try:
        table = pq.read_table(path, columns=["row", "state"])
    except (OSError, pa.ArrowException):
        return None
    return dict(zip(table.column("row").to_pylist(), table.column("state").to_pylist(), strict=True))


def _line(entry: Entry) -> dict[str, Any]:
    line = {"row": entry.row, "state": entry.state, "reason": entry.reason, "detail": entry.detail}
    if (record := entry.record) is not None:
        steps = [{"reasoning": s.reasoning, "name": s.call.name, "arguments": json.dumps(s.call.arguments),
                  "observation": s.observation.text, "images": list(s.observation.images)} for s in record.steps]
        line |= {"source": record.source, "system": record.system, "question": record.question, "images": list(record.images),
                 "steps": steps, "reasoning": record.reasoning, "answer": record.answer, "truth": record.truth,
                 "extra": json.dumps(record.extra, sort_keys=True)}
    return line


def _entry(line: dict[str, Any]) -> Entry:
    record = None
    if line["source"] is not None:
        steps = tuple(Step(s["reasoning"], ParsedCall(s["name"], json.loads(s["arguments"])),
                           Observation(s["observation"], tuple(s["images"]))) for s in line["steps"])
        record = Record(line["source"], line["row"], line["system"], line["question"], tuple(line["images"]), steps,
                        line["reasoning"], line["answer"], line["truth"], json.loads(line["extra"]))
    return Entry(line["row"], line["state"], record, line["reason"], line["detail"])
