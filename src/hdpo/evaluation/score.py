"""Scoring a file of answers: what `hdpo score` does once it has its options, without any model."""
from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hdpo.background import BackgroundLoop
from hdpo.errors import DataError
from hdpo.evaluation.arms import Samples, paired, tool_use, wisdom
from hdpo.evaluation.items import Benchmark, Item, Mark, Unit
from hdpo.evaluation.marking import audit_records, mark_all
from hdpo.evaluation.predictions import Prediction, read_predictions
from hdpo.evaluation.results import Result, record, result_of
from hdpo.evaluation.statistics import compare
from hdpo.protocols import Judge


@dataclass(slots=True)
class Scoring:
    """Everything one scoring found: records by benchmark, the comparison with another run, what judges were asked."""

    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    against: dict[str, dict[str, Any]] = field(default_factory=dict)
    overall: dict[str, Any] = field(default_factory=dict)     # tool use and wisdom over all benchmarks
    audit: list[dict[str, Any]] = field(default_factory=list)
    marks: dict[str, dict[str, Sequence[Mark]]] = field(default_factory=dict)


def place_of(benchmark: Benchmark, data: Path) -> Path | str:
    """FOLDER/NAME, or the dataset that `data` names where there is no such folder."""
    text = str(data)
    return text if not data.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", text) else data / benchmark.name


def read_items(benchmark: Benchmark, data: Path) -> dict[str, Item]:
    """Every published row by id, without its picture. Raises DataError for a folder without rows."""
    items = {item.id: item for item in benchmark.items(place_of(benchmark, data))}
    if not items:
        raise DataError(f"{place_of(benchmark, data)}: the published files hold no rows")
    return items


def ids(benchmarks: Sequence[Benchmark], data: Path) -> Iterator[str]:
    for benchmark in benchmarks:
        for item in benchmark.items(place_of(benchmark, data)):
            yield item.id


def score(benchmarks: Sequence[Benchmark], data: Path, predictions: Path, *, judge: Judge | None = None,
          background: BackgroundLoop | None = None, against: Path | None = None, rules_only: bool = False,
          settings: Mapping[str, Any] | None = None, items: Mapping[str, Mapping[str, Item]] | None = None) -> Scoring:
    """Figures of the answers in `predictions`. `items`: the rows by benchmark where they have been read already.

    Raises DataError for what can't be read, UserError for a missing judge.
    """
    scoring = Scoring()
    questions: list[Samples] = []
    answers: dict[str, list[Prediction]] = {}
    for benchmark in benchmarks:
        rows = items[benchmark.name] if items is not None else read_items(benchmark, data)
        result = _result(benchmark, rows, predictions, judge, background, rules_only, settings)
        scoring.records[benchmark.name] = record(result)
        scoring.marks[benchmark.name] = {arm: found.marks for arm, found in result.arms.items()}
        questions += paired(scoring.marks[benchmark.name], {arm: found.predictions for arm, found in result.arms.items()})
        for arm, found in result.arms.items():
            answers.setdefault(arm, []).extend(found.predictions)
        for arm, found in result.arms.items():
            scoring.audit += audit_records(benchmark, arm, found.marks)
        if against is not None:
            other = _result(benchmark, rows, against, judge, background, rules_only)
            scoring.against[benchmark.name] = compared(benchmark, result, other)
    scoring.overall = {"tool_use": {arm: tool_use(found) for arm, found in answers.items()},
                       **({"wisdom": wisdom(questions)} if questions else {})}
    return scoring


def _result(benchmark: Benchmark, items: Mapping[str, Item], file: Path, judge: Judge | None,
            background: BackgroundLoop | None, rules_only: bool, settings: Mapping[str, Any] | None = None) -> Result:
    found = read_predictions(file, benchmark.name, items)
    marks = {arm: mark_all(benchmark, items, answers, judge, background, rules_only=rules_only) for arm, answers in found.items()}
    return result_of(benchmark, items, marks, found, settings)


def compared(benchmark: Benchmark, first: Result, second: Result) -> dict[str, Any]:
    """The paired comparison of the main arms, over the units that both have."""
    pairs = [{unit.id: unit for unit in benchmark.units(result.arms[result.main].marks)} for result in (first, second)]
    common: list[tuple[Unit, Unit]] = [(unit, pairs[1][name]) for name, unit in pairs[0].items() if name in pairs[1]]
    found = compare([a.value for a, _ in common], [b.value for _, b in common], [a.cluster for a, _ in common])
    return {**found.record(), "notes": []}


def audit_lines(records: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in records)
