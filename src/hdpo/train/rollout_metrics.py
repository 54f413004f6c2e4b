"""Statistics of a step's trajectories, computed from small rows that ranks can gather.

Medians, shares and extremes of per-rank numbers are not those of the whole, so ranks exchange one `RolloutRow` per
trajectory (a few hundred bytes) and every statistic is computed from all of them. Names follow the reference where it
has one. "Needed" means the task is known to need a tool; a statistic over nothing is absent, never 0.
"""
from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from hdpo.types import EndReason, Judgement, Reward, RewardedGroup, Trajectory, Verdict

_SPREAD = 1e-5      # a group whose rewards differ by less gives no advantage


@dataclass(frozen=True, slots=True)
class RolloutRow:
    """What statistics need of one trajectory. Lengths are tokens; `calls` are the policy's, without our failures."""

    group: str                      # unique per group and step, over ranks
    data_source: str
    tool_needed: bool | None        # None: not known of this task
    end: EndReason
    calls: tuple[str, ...]          # tool name per call, "" where the call could not be parsed
    failed_calls: int
    infrastructure_calls: int
    num_turns: int
    prompt_length: int
    response_length: int            # with observations
    sampled_length: int             # without
    seconds: float
    verdict: Verdict
    by: str
    reward: Reward
    advantages: tuple[float, ...] = ()      # [C], empty outside training
    call_seconds: tuple[float, ...] = ()    # one per call

    @property
    def called(self) -> bool:
        return bool(self.calls)

    @property
    def decided(self) -> bool:
        """Whether the end says something about the policy: only these rows count in rates of tool use."""
        return self.end.scorable


def rollout_rows(groups: Sequence[RewardedGroup], *, rank: int = 0,
                 advantages: Sequence[Sequence[float]] | None = None) -> list[RolloutRow]:
    """One row per trajectory, in order. `advantages` [B][C] are in the same order (trajectories of group 0 first)."""
    rows: list[RolloutRow] = []
    for index, group in enumerate(groups):
        for trajectory, judgement, reward in zip(group.trajectories, group.judgements, group.rewards, strict=True):
            given = tuple(advantages[len(rows)]) if advantages is not None else ()
            rows.append(_row(f"{rank}/{index}", trajectory, judgement, reward, given))
    return rows


def _row(group: str, trajectory: Trajectory, judgement: Judgement, reward: Reward,
         advantages: tuple[float, ...]) -> RolloutRow:
    ours = [call for call in trajectory.calls if call.infrastructure]
    policys = [call for call in trajectory.calls if not call.infrastructure]
    return RolloutRow(
        group=group, data_source=trajectory.task.data_source, tool_needed=trajectory.task.tool_needed,
        end=trajectory.end, calls=tuple(call.name for call in policys), failed_calls=sum(not call.ok for call in policys),
        infrastructure_calls=len(ours), num_turns=len(trajectory.turns), prompt_length=trajectory.prompt_length,
        response_length=len(trajectory.token_ids) - trajectory.prompt_length, sampled_length=trajectory.num_sampled,
        seconds=trajectory.seconds, verdict=judgement.verdict, by=judgement.by, reward=reward, advantages=advantages,
        call_seconds=tuple(call.seconds for call in policys))


def behaviour(rows: Sequence[RolloutRow]) -> dict[str, float | None]:
    """Accuracy and tool use of any set of trajectories; None where there is nothing to count.

    accuracy: correct / scored. tool_rate: share with at least one call. blind_call_rate: called though not needed, and
    missed_call_rate: needed, not called and wrong, both as shares of all trajectories whose need is known, so that they
    add up to the share of bad decisions. Rows that failed for our own reasons count in `unscored` only.
    """
    scored = [row for row in rows if row.reward.scored]
    decided = [row for row in rows if row.decided]
    known = [row for row in decided if row.tool_needed is not None]
    return {
        "rows": len(rows),
        "accuracy": _share(scored, [row.reward.correct for row in scored]),
        "tool_rate": _share(decided, [row.called for row in decided]),
        "tool_rate_needed": _rate([row for row in known if row.tool_needed]),
        "tool_rate_not_needed": _rate([row for row in known if not row.tool_needed]),
        "calls_mean": _share(decided, [len(row.calls) for row in decided]),
        "blind_call_rate": _share(known, [row.called and not row.tool_needed for row in known]),
        "missed_call_rate": _share(
            known, [bool(row.tool_needed) and not row.called and row.verdict is Verdict.WRONG for row in known]),
        "unscored": _share(rows, [not row.reward.scored for row in rows]),
        "response_length": _share(decided, [row.response_length for row in decided]),
        "seconds": _share(decided, [row.seconds for row in decided]),
    }


