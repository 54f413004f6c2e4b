"""The three rewards of a trajectory, as pure functions, and the record that carries them.

Source: HDPO (arXiv 2604.08545) and its reference implementation:
    accuracy = 0.9 * [answer correct] + 0.1 * [format ok]
    tool     = 1 / (T + 1) if the answer is correct, else 0; T is the number of calls, or what reward.tool_cost makes of them
Format is judged on what the policy sampled, never on tool observations, which could hold tags of their own.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence

from hdpo.agent.parse import format_ok
from hdpo.config import RewardConfig
from hdpo.types import Judgement, Reward, Trajectory, Verdict


def format_reward(turns: Sequence[str]) -> float:
    """1 if the sampled turns keep the format (see `hdpo.agent.parse.format_ok`), else 0."""
    return float(format_ok(turns))


def accuracy_reward(answer_correct: float, format_ok: bool, answer_weight: float = 0.9, format_weight: float = 0.1) -> float:
    """In {0, 0.1, 0.9, 1} with the default weights; an own reward may grade the answer in between. A right
    answer counts in any format."""
    return answer_weight * answer_correct + format_weight * format_ok


def cost_of_calls(trajectory: Trajectory, costs: Mapping[str, float]) -> float:
    """T: what the policy's calls cost. A call costs what `costs` says of its tool, or of "*"; the paper's is 1. Calls that failed
    on our side cost nothing; one that can't be read has no tool."""
    other = costs.get("*", 1.0)
    return sum(costs.get(call.name, other) for call in trajectory.calls if not call.infrastructure)


def tool_reward(correct: bool, num_tool_calls: float) -> float:
    """In [0, 1]: 1 for a right answer without a call, 1/2 with one, ...; 0 for a wrong answer, however frugal."""
    return 1.0 / (num_tool_calls + 1) if correct else 0.0


def reward_of(trajectory: Trajectory, judgement: Judgement, config: RewardConfig) -> Reward:
    """The trajectory's rewards. It is unscored, with rewards of 0, if its end says nothing about the policy or no verdict
    could be had: `scored` keeps it out of both channels, so that these zeros are never compared with anything.
    """
    well_formed = format_ok(trajectory.turns)
    if not trajectory.end.scorable or judgement.verdict is Verdict.UNSCORED:
        return Reward(accuracy=0.0, tool=0.0, correct=False, format_ok=well_formed, scored=False)
    correct = judgement.verdict is Verdict.CORRECT
    answer = float(correct) if judgement.answer is None else judgement.answer
    accuracy = accuracy_reward(answer, well_formed, config.answer_weight, config.format_weight)
    return Reward(accuracy, tool_reward(correct, cost_of_calls(trajectory, config.tool_cost)), correct, well_formed, scored=True)
