"""A run's own record: a row of metrics per step, and what its evaluations found."""
from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hdpo.errors import DataError
from hdpo.evaluation.evaluate import COLUMNS, Summary, table_rows
from hdpo.train.jsonl import read_metrics

_ORDER = {"sft": 0, "rl": 2, "no_tools": 0, "tools": 2}


@dataclass(frozen=True, slots=True)
class Run:
    folder: Path
    metrics: list[dict[str, Any]]       # a row per step
    summaries: dict[str, Summary]       # stages in the order of training
    left_out: list[str] = field(default_factory=list)      # what could not be read, a line each

    @property
    def name(self) -> str:
        return self.folder.resolve().name


def read_run(folder: Path) -> Run:
    """What can be read of it: a file that is torn or holds something else is named in `left_out`."""
    left_out: list[str] = []
    try:
        metrics = _by_step(read_metrics(folder / "metrics.jsonl", left_out))
    except DataError as exc:
        metrics = []
        left_out.append(str(exc))
    return Run(folder, metrics, _read_summary(folder / "summary.json", left_out), left_out)


def _read_summary(path: Path, left_out: list[str]) -> dict[str, Summary]:
    """Stages in the order of training, whichever was evaluated first."""
    try:
        found = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as exc:
        left_out.append(f"{path}: not readable: {exc}")
        return {}
    stages = found if isinstance(found, dict) else {"": found}
    usable = {stage: summary for stage, summary in stages.items() if _is_summary(summary)}
    left_out += [f"{path}: {stage or 'it'} is no summary of an evaluation" for stage in stages if stage not in usable]
    return {stage: usable[stage] for stage in sorted(usable, key=lambda stage: _ORDER.get(stage, 1))}


def _is_summary(value: Any) -> bool:
    try:
        return all(isinstance(part["rows"], int) and all(part.get(name) is None or _is_number(part[name]) for _, name in COLUMNS)
                   for _, part in table_rows(value))
    except (TypeError, KeyError, AttributeError):
        return False


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _by_step(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per step, of numbers alone: an evaluation writes a line of its own beside that of the step it follows."""
    steps: dict[int, dict[str, Any]] = {}
    for row in rows:
        steps.setdefault(row["step"], {}).update((name, value if _is_number(value) else None) for name, value in row.items())
    return [steps[step] for step in sorted(steps)]
