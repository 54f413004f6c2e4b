"""Marks of one benchmark -> the record that JSON, table and comparison are made of."""
from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hdpo.evaluation.arms import paired, tool_use, wisdom
from hdpo.evaluation.items import Benchmark, Figures, Item, Mark
from hdpo.evaluation.predictions import TOOLS, Prediction
from hdpo.evaluation.statistics import Estimate

SHOWN = 5     # ids named in a note


@dataclass(frozen=True, slots=True)
class ArmResult:
    """One arm's answers: their marks and figures, and what they say about tools."""

    marks: Sequence[Mark]
    figures: Figures
    predictions: Sequence[Prediction]

    @property
    def unparsed(self) -> int:
        return sum(mark.unparsed for mark in self.marks)

    @property
    def unscored(self) -> int:
        return sum(mark.correct is None for mark in self.marks)


@dataclass(frozen=True, slots=True)
class Result:
    benchmark: Benchmark
    arms: Mapping[str, ArmResult]
    rows: int                      # published rows that have an answer to compare with
    dropped: Sequence[Item]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def main(self) -> str:
        """The arm whose figures are the benchmark's: with tools, if there is one."""
        return TOOLS if TOOLS in self.arms else next(iter(self.arms))

    def missing(self, arm: str) -> list[str]:
        """Notes on what the figures leave out, each one line."""
        answered = {mark.item.id for mark in self.arms[arm].marks}
        notes = [f"{item.id}: left out, {item.dropped}" for item in self.dropped[:SHOWN]]
        if len(self.dropped) > SHOWN:
            notes.append(f"{len(self.dropped)} rows in all are left out")
        if len(answered) < self.rows:
            notes.append(f"{self.rows - len(answered)} of {self.rows} rows have no answer and are left out")
        return notes + list(self.arms[arm].figures.notes)


def result_of(benchmark: Benchmark, items: Mapping[str, Item], marks: Mapping[str, Sequence[Mark]],
              predictions: Mapping[str, Sequence[Prediction]], settings: Mapping[str, Any] | None = None) -> Result:
    arms = {arm: ArmResult(found, benchmark.figures(found), predictions[arm]) for arm, found in marks.items()}
    dropped = [item for item in items.values() if item.dropped]
    return Result(benchmark, arms, len(items) - len(dropped), dropped, settings or {})


def record(result: Result) -> dict[str, Any]:
    """What --json holds of a benchmark: the main arm's figures, and every arm's under "arms" where there are several."""
    found = arm_record(result, result.main)
    pairs = paired({arm: r.marks for arm, r in result.arms.items()}, {arm: r.predictions for arm, r in result.arms.items()})
    if pairs:
        found["wisdom"] = wisdom(pairs)
    if len(result.arms) > 1:
        found["arms"] = {arm: arm_record(result, arm) for arm in result.arms}
    return found


def arm_record(result: Result, name: str) -> dict[str, Any]:
    arm = result.arms[name]
    figures, score = arm.figures, arm.figures.score
    by = Counter(mark.by for mark in arm.marks)
    return {
        "score": score.score, "n": score.n, "se": score.se, "ci95": list(score.interval) if score.interval else None,
        "unparsed": arm.unparsed, "unscored": arm.unscored,
        "variants": {name: estimate.score for name, estimate in figures.variants.items()},
        "parts": {name: estimate.record() for name, estimate in figures.parts.items()},
        "arm": name, "rows": result.rows, "answers": len(arm.marks), "samples": 1 + max((m.sample for m in arm.marks), default=0),
        "clusters": score.clusters, "detectable": score.detectable, "by": dict(sorted(by.items())),
        "variant_intervals": {name: _interval(estimate) for name, estimate in figures.variants.items()},
        "tool_use": tool_use(arm.predictions), "notes": result.missing(name), "prompt_version": result.benchmark.prompt_version,
        **figures.extra, **({"settings": dict(result.settings)} if result.settings else {})}


def _interval(estimate: Estimate) -> list[float] | None:
    return list(estimate.interval) if estimate.interval else None


def write_json(path: Path, found: Mapping[str, Any]) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
