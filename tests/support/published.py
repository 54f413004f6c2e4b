"""Tiny synthetic copies of the benchmarks in their published layouts, and `hdpo score` on them. No row of a real one."""
from __future__ import annotations

import base64
import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from hdpo import errors
from hdpo.cli import main

Rows = list[dict[str, Any]]


def picture(shade: int = 0, size: tuple[int, int] = (64, 48)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (shade % 256, 90, 120)).save(buffer, "PNG")
    return buffer.getvalue()


def base64_picture(shade: int = 0) -> str:
    return base64.b64encode(picture(shade)).decode()


def tsv(path: Path, rows: Rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)


def parquet(path: Path, rows: Rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)


def as_json(path: Path, found: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, ensure_ascii=False), encoding="utf-8")


def json_lines(path: Path, rows: Rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def ids(name: str, data: Path, capsys: Any) -> list[str]:
    """What `hdpo score --ids` prints."""
    capsys.readouterr()
    assert main(["score", "--benchmarks", name, "--data", str(data), "--ids"]) == 0, capsys.readouterr().err
    return capsys.readouterr().out.split("\n")[:-1]


def scored(name: str, data: Path, answers: Any, capsys: Any, *options: str) -> dict[str, Any]:
    """What `hdpo score --json` writes of a benchmark. `answers`: one per row in the files' order (None: no line for the row),
    or finished prediction records."""
    work = data / ".work"
    if answers and isinstance(answers[0], dict):
        rows = answers
    else:
        names = ids(name, data, capsys)
        assert len(names) == len(answers), names
        rows = [{"id": row, "answer": answer} for row, answer in zip(names, answers, strict=True) if answer is not None]
    file = json_lines(work / "predictions.jsonl", rows)
    out = work / "out.json"
    status = main(["score", "--benchmarks", name, "--data", str(data), "--predictions", str(file), "--json", str(out), *options])
    assert status == 0, capsys.readouterr().err
    return json.loads(out.read_text())[name]


def refused(arguments: list[str], capsys: Any) -> str:
    """The one line that `hdpo` ends with, with status 2."""
    capsys.readouterr()
    errors._said.clear()         # a process says a thing once
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error, error
    return error
