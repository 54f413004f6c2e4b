"""Rewarded groups -> advantages -> training rows. A group lives on one rank, so nothing is communicated here."""
from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from PIL.Image import Image

from hdpo.advantages import hdpo_advantages
from hdpo.agent.chat import ChatFormat
from hdpo.agent.images import content_key
from hdpo.config import HdpoConfig
from hdpo.packing.batching import is_computed
from hdpo.types import EndReason, Reward, RewardedGroup, Sample, Trajectory, Vision, join

AHEAD_BYTES = 3 << 29
"""Pixels that may be computed before it is known whether their rows carry a gradient, bytes per rank: while rollouts go on, a
node holds the most."""
BYTES_PER_PIXEL = 3           # of a picture's patches, see hdpo.pixels
TRUNCATED = (EndReason.MAX_TURNS, EndReason.MAX_TOKENS, EndReason.CONTEXT_FULL)


class PixelPool:
    """The patches of a step's images, each distinct image computed once, in threads.

    A group's rollouts share the prompt's images, and often the crops their tools return. `submit` starts on a trajectory
    as soon as it has ended, while others still roll out or are scored, and so costs the step nothing where there are
    cores to spare. Rows hold the very tensors that are kept here: `clear` after a step, and the last row frees them.
    """

    def __init__(self, chat: ChatFormat, workers: int = 0, ahead_bytes: int = AHEAD_BYTES) -> None:
        """`workers`: threads; 0 takes half the cores, at most 4."""
        self._chat, self._ahead_bytes = chat, ahead_bytes
        self._threads = ThreadPoolExecutor(workers or min(4, max(1, (os.cpu_count() or 1) // 2)), "hdpo-pixels")
        self._lock = threading.Lock()
        self._ready: dict[str, Future[Vision | None]] = {}
        self._bytes = 0

    def submit(self, trajectory: Trajectory) -> None:
        """Start on the images of an ended trajectory; returns at once. From any thread. Nothing happens beyond
        `ahead_bytes`, when the trajectory can't be scored, or when its images would have to be named first."""
        if trajectory.end.scorable and trajectory.image_keys and self._bytes < self._ahead_bytes:
            self.start(trajectory)

    def vision(self, trajectory: Trajectory) -> Vision | None:
        """What `ChatFormat.vision` makes of the trajectory's images, bit for bit; waits for it. None without images."""
        return join([part for future in self.start(trajectory) if (part := future.result()) is not None])

    def clear(self) -> None:
        """Forget the images of the step. Not while `submit` may still be called for it."""
        with self._lock:
            for future in self._ready.values():
                future.cancel()
            self._ready, self._bytes = {}, 0

    def close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    def start(self, trajectory: Trajectory) -> list[Future[Vision | None]]:
        """The tensors of each of the trajectory's images, under way or there."""
        keys = trajectory.image_keys or [content_key(image) for image in trajectory.images]
        with self._lock:
            return [self._future(key, image) for key, image in zip(keys, trajectory.images, strict=True)]

    def _future(self, key: str, image: Image) -> Future[Vision | None]:
        if key not in self._ready:
            self._ready[key] = self._threads.submit(self._chat.vision, [image])
            self._bytes += image.width * image.height * BYTES_PER_PIXEL
        return self._ready[key]


def group_advantages(groups: Sequence[RewardedGroup], config: HdpoConfig) -> tuple[list[list[float]], list[list[bool]]]:
    """(advantages [B][C], member [B][C]) for the trajectories of all groups, in order."""
    rewards = [reward for group in groups for reward in group.rewards]
    index = [i for i, group in enumerate(groups) for _ in group.rewards]
    if not rewards:
        return [], []
    result = hdpo_advantages(
        torch.tensor([r.accuracy for r in rewards]), torch.tensor([r.tool for r in rewards]),
        torch.tensor([r.correct for r in rewards]), torch.tensor(index), scored=torch.tensor([r.scored for r in rewards]),
        scale=config.scale, tool_estimator=config.tool_estimator, tool_weight=config.w_tool, tool_norm=config.tool_norm)
    return result.values.T.tolist(), result.member.T.tolist()


def is_trained(trajectory: Trajectory, reward: Reward, config: HdpoConfig) -> bool:
    """Whether the trajectory may become a training row.

    Unscored ones never do. Those cut by a budget (TRUNCATED) don't with `mask_truncated`, DAPO's over-long filtering
    (arXiv 2503.14476): they leave the loss and its norms, while their reward still counts in the group's mean and std,
    so that a group's other rows are compared with what the policy really did.
    """
    return reward.scored and not (config.mask_truncated and trajectory.end in TRUNCATED)


def to_samples(groups: Sequence[RewardedGroup], advantages: Sequence[Sequence[float]], members: Sequence[Sequence[bool]],
               pixels: PixelPool, config: HdpoConfig) -> list[Sample]:
    """Training rows of the trajectories that `is_trained`; the others leave no trace: no row, no norm.

    Only rows that carry a gradient get images.
    """
    trajectories = [(t, group.index) for group in groups for t in group.trajectories]
    rewards = [r for group in groups for r in group.rewards]
    rows = [(trajectory, index, advantage, member) for (trajectory, index), reward, advantage, member
            in zip(trajectories, rewards, advantages, members, strict=True)
            if is_trained(trajectory, reward, config) and any(member)]
    computed = [is_computed(advantage, member, config.every_row) for _, _, advantage, member in rows]
    for (trajectory, *_), has_gradient in zip(rows, computed):
        if has_gradient:
            pixels.start(trajectory)     # all of them, before the first is waited for
    return [_sample(*row, pixels if has_gradient else None) for row, has_gradient in zip(rows, computed)]


def _sample(trajectory: Trajectory, index: int, advantage: Sequence[float], member: Sequence[bool],
            pixels: PixelPool | None) -> Sample:
    return Sample(
        token_ids=trajectory.token_ids, mask=trajectory.mask, rollout_log_probs=trajectory.log_probs,
        advantages=tuple(advantage), member=tuple(member), prompt_length=trajectory.prompt_length, group=index,
        sample_index=trajectory.sample_index, vision=pixels.vision(trajectory) if pixels is not None else None)
