"""What both arms together say about tool calls: was a call needed, was it made, did it help or harm?

p0 and p1 are a question's success without and with tools. A question is needed where p1 is at least NEEDED_P1 while nothing
succeeds without, unneeded where everything does, and undecidable otherwise. Which it is, and how often a tool was called,
come from different halves of the samples, both ways round: a sample that decides what is counted must not be counted, or the
rates come out as one hopes. With one sample an arm, only what needs no such split is reported.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hdpo.evaluation.items import Mark
from hdpo.evaluation.predictions import NO_TOOLS, TOOLS, Prediction
from hdpo.evaluation.statistics import RESAMPLES, SEED, estimate, mcnemar, wilson

NEEDED_P1 = 0.5


@dataclass(slots=True)
class Samples:
    """One question's answers in both arms, by sample number: right without, right with, called with."""

    cluster: str
    without: dict[int, bool] = field(default_factory=dict)
    with_tools: dict[int, bool] = field(default_factory=dict)
    called: dict[int, bool] = field(default_factory=dict)

    def need(self, half: Callable[[int], bool]) -> str:
        """needed, unneeded or undecidable, by the samples of one half; "" where the half lacks an arm."""
        p0 = [right for sample, right in self.without.items() if half(sample)]
        p1 = [right for sample, right in self.with_tools.items() if half(sample)]
        if not p0 or not p1:
            return ""
        if all(p0):
            return "unneeded"
        return "needed" if not any(p0) and sum(p1) >= NEEDED_P1 * len(p1) else "undecidable"

    def rate(self, half: Callable[[int], bool]) -> float | None:
        calls = [call for sample, call in self.called.items() if half(sample)]
        return sum(calls) / len(calls) if calls else None


