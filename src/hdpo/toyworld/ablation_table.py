"""What an ablation says: figures of each arm with intervals, and each arm against HDPO on the same questions and seeds.

Two questions are kept apart. Over questions the trained models are fixed: the interval of a figure is Wilson's over all answers
of its seeds, the p-value McNemar's over the pairs of answers to one question of one seed. Over seeds a training is one draw:
the interval of the difference is Student's over the seeds' differences, which with three seeds is honest and wide.
"""
from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from hdpo.evaluation.statistics import Comparison, Estimate, compare, estimate

HDPO = "hdpo-0.15"
"""The arm that all others are set against."""

Answer = Sequence[Any]
"""(correct, calls, need: True, False or None)"""

MEASURES: dict[str, tuple[Callable[[Answer], bool], Callable[[Answer], bool]]] = {
    "accuracy": (lambda answer: True, lambda answer: bool(answer[0])),
    "tool rate": (lambda answer: True, lambda answer: answer[1] > 0),
    "needed calls": (lambda answer: answer[2] is True, lambda answer: answer[1] > 0),
    "calls where one may help": (lambda answer: answer[2] is None, lambda answer: answer[1] > 0),
    "blind calls": (lambda answer: answer[2] is False, lambda answer: answer[1] > 0),
}
"""Name -> (which answers count, what is counted among them)."""


@dataclass(frozen=True, slots=True)
class Result:
    """One arm and seed. `answers` and `plain` are {question: Answer}; plain ones, of SFT alone, were offered no tool."""

    arm: str
    seed: int
    seconds: float
    curve: tuple[dict[str, Any], ...]
    answers: dict[str, Answer]
    plain: dict[str, Answer]

    @classmethod
    def read(cls, path: Path) -> Result:
        found = json.loads(path.read_text())
        return cls(found["arm"], found["seed"], found["seconds"], tuple(found["curve"]), found["answers"], found["plain"])

    def share(self, measure: str) -> float:
        """Over this seed's answers; nan over none."""
        counts, hit = MEASURES[measure]
        values = [hit(answer) for answer in self.answers.values() if counts(answer)]
        return fmean(values) if values else math.nan


@dataclass(frozen=True, slots=True)
class Difference:
    """An arm minus HDPO in one measure: over pairs of answers, and over seeds (interval and p None with one seed)."""

    questions: Comparison
    seeds: tuple[float, ...]
    interval: tuple[float, float] | None
    p: float | None

    def record(self) -> dict[str, Any]:
        return {"questions": self.questions.record(), "by_seed": self.seeds, "ci95_over_seeds": self.interval,
                "p_over_seeds": self.p}


@dataclass(frozen=True, slots=True)
class Row:
    """One arm over its seeds."""

    arm: str
    results: tuple[Result, ...]
    figures: dict[str, Estimate]
    against: dict[str, Difference]

    def record(self) -> dict[str, Any]:
        return {
            "seeds": [result.seed for result in self.results], "seconds": sum(result.seconds for result in self.results),
            "figures": {name: {**figure.record(), "ci95": figure.interval, "by_seed": [r.share(name) for r in self.results]}
                        for name, figure in self.figures.items()},
            "minus_hdpo": {name: difference.record() for name, difference in self.against.items()}}


@dataclass(frozen=True, slots=True)
class Table:
    rows: tuple[Row, ...]
    plain: Estimate         # accuracy of SFT where no tool is offered

    def record(self) -> dict[str, Any]:
        return {"against": HDPO, "sft_without_tools": {**self.plain.record(), "ci95": self.plain.interval},
                "arms": {row.arm: row.record() for row in self.rows}}

    def cells(self) -> list[list[str]]:
        """Header and rows, for Markdown and the page."""
        lines = [["arm", "seeds", *MEASURES, "accuracy - HDPO (p)", "needed - HDPO (p)", "blind - HDPO (p)",
                  "over seeds, accuracy"]]
        for row in self.rows:
            cells = [row.arm, str(len(row.results)), *(_figure(row.figures[name]) for name in MEASURES)]
            for name in ("accuracy", "needed calls", "blind calls"):
                cells.append(_difference(row.against.get(name)))
            seeds = row.against.get("accuracy")
            cells.append("-" if seeds is None or seeds.interval is None else
                         f"{100 * fmean(seeds.seeds):+.1f} [{100 * seeds.interval[0]:+.1f}, {100 * seeds.interval[1]:+.1f}]")
            lines.append(cells)
        return lines

    def markdown(self) -> str:
        header, *rows = self.cells()
        lines = [header, ["---"] * len(header), *rows]
        text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
        if self.plain.score is not None:
            text += f"\nAfter SFT, asked without offering a tool: accuracy {_figure(self.plain)} %.\n"
        return text


def _figure(figure: Estimate) -> str:
    if figure.score is None or figure.interval is None:
        return "-"
    return f"{100 * figure.score:.1f} [{100 * figure.interval[0]:.1f}, {100 * figure.interval[1]:.1f}]"


def _difference(difference: Difference | None) -> str:
    if difference is None or difference.questions.difference is None or difference.questions.p is None:
        return "-"
    return f"{100 * difference.questions.difference:+.1f} ({difference.questions.p:.2g})"


def table(results: Sequence[Result]) -> Table:
    """Rows in the order in which arms first appear."""
    arms: dict[str, list[Result]] = {}
    for result in results:
        arms.setdefault(result.arm, []).append(result)
    rows = []
    for arm, found in arms.items():
        against = {} if arm == HDPO else {
            name: difference for name in MEASURES if (difference := subtract(found, arms.get(HDPO, []), name)) is not None}
        rows.append(Row(arm, tuple(found), {name: _pooled(found, name) for name in MEASURES}, against))
    plain = [float(bool(answer[0])) for result in results for answer in result.plain.values()]
    return Table(tuple(rows), estimate(plain))


def _pooled(results: Sequence[Result], measure: str) -> Estimate:
    counts, hit = MEASURES[measure]
    return estimate([float(hit(answer)) for result in results for answer in result.answers.values() if counts(answer)])


def subtract(results: Sequence[Result], others: Sequence[Result], measure: str) -> Difference | None:
    """`results` minus `others` over the seeds and questions that both have; None where they share none."""
    counts, hit = MEASURES[measure]
    first: list[float] = []
    second: list[float] = []
    clusters, seeds = [], []
    by_seed = {other.seed: other for other in others}
    for result in results:
        other = by_seed.get(result.seed)
        shared = [key for key, answer in result.answers.items() if other and key in other.answers and counts(answer)]
        if other is None or not shared:
            continue
        ours, theirs = ([float(hit(one.answers[key])) for key in shared] for one in (result, other))
        first += ours
        second += theirs
        clusters += [f"{result.seed}/{key}" for key in shared]
        seeds.append(fmean(ours) - fmean(theirs))
    if not first:
        return None
    interval, p = student(seeds)
    return Difference(compare(first, second, clusters), tuple(seeds), interval, p)


def student(differences: Sequence[float]) -> tuple[tuple[float, float] | None, float | None]:
    """95 % interval of the mean and two-sided p-value of a paired t-test; (None, None) for fewer than two, or without spread."""
    n = len(differences)
    if n < 2 or not (spread := stdev(differences)):
        return None, None
    from scipy.stats import t

    mean, error = fmean(differences), spread / math.sqrt(n)
    half = float(t.ppf(0.975, n - 1)) * error
    return (mean - half, mean + half), float(2 * t.sf(abs(mean) / error, n - 1))
