"""Rewarded groups -> advantages -> training rows. A group lives on one rank, so nothing is communicated here."""
from __future__ import annotations

from collections.abc import Sequence

import torch

from hdpo.advantages import hdpo_advantages
from hdpo.agent.chat import ChatFormat
from hdpo.config import HdpoConfig
from hdpo.types import EndReason, RewardedGroup, Sample, Trajectory

TRUNCATED = (EndReason.MAX_TURNS, EndReason.MAX_TOKENS, EndReason.CONTEXT_FULL)


def group_advantages(groups: Sequence[RewardedGroup], config: HdpoConfig) -> tuple[list[list[float]], list[list[bool]]]:
    """(advantages [B][C], member [B][C]) for the trajectories of all groups, in order."""
    rewards = [reward for group in groups for reward in group.rewards]
    index = [i for i, group in enumerate(groups) for _ in group.rewards]
    if not rewards:
        return [], []
    result = hdpo_advantages(
        torch.tensor([r.accuracy for r in rewards]), torch.tensor([r.tool for r in rewards]),
        torch.tensor([r.correct for r in rewards]), torch.tensor(index), scored=torch.tensor([r.scored for r in rewards]),
        scale=config.scale, tool_estimator=config.tool_estimator, tool_weight=config.w_tool)
    return result.values.T.tolist(), result.member.T.tolist()


def to_samples(groups: Sequence[RewardedGroup], advantages: Sequence[Sequence[float]], members: Sequence[Sequence[bool]],
               chat: ChatFormat, config: HdpoConfig) -> list[Sample]:
    """Training rows of the scored trajectories. Unscored ones leave no trace: no row, no norm.

    Images are processed only for rows that carry a gradient.
    """
    trajectories = [t for group in groups for t in group.trajectories]
    rewards = [r for group in groups for r in group.rewards]
    samples = []
    for trajectory, reward, advantage, member in zip(trajectories, rewards, advantages, members, strict=True):
        cut = config.mask_truncated and trajectory.end in TRUNCATED
        if reward.scored and not cut and any(member):
            samples.append(_sample(trajectory, advantage, member, chat))
    return samples


def _sample(trajectory: Trajectory, advantage: Sequence[float], member: Sequence[bool], chat: ChatFormat) -> Sample:
    return Sample(
        token_ids=trajectory.token_ids, mask=trajectory.mask, rollout_log_probs=trajectory.log_probs,
        advantages=tuple(advantage), member=tuple(member),
        vision=chat.vision(trajectory.images) if any(advantage) else None)
