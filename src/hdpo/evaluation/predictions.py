"""Answers to a benchmark's questions, one JSON object a line: {"id", "answer", "calls", "arm", "sample", ...}.

`id` and `answer` suffice. `arm` names how the answer was made ("tools" by default), `sample` numbers repeated answers.
`benchmark` says which one is meant where one file answers several. A line with `error` has no answer for reasons that are
not the model's: it is unscored. What `hdpo eval` writes has more keys, which are ignored here or counted (tools, failed).
"""
from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hdpo.errors import DataError, boundary

TOOLS, NO_TOOLS = "tools", "no_tools"


@dataclass(frozen=True, slots=True)
class Prediction:
    id: str
    answer: str | None
    calls: int | None = None
    arm: str = TOOLS
    sample: int = 0
    tools: tuple[str, ...] = ()     # the tools called, by name
    failed: int = 0                 # calls that failed
    error: str = ""
    benchmark: str = ""


Predictions = Mapping[str, list[Prediction]]
"""arm -> its predictions, in the order of the file."""


def read_predictions(file: Path, benchmark: str, ids: Mapping[str, Any]) -> dict[str, list[Prediction]]:
    """The lines of `file` for `benchmark`, by arm. Raises DataError naming the line for one that can't be used.

    A line that names no benchmark is for every one that has its id.
    """
    found: dict[str, list[Prediction]] = {}
    seen: set[tuple[str, str, int]] = set()
    foreign = ""
    for number, prediction in _lines(file):
        if prediction.benchmark not in ("", benchmark):
            continue
        if prediction.id not in ids:
            if prediction.benchmark:
                raise DataError(f"{file} line {number}: {benchmark} has no row {prediction.id!r}; `hdpo score --ids` lists them")
            foreign = foreign or f"line {number}: {benchmark} has no row {prediction.id!r}"
            continue
        key = (prediction.arm, prediction.id, prediction.sample)
        if key in seen:
            raise DataError(f"{file} line {number}: a second answer to {prediction.id!r} (arm {prediction.arm}, sample "
                            f"{prediction.sample}); number repeated answers with \"sample\"")
        seen.add(key)
        found.setdefault(prediction.arm, []).append(prediction)
    if not found:
        raise DataError(f"{file}: no answer to any row of {benchmark}{f' ({foreign})' if foreign else ''}; "
                        "`hdpo score --ids` lists its ids")
    return found


def _lines(file: Path) -> Iterator[tuple[int, Prediction]]:
    with boundary(DataError, f"--predictions {file}: not readable", OSError, UnicodeDecodeError), file.open(
            encoding="utf-8-sig") as handle:
        for number, line in enumerate(handle, 1):
            if line.strip():
                yield number, _prediction(line, f"{file} line {number}")


def _prediction(line: str, where: str) -> Prediction:
    try:
        found = json.loads(line)
    except ValueError as exc:
        raise DataError(f"{where}: not valid JSON ({exc})") from None
    if not isinstance(found, dict) or "id" not in found:
        raise DataError(f'{where}: not an object with "id" and "answer"')
    if "answer" not in found and not found.get("error"):
        raise DataError(f'{where}: "answer" is missing (null is an answer that was not given)')
    answer, calls, sample = found.get("answer"), found.get("calls"), found.get("sample") or 0
    for name, value in (("calls", calls), ("sample", sample)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            raise DataError(f'{where}: "{name}" must be a whole number from 0, not {value!r}')
    if answer is not None and not isinstance(answer, str):
        answer = json.dumps(answer, ensure_ascii=False)
    return Prediction(
        str(found["id"]), answer, calls, str(found.get("arm") or TOOLS), sample, tuple(
            map(str, found.get("tools") or ())), int(found.get("failed") or 0),
        str(found.get("error") or ""), str(found.get("benchmark") or ""))
