"""Error bars: the formulas by hand, and what the intervals promise, by simulation."""
from __future__ import annotations

import math
import random

import pytest

from hdpo.evaluation.arms import HALVES, Samples, tool_use, wisdom
from hdpo.evaluation.predictions import Prediction
from hdpo.evaluation.statistics import compare, estimate, mcnemar, wilson


def test_the_standard_error_of_single_questions_is_binomial():
    found = estimate([1.0] * 30 + [0.0] * 10)
    assert found.score == 0.75 and found.se == pytest.approx(math.sqrt(0.75 * 0.25 / 40)) and found.clusters == 40
    assert found.interval == pytest.approx(wilson(0.75, 40)) and found.interval == pytest.approx((0.5981, 0.8581), abs=1e-4)


def test_rows_that_stand_or_fall_together_count_once():
    alone = estimate([1.0, 0.0, 1.0, 1.0])
    fourfold = estimate([1.0] * 4 + [0.0] * 4 + [1.0] * 8, [str(k // 4) for k in range(16)])
    assert fourfold.score == alone.score and fourfold.se == pytest.approx(alone.se) and fourfold.clusters == 4
    assert fourfold.interval == pytest.approx(alone.interval), "four copies of a row say what one says"


def test_nothing_wrong_is_not_certainty():
    found = estimate([1.0] * 12, [str(k // 4) for k in range(12)])
    assert found.se == 0 and found.interval[0] == pytest.approx(wilson(1.0, 3)[0]) and found.interval[1] == pytest.approx(1.0)
    assert estimate([]).score is None


def test_mcnemar_is_exact():
    assert mcnemar(0, 0) == 1.0 and mcnemar(5, 5) == 1.0
    assert mcnemar(1, 9) == pytest.approx(2 * (1 + 10) / 1024) and mcnemar(9, 1) == mcnemar(1, 9)


def test_two_runs_are_compared_question_by_question():
    first, second = [1.0] * 9 + [0.0] * 31, [0.0] * 8 + [1.0] * 2 + [0.0] * 30
    found = compare(first, second, [str(k) for k in range(40)])
    assert (found.won, found.lost, found.difference) == (8, 1, pytest.approx(7 / 40)) and found.p == pytest.approx(mcnemar(8, 1))
    assert found.interval[0] < 7 / 40 < found.interval[1] and found.test.startswith("McNemar") and 0 < found.detectable < 1
    assert compare(first, first, [str(k) for k in range(40)]).p == 1.0
    clustered = compare(first, second, [str(k // 4) for k in range(40)])
    assert clustered.test == "sign flips of 10 clusters" and clustered.p > found.p, "what comes in clusters is less surprising"


def test_tool_use_counts_attempts_and_not_what_failed_for_our_reasons():
    use = tool_use([Prediction("1", "A", 2, tools=("python", ""), failed=1), Prediction("2", "B", 0),
                    Prediction("3", None, 1, error="x"),
                    Prediction("4", "C", None), Prediction("5", "C", 1, tools=("python",))])
    assert use["answers"] == 3 and use["tool_rate"] == pytest.approx(2 / 3) and use["calls_per_question"] == 1.0
    assert use["by_tool"] == {"python": pytest.approx(2 / 3), "unparseable": pytest.approx(1 / 3)}
    assert use["failed_share"] == pytest.approx(1 / 3)


# -- a policy whose every probability is known -----------------------------------------------------------------------------

QUESTIONS, REPEATS, SAMPLES = 150, 500, 8
KINDS = ((0.02, 0.95, 0.7), (0.97, 0.97, 0.3), (0.5, 0.6, 0.5), (0.05, 0.9, 0.3))
"""(success without a call, success with one, probability of a call) of each kind of question; all kinds are as frequent."""


def _question(number: int, generator: random.Random) -> Samples:
    without, with_call, call = generator.choice(KINDS)
    samples = Samples(str(number))
    for sample in range(SAMPLES):
        samples.without[sample] = generator.random() < without
        samples.called[sample] = generator.random() < call
        samples.with_tools[sample] = generator.random() < (with_call if samples.called[sample] else without)
    return samples


def _truth(name: str) -> float:
    """Over very many questions: the calls of one half, in questions that the other half says are so."""
    generator, calls, number = random.Random(7), 0.0, 0
    for _ in range(40_000):
        without, with_call, call = generator.choice(KINDS)
        half = [generator.random() < call for _ in range(SAMPLES // 2)]
        p1 = [generator.random() < (with_call if called else without) for called in half]
        p0 = [generator.random() < without for _ in range(SAMPLES // 2)]
        needed, unneeded = not any(p0) and sum(p1) >= 0.5 * len(p1), all(p0)
        if needed if name == "needed_call" else unneeded:
            calls, number = calls + call, number + 1
    return calls / number


def _coverage(names: tuple[str, ...], ways, repeats: int = REPEATS) -> dict[str, float]:
    truths, covered = {name: _truth(name) for name in names}, dict.fromkeys(names, 0)
    for repeat in range(repeats):
        generator = random.Random(repeat)
        questions = [_question(number, generator) for number in range(QUESTIONS)]
        found = wisdom(questions, ways, seed=repeat)
        for name in names:
            low, high = found[f"{name}_ci95"]
            covered[name] += low <= truths[name] <= high
    return {name: count / repeats for name, count in covered.items()}


def _all(sample: int) -> bool:
    return sample % 2 == 0


def test_intervals_of_wise_calls_cover_the_truth_as_often_as_they_claim():
    for name, share in _coverage(("needed_call", "blind_call"), HALVES).items():
        assert 0.92 <= share <= 0.98, name      # 0.95 give or take three standard errors of 500 repeats


def test_a_sample_that_says_a_call_was_needed_must_not_be_counted():
    same = ((_all, _all),)
    assert _coverage(("needed_call",), same, repeats=100)["needed_call"] < 0.7, "a call that helped makes its question needed"


def test_without_a_second_sample_nothing_is_said_about_needed_calls():
    question = Samples("1", {0: False}, {0: True}, {0: True})
    found = wisdom([question])
    assert "needed_call" not in found and found["rescued"] == 1 and found["needed"] == 1.0 and not found["split_samples"]
