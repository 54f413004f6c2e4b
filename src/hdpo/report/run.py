"""A run's own record: a row of metrics per step, and what its evaluations found."""
from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hdpo.errors import DataError
from hdpo.evaluation.evaluate import Summary
from hdpo.train.jsonl import read_metrics

_ORDER = {"sft": 0, "rl": 2, "no_tools": 0, "tools": 2}


@dataclass(frozen=True, slots=True)
class Run:
    folder: Path
    metrics: list[dict[str, Any]]       # a row per step
    summaries: dict[str, Summary]       # stages in the order of training

    @property
    def name(self) -> str:
        return self.folder.resolve().name


def read_run(folder: Path) -> Run:
    """Raises DataError when there is neither a summary nor a metric."""
    run = Run(folder, _by_step(read_metrics(folder / "metrics.jsonl")), _read_summary(folder / "summary.json"))
    if not run.metrics and not run.summaries:
        raise DataError(f"{folder}: no metrics.jsonl and no summary.json to report on")
    return run


def _read_summary(path: Path) -> dict[str, Summary]:
    """Stages in the order of training, whichever was evaluated first."""
    try:
        found = json.loads(path.read_text())
        return {stage: found[stage] for stage in sorted(found, key=lambda stage: _ORDER.get(stage, 1))}
    except FileNotFoundError:
        return {}
    except json.JSONDecodeError as exc:
        raise DataError(f"{path}: not valid JSON: {exc.msg}") from None


def _by_step(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per step: an evaluation writes a line of its own beside that of the step it follows."""
    steps: dict[int, dict[str, Any]] = {}
    for row in rows:
        steps.setdefault(row["step"], {}).update(row)
    return [steps[step] for step in sorted(steps)]
