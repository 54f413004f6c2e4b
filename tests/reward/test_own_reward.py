"""reward.function: three values, a failing function is unscored and counted, and calls cost what the configuration says."""
from __future__ import annotations

import math
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from hdpo import oddities
from hdpo.background import BackgroundLoop
from hdpo.config import RewardConfig
from hdpo.errors import ConfigError
from hdpo.own import Graded, Rollout
from hdpo.reward.rewards import cost_of_calls
from hdpo.reward.scoring import Scorer
from hdpo.types import EndReason, RewardedGroup, Task, ToolCall, Trajectory, Verdict

TURN = "<reason>r</reason><answer>4</answer>"


def trajectory(turn: str = TURN, end: EndReason = EndReason.ANSWERED, calls: tuple[ToolCall, ...] = ()) -> Trajectory:
    task = Task("t", "toy", [{"role": "user", "content": "2+2?"}], (b"png",), "4", {"index": 7})
    return Trajectory(task, 0, [1], [1], [0.0], 0, (), calls, end, (turn,))


def scored(function: Callable[[Rollout], Any], background: BackgroundLoop, *trajectories: Trajectory,
           **config: Any) -> RewardedGroup:
    module = types.ModuleType("own_reward_under_test")
    module.score = function      # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    scorer = Scorer(RewardConfig(function="own_reward_under_test:score", **config), None, background)
    try:
        (group,) = scorer.score([trajectories])
        return group
    finally:
        scorer.close()


@pytest.mark.parametrize(("given", "verdict", "accuracy"), [
    (True, Verdict.CORRECT, 1.0), (False, Verdict.WRONG, 0.1), (None, Verdict.UNSCORED, 0.0),
    (np.bool_(True), Verdict.CORRECT, 1.0),
    (Graded(True, 0.5), Verdict.CORRECT, 0.55), (Graded(False, 0.5), Verdict.WRONG, 0.55), (Graded(True), Verdict.CORRECT, 1.0),
    (Graded(None, 0.5), Verdict.UNSCORED, 0.0)])
def test_a_function_says_one_of_three_values_and_may_grade(given: Any, verdict: Verdict, accuracy: float,
                                                           background: BackgroundLoop) -> None:
    group = scored(lambda rollout: given, background, trajectory())
    (judgement,), (reward,) = group.judgements, group.rewards
    assert judgement.verdict is verdict and judgement.by == "own" and reward.accuracy == pytest.approx(accuracy)
    assert (reward.scored, reward.correct) == (verdict is not Verdict.UNSCORED, verdict is Verdict.CORRECT)
    assert reward.tool == (1.0 if verdict is Verdict.CORRECT else 0.0)


async def _hangs(rollout: Rollout) -> bool:
    threading.Event().wait(5)
    return True


@pytest.mark.parametrize("function", [
    lambda rollout: 1 / 0, lambda rollout: 1.0, lambda rollout: 1, lambda rollout: "yes", lambda rollout: Graded(True, 2.0),
    lambda rollout: Graded(True, math.nan), lambda: True, lambda rollout: Graded(True, "x"),
    lambda rollout: threading.Event().wait(5), _hangs])
def test_a_function_that_fails_leaves_its_rollout_unscored_and_counted_never_wrong(
        function: Callable[..., Any], background: BackgroundLoop) -> None:
    oddities.take()
    group = scored(function, background, trajectory(), function_timeout_s=0.5)
    assert group.judgements[0].verdict is Verdict.UNSCORED and not group.rewards[0].scored and group.judgements[0].detail
    assert oddities.take() == {"odd/reward/own_failed": 1.0}


def test_a_function_sees_the_whole_rollout_and_only_what_says_something_about_the_policy(background: BackgroundLoop) -> None:
    seen = list[Rollout]()

    async def score(rollout: Rollout) -> bool:
        seen.append(rollout)
        return True
    group = scored(score, background, trajectory(), trajectory("no answer", EndReason.UNPARSEABLE),
                   trajectory(end=EndReason.INFRASTRUCTURE))
    assert [j.verdict for j in group.judgements] == [Verdict.CORRECT, Verdict.CORRECT, Verdict.UNSCORED]
    first, second = seen
    assert (first.question, first.answer, first.ground_truth, first.end) == ("2+2?", "4", "4", "answered")
    assert first.extra == {"index": 7}
    assert second.answer is None and second.turns == ("no answer",) and not second.format_ok and first.format_ok


def test_a_missing_function_is_named_before_anything_runs(background: BackgroundLoop) -> None:
    with pytest.raises(ConfigError, match="reward.function: json has no function nope"):
        Scorer(RewardConfig(function="json:nope"), None, background)


def test_calls_cost_what_the_configuration_says_and_one_each_by_default() -> None:
    calls = (ToolCall("python", {}, True, ""), ToolCall("search", {}, True, ""), ToolCall("", {}, False, ""),
             ToolCall("python", {}, False, "", infrastructure=True))
    rollout = trajectory(calls=calls)
    assert cost_of_calls(rollout, {}) == rollout.num_tool_calls == 3
    assert cost_of_calls(rollout, {"python": 0, "*": 2}) == 4 and cost_of_calls(rollout, {"search": 0.25}) == 2.25