def _rate(rows: Sequence[RolloutRow]) -> float | None:
    return _share(rows, [row.called for row in rows])


def _share(rows: Sequence[RolloutRow], values: Iterable[float]) -> float | None:
    return math.fsum(values) / len(rows) if rows else None     # fsum: the same for any order of rows


def rollout_scalars(rows: Sequence[RolloutRow], *, weights: tuple[float, float] = (1.0, 0.15)) -> dict[str, float]:
    """All scalars of one step's trajectories, over all ranks. `weights` are (w_acc, w_tool)."""
    scalars: dict[str, float] = {}
    scored = [row for row in rows if row.reward.scored]
    for name, values in (
            ("reward/accuracy", [float(row.reward.correct) for row in scored]),
            ("reward/answer_score", [float(row.reward.correct) for row in scored]),
            ("reward/format_score", [float(row.reward.format_ok) for row in scored]),
            ("reward/tool_score", [row.reward.tool for row in scored]),
            ("reward/num_turns", [float(len(row.calls)) for row in scored]),    # the reference's name for calls
            ("reward/score", [row.reward.accuracy for row in scored]),
            ("reward/correct_response_length", [float(row.response_length) for row in scored if row.reward.correct]),
            ("reward/wrong_response_length", [float(row.response_length) for row in scored if not row.reward.correct]),
            ("response_length", [float(row.response_length) for row in rows]),
            ("sampled_length", [float(row.sampled_length) for row in rows]),
            ("prompt_length", [float(row.prompt_length) for row in rows]),
            ("num_turns", [float(row.num_turns) for row in rows]),
            ("rollout_seconds", [row.seconds for row in rows])):
        scalars |= _mean_max_min(name, values)
    scalars |= _tool_scalars(rows) | _group_scalars(rows) | _advantage_scalars(scored, weights)
    if given := [row.advantages for row in rows if row.advantages]:
        scalars["hdpo/rows_with_signal"] = sum(map(any, given)) / len(given)
    if rows:
        scalars["perf/sampled_tokens"] = float(sum(row.sampled_length for row in rows))
        ends, judges = Counter(row.end for row in rows), Counter(row.by for row in rows)
        scalars |= {f"end/{end.value}": ends[end] / len(rows) for end in EndReason}
        scalars |= {f"score/by_{by}": judges[by] / len(rows) for by in ("rule", "judge", "cache")}
        scalars["score/unscored"] = 1 - len(scored) / len(rows)
        cut = ends[EndReason.MAX_TOKENS] + ends[EndReason.CONTEXT_FULL]
        scalars["response_length/clip_ratio"] = cut / len(rows)
    return scalars


def silence(scalars: Mapping[str, float]) -> str:
    """Why no rollout of a step can move the policy, from the step's scalars; empty when some can, or outside of training."""
    if scalars.get("hdpo/rows_with_signal", 1.0):
        return ""
    accuracy = scalars.get("reward/accuracy/mean")
    if accuracy is None:
        return "no rollout has a verdict"
    if accuracy == 0:
        ruled, answered = scalars["score/by_rule"], scalars["end/answered"]
        return f"no rollout is right ({ruled:.0%} decided by rules, {answered:.0%} hold an answer)"
    if accuracy == 1:
        return "every rollout is right, and within each group with as many calls"
    return "within each group all rollouts have the same reward"