def tool_use(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Of one arm: share of answers with at least one attempted call, calls a question, by tool, share of calls that failed.

    Answers whose calls are not known, or that ended for our own reasons, are not counted.
    """
    counted = [p for p in predictions if p.calls is not None and not p.error]
    if not counted:
        return {"answers": 0, "tool_rate": None}
    called = estimate([float(bool(p.calls)) for p in counted], [p.id for p in counted])
    calls = sum(p.calls or 0 for p in counted)
    by_tool = Counter(name or "unparseable" for p in counted for name in p.tools)
    return {"answers": len(counted), "tool_rate": called.score, "tool_rate_ci95": list(called.interval or ()),
            "calls_per_question": calls / len(counted),
            "by_tool": {name: n / len(counted) for name, n in sorted(by_tool.items())},
            "failed_share": sum(p.failed for p in counted) / calls if calls else None}


def paired(marks: Mapping[str, Sequence[Mark]], predictions: Mapping[str, Sequence[Prediction]]) -> list[Samples]:
    """Questions that both arms have, with their scored samples."""
    found: dict[str, Samples] = {}
    for arm, place in ((NO_TOOLS, "without"), (TOOLS, "with_tools")):
        for mark in marks.get(arm, ()):
            if mark.correct is not None:
                samples = found.setdefault(mark.item.id, Samples(mark.item.cluster or mark.item.id))
                getattr(samples, place)[mark.sample] = mark.correct
    for prediction in predictions.get(TOOLS, ()):
        if prediction.calls is not None and not prediction.error and prediction.id in found:
            found[prediction.id].called[prediction.sample] = prediction.calls > 0
    return [samples for samples in found.values() if samples.without and samples.with_tools]


def _even(sample: int) -> bool:
    return sample % 2 == 0


def _odd(sample: int) -> bool:
    return sample % 2 == 1


HALVES = ((_even, _odd), (_odd, _even))
"""(samples that say what the question needs, samples whose calls are counted), both ways round."""


def wisdom(questions: Sequence[Samples], halves: Sequence[tuple[Callable[[int], bool], Callable[[int], bool]]] = HALVES,
           seed: int = SEED) -> dict[str, Any]:
    """Shares of needed, unneeded and undecidable questions, and the rates of calls in them, with 95 % intervals.

    Intervals come from RESAMPLES resamples of whole clusters. "needed_call" is P(call | needed), "missed_call" what is left
    of it, "blind_call" P(call | unneeded). "rescue" and "harm" are shares of questions that tools turned right and wrong, by
    the first sample, with McNemar's exact test.
    """
    split = all(len(q.without) > 1 and len(q.with_tools) > 1 for q in questions) if questions else False
    ways = halves if split else [(lambda sample: True, lambda sample: True)]
    names, places = np.unique(np.asarray([q.cluster for q in questions]), return_inverse=True)
    table = np.stack([np.bincount(places, column, len(names)) for column in _sums(questions, ways).T])
    weights = _resamples(len(names), seed)
    rates: dict[str, Any] = {"questions": len(questions), "seed": seed, "resamples": RESAMPLES, "split_samples": split}
    pairs = {"needed": (0, 3), "unneeded": (1, 3), "undecidable": (2, 3), "blind_call": (6, 7)}
    if split:
        pairs |= {"needed_call": (4, 5)}
    for name, (top, bottom) in pairs.items():
        rates[name], rates[f"{name}_ci95"] = _ratio(table[top], table[bottom], weights)
    if split and rates["needed_call"] is not None:
        low, high = rates["needed_call_ci95"]
        rates["missed_call"], rates["missed_call_ci95"] = 1 - rates["needed_call"], [1 - high, 1 - low]
    first = [(q.without[min(q.without)], q.with_tools[min(q.with_tools)]) for q in questions]
    rescued, harmed = sum(b and not a for a, b in first), sum(a and not b for a, b in first)
    rates |= {"rescue": rescued / len(first) if first else None, "harm": harmed / len(first) if first else None,
              "rescued": rescued, "harmed": harmed, "mcnemar_p": mcnemar(rescued, harmed),
              "p0": _mean(questions, "without"), "p1": _mean(questions, "with_tools")}
    return rates


def _sums(questions: Sequence[Samples], ways: Sequence[tuple[Callable[[int], bool], Callable[[int], bool]]]) -> np.ndarray:
    """[question, 8]: needed, unneeded, undecidable, all; calls and number where needed; the same where unneeded."""
    table = np.zeros((len(questions), 8))
    for row, question in zip(table, questions, strict=True):
        for decide, count in ways:
            need, rate = question.need(decide), question.rate(count)
            if not need:
                continue
            row[("needed", "unneeded", "undecidable").index(need)] += 1
            row[3] += 1
            if rate is not None and need != "undecidable":
                place = 4 if need == "needed" else 6
                row[place] += rate
                row[place + 1] += 1
    return table


def _resamples(clusters: int, seed: int) -> np.ndarray:
    """[RESAMPLES, clusters]: how often each is in each resample."""
    if not clusters:
        return np.zeros((RESAMPLES, 0))
    return np.random.default_rng(seed).multinomial(clusters, np.full(clusters, 1 / clusters), size=RESAMPLES)


def _ratio(tops: np.ndarray, bottoms: np.ndarray, weights: np.ndarray) -> tuple[float | None, list[float] | None]:
    """sum(tops) / sum(bottoms) over clusters, and its interval over resamples."""
    if not bottoms.sum():
        return None, None
    drawn = weights @ bottoms
    shares = (weights @ tops)[drawn > 0] / drawn[drawn > 0]
    share, (low, high) = float(tops.sum() / bottoms.sum()), np.quantile(shares, (0.025, 0.975))
    if low == high:     # nothing varies: resamples can't say how sure that is
        low, high = wilson(share, float((bottoms > 0).sum()))
    return share, [float(low), float(high)]


def _mean(questions: Sequence[Samples], arm: str) -> float | None:
    shares = [sum(values) / len(values) for q in questions if (values := list(getattr(q, arm).values()))]
    return sum(shares) / len(shares) if shares else None
