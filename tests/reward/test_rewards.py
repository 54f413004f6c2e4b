"""Rewards of one trajectory."""
from __future__ import annotations

import pytest

from hdpo.config import RewardConfig
from hdpo.reward.rewards import accuracy_reward, format_reward, reward_of, tool_reward
from hdpo.types import EndReason, Judgement, Task, ToolCall, Trajectory, Verdict

GOOD = "<reason>one plus one</reason><answer>2</answer>"
CALL = '<reason>compute</reason><tool_call>{"name": "python", "arguments": {"code": "1+1"}}</tool_call>'


def trajectory(turns=(GOOD,), calls=(), end=EndReason.ANSWERED):
    task = Task("t", "toy", [{"role": "user", "content": "1+1?"}], (), "2")
    return Trajectory(task, 0, [1], [1], [0.0], 0, (), tuple(calls), end, tuple(turns))


def call(infrastructure=False, ok=True):
    return ToolCall("python", {"code": "1+1"}, ok, "2", infrastructure=infrastructure)


def verdict(value):
    return Judgement(value, "rule")


@pytest.mark.parametrize("correct, ok, value", [(False, False, 0), (False, True, .1), (True, False, .9), (True, True, 1)])
def test_accuracy_reward_has_the_four_values_of_the_paper(correct, ok, value):
    assert accuracy_reward(correct, ok) == pytest.approx(value)


def test_tool_reward_halves_with_the_first_call_and_is_zero_for_a_wrong_answer():
    assert [tool_reward(True, t) for t in (0, 1, 3)] == [1.0, 0.5, 0.25]
    assert [tool_reward(False, t) for t in (0, 1, 3)] == [0.0, 0.0, 0.0]


def test_format_is_judged_over_all_sampled_turns():
    assert format_reward([CALL, GOOD]) == 1.0
    assert format_reward([CALL.replace("</tool_call>", ""), GOOD]) == 0.0
    assert format_reward(["no answer here"]) == 0.0
    assert format_reward([]) == 0.0


def test_an_answer_tag_in_an_observation_earns_no_format_reward():
    observed = ToolCall("python", {"code": "print('<answer>2</answer>')"}, True, "<answer>2</answer>")
    reward = reward_of(trajectory([CALL, "<reason>so</reason> 2"], [observed]), verdict(Verdict.WRONG), RewardConfig())
    assert not reward.format_ok and reward.accuracy == 0.0


def test_failed_calls_of_the_policy_count_and_calls_that_failed_on_our_side_do_not():
    calls = [call(), call(ok=False), call(infrastructure=True)]
    reward = reward_of(trajectory([CALL, CALL, CALL, GOOD], calls), verdict(Verdict.CORRECT), RewardConfig())
    assert reward.tool == pytest.approx(1 / 3)


def test_correct_is_a_field_and_does_not_depend_on_the_weights():
    config = RewardConfig(answer_weight=0.0, format_weight=0.0)
    reward = reward_of(trajectory(), verdict(Verdict.CORRECT), config)
    assert reward.correct and reward.scored and reward.accuracy == 0.0 and reward.tool == 1.0


@pytest.mark.parametrize("end", list(EndReason))
@pytest.mark.parametrize("given", list(Verdict))
def test_unscored_exactly_when_the_end_or_the_verdict_says_nothing_about_the_policy(end, given):
    reward = reward_of(trajectory(end=end), verdict(given), RewardConfig())
    assert reward.scored == (end.scorable and given is not Verdict.UNSCORED)
    assert reward.correct == (reward.scored and given is Verdict.CORRECT)
    if not reward.scored:
        assert (reward.accuracy, reward.tool) == (0.0, 0.0)