def _mean_max_min(name: str, values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    return {f"{name}/mean": statistics.fmean(values), f"{name}/max": max(values), f"{name}/min": min(values)}


def _tool_scalars(rows: Sequence[RolloutRow]) -> dict[str, float]:
    names = {"tool_rate": "tool/rate", "tool_rate_needed": "tool/rate_needed", "calls_mean": "tool/calls_mean",
             "tool_rate_not_needed": "tool/rate_not_needed", "blind_call_rate": "tool/blind_call_rate",
             "missed_call_rate": "tool/missed_call_rate"}
    found = behaviour(rows)
    scalars = {name: value for key, name in names.items() if (value := found[key]) is not None}
    decided = [row for row in rows if row.decided]
    calls = Counter(call for row in decided for call in row.calls)
    for tool in sorted(calls):
        scalars[f"tool/rate/{tool or 'unparseable'}"] = sum(tool in row.calls for row in decided) / len(decided)
    for source in sorted({row.data_source for row in decided}):
        some = [row for row in decided if row.data_source == source]
        parts = {"": some, "/needed": [row for row in some if row.tool_needed is True],
                 "/not_needed": [row for row in some if row.tool_needed is False]}
        scalars |= {f"tool/rate_of/{source}{part}": rate for part, of in parts.items() if (rate := _rate(of)) is not None}
    for tool in sorted(calls):
        seconds = sorted(s for row in decided for name, s in zip(row.calls, row.call_seconds) if name == tool)
        if seconds:
            scalars |= {f"tool/seconds/{tool or 'unparseable'}/p{share}": seconds[(len(seconds) - 1) * share // 100]
                        for share in (50, 95)}
    for called, label in ((True, "with"), (False, "without")):
        subset = [row for row in rows if row.reward.scored and row.called == called]
        if subset:
            scalars[f"reward/accuracy_{label}_tool"] = sum(row.reward.correct for row in subset) / len(subset)
    if calls:
        scalars["tool/failed_call_rate"] = sum(row.failed_calls for row in decided) / calls.total()
    scalars["tool/infrastructure"] = float(sum(row.infrastructure_calls for row in rows))
    return scalars


def _group_scalars(rows: Sequence[RolloutRow]) -> dict[str, float]:
    """Q is the correct rollouts of a group: the tool channel has a signal where at least two of Q differ in calls."""
    groups = [[row.reward for row in group if row.reward.scored] for _, group in groupby(rows, key=lambda row: row.group)]
    groups = [group for group in groups if group]
    if not groups:
        return {}
    chosen = [[reward.tool for reward in group if reward.correct] for group in groups]
    accuracy = [[reward.accuracy for reward in group] for group in groups]
    count = len(groups)
    sizes = Counter(map(len, chosen))
    return {
        **{f"hdpo/q_size_is/{size}": sizes[size] / count for size in range(max(map(len, groups)) + 1)},
        "hdpo/groups": float(count),
        "hdpo/q_size_mean": sum(map(len, chosen)) / count,
        "hdpo/q_empty": sum(not q for q in chosen) / count,
        "hdpo/q_one": sum(len(q) == 1 for q in chosen) / count,
        "hdpo/q_all": sum(len(q) == len(group) for q, group in zip(chosen, groups, strict=True)) / count,
        "hdpo/groups_with_tool_signal": sum(map(_differ, chosen)) / count,
        "hdpo/groups_with_accuracy_signal": sum(map(_differ, accuracy)) / count,
    }


def _differ(values: list[float]) -> bool:
    return len(values) >= 2 and statistics.stdev(values) >= _SPREAD


def _advantage_scalars(rows: Sequence[RolloutRow], weights: tuple[float, float]) -> dict[str, float]:
    """Over scored rows. `hdpo/tool_advantage_mass` is the tool channel's share of w * |A| summed over sampled tokens."""
    rows = [row for row in rows if len(row.advantages) == 2]
    if not rows:
        return {}
    scalars, mass = {}, []
    for channel, label in enumerate(("acc", "tool")):
        values = [row.advantages[channel] for row in rows]
        scalars[f"actor/advantage/{label}_mean"] = statistics.fmean(values)
        scalars[f"actor/advantage/{label}_std"] = statistics.pstdev(values)
        scalars[f"actor/advantage/{label}_nonzero_ratio"] = sum(value != 0 for value in values) / len(rows)
        mass.append(weights[channel] * sum(abs(row.advantages[channel]) * row.sampled_length for row in rows))
    scalars["actor/qualifying_ratio_rho"] = scalars["actor/advantage/tool_nonzero_ratio"]
    if sum(mass):
        scalars["hdpo/tool_advantage_mass"] = mass[1] / sum(mass)
    return scalars
