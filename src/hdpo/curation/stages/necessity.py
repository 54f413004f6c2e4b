"""Stage 2, genuine tool necessity: K rollouts of each question by the base model without tools.

A row goes when the share of right ones among those with a verdict reaches the threshold. An unscored sample counts neither
way; a row with too few verdicts waits.
"""
from __future__ import annotations

from hdpo.config.curation import NecessitySettings
from hdpo.curation.record import Outcome, Record, Waits
from hdpo.types import RewardedGroup, Task


def no_tools_task(record: Record, settings: NecessitySettings) -> Task:
    return record.task(system=settings.system)


def decide(record: Record, group: RewardedGroup, settings: NecessitySettings) -> Outcome | Waits:
    """Counts are kept as pass8 and pass_samples (samples with a verdict). With fewer verdicts than half the row waits."""
    scored = [reward for reward in group.rewards if reward.scored]
    if 2 * len(scored) < len(group.rewards):
        return Waits(f"{len(scored)} of {len(group.rewards)} samples have a verdict")
    solved = sum(reward.correct for reward in scored)
    record = record.noted(pass8=solved, pass_samples=len(scored))
    if solved >= settings.threshold * len(scored):
        return Outcome(record, "solved_without_tools", f"{solved} of {len(scored)} samples without tools are right")
    return Outcome(record)


def applies(record: Record, settings: NecessitySettings) -> bool:
    """Rows that call no tool teach when not to: they are kept unless settings.tool_rows_only is off."""
    return bool(record.steps) or not settings.tool_rows_only
