"""A step of a run once more, from the rollouts that it kept: the same batches, losses and gradient, without an engine.

What the update needs stands in the rollout dump: tokens, masks, the engine's log-probs, pictures, verdicts and rewards, and which
prompt of the step each group was. Weights and optimizer are those of the checkpoint before the step. With nothing changed, on as
many ranks as the run had, the gradient is the same bit for bit; a setting that is changed shows what it would have been.
"""
from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from PIL import Image

from hdpo.agent.chat import ChatFormat
from hdpo.agent.images import num_image_tokens
from hdpo.config import Config
from hdpo.errors import DataError
from hdpo.packing.batching import PackingSpec
from hdpo.protocols import Reference
from hdpo.reward.rewards import reward_of
from hdpo.state.dump import DumpedRollout, read_rollouts, rollout_parts
from hdpo.train.collect import Scored, score_groups, signal_of
from hdpo.train.lifecycle import learning_rate
from hdpo.train.objectives import HdpoObjective
from hdpo.train.rl import make_batch
from hdpo.train.runlog import RunLog
from hdpo.train.samples import PixelPool
from hdpo.train.update import StepGuard, old_log_probs, update, with_reference
from hdpo.types import EndReason, Judgement, Reward, RewardedGroup, Task, ToolCall, Trajectory, Verdict


@dataclass(frozen=True, slots=True)
class ReplayParts:
    policy: Any
    chat: ChatFormat
    spec: PackingSpec
    pixels: PixelPool
    log: RunLog
    reference: Reference | None = None     # with hdpo.kl_coef


def replay_step(config: Config, parts: ReplayParts, groups: Sequence[RewardedGroup], step: int) -> dict[str, float]:
    """The update of `step`, counted from 1, with this rank's groups; the scalars of its line. Collective."""
    policy, log = parts.policy, parts.log
    objective = HdpoObjective(config.hdpo, parts.chat.banned_ids, config.rollout.temperature, log, config.batch.head_chunk_tokens)
    guard = StepGuard(config.optim.max_skipped)
    scored = score_groups(groups, config.hdpo)
    batch = make_batch(config, parts, chosen(config, scored, policy.world.gather))
    if parts.reference is not None:
        batch = with_reference(parts.reference, batch, objective.log_probs)
    old = old_log_probs(policy, batch, objective.log_probs, config.optim.ppo_epochs)
    lr = learning_rate(config.optim, step - 1)
    for _ in range(config.optim.ppo_epochs):
        for mini, old_of_mini in zip(batch.mini_batches, old):
            guard.note(update(policy, mini, objective, lr, old_of_mini))
    return log.write(step, {**guard.scalars(), "actor/lr": lr}, scored.groups, scored.advantages)


def chosen(config: Config, scored: Scored, gather: Any) -> Scored:
    """The groups that are trained: with rollout.dynamic_sampling those with signal first, as many as a step has."""
    if not config.rollout.dynamic_sampling:
        return scored
    own = [(not signal, group.index) for signal, group in zip(signal_of(scored, config.hdpo), scored.groups)]
    taken = {index for _, index in sorted(entry for part in gather(own) for entry in part)[:config.rollout.prompts_per_step]}
    return score_groups([group for group in scored.groups if group.index in taken], config.hdpo)


def kept_groups(run: Path, step: int, config: Config, chat: ChatFormat, rank: int = 0, ranks: int = 1,
                anew: bool = False) -> tuple[list[RewardedGroup], list[str]]:
    """(this rank's groups of the dump of `step`, what keeps a replay from being exact). `anew`: rewards by this configuration,
    from the verdicts kept. Raises DataError for a dump that is not there, was thinned, or lacks what is trained on."""
    path = run / "rollouts" / f"step_{step:06d}.parquet"
    parts = rollout_parts(path)
    if not parts:
        there = sorted({int(file.name[5:11]) for file in path.parent.glob("step_*.parquet")})
        raise DataError(f"{path}: no rollouts of step {step} were kept; " + (
            f"there are those of {there[0]} to {there[-1]}" if there else "log.rollouts_every keeps some"))
    rows = [read_rollouts(part) for part in parts]
    _check_whole(path, [row for part in rows for row in part], config)
    notes = []
    if len(parts) == ranks:
        own = rows[rank]
    else:
        notes.append(f"the run had {len(parts)} rank{'s' * (len(parts) > 1)}, this has {ranks}: sums are in another order")
        own = sorted((row for part in rows for row in part if row.index % ranks == rank), key=lambda row: row.index)
    if any(image.startswith(b"\xff\xd8") for part in rows for row in part for image in row.images):
        notes.append("pictures above 256 x 256 pixels are kept as JPEG: not every pixel is the one that was seen")
    groups = [_group(list(members), path, config, chat, anew) for _, members in groupby(own, key=lambda row: row.index)]
    return groups, notes


def _check_whole(path: Path, rows: Sequence[DumpedRollout], config: Config) -> None:
    if any(row.index is None for row in rows):
        raise DataError(f"{path} was written before dumps said to which mini-batch a rollout belongs; it can't be trained again")
    wanted = config.rollout.prompts_per_step * config.rollout.group_size
    if len(rows) < wanted:
        raise DataError(f"{path} holds {len(rows)} of {wanted} rollouts: it was thinned to log.rollouts_gib, and can't be "
                        "trained again")


def _group(rows: list[DumpedRollout], path: Path, config: Config, chat: ChatFormat, anew: bool) -> RewardedGroup:
    first = rows[0]
    truth: str | list[str] = first.ground_truth[0] if len(first.ground_truth) == 1 else list(first.ground_truth)
    task = Task(first.task_id, first.data_source, [{"role": "user", "content": first.question}], (), truth,
                {} if first.tool_needed is None else {"tool_needed": int(first.tool_needed)})
    pictures: dict[bytes, Image.Image] = {}
    trajectories = tuple(_trajectory(row, task, path, chat, pictures) for row in rows)
    judgements = tuple(Judgement(Verdict(row.verdict), row.by, row.detail) for row in rows)
    rewards = tuple(_reward(row, trajectory, judgement, config, anew)
                    for row, trajectory, judgement in zip(rows, trajectories, judgements, strict=True))
    return RewardedGroup(task, trajectories, judgements, rewards, first.index)


def _reward(row: DumpedRollout, trajectory: Trajectory, judgement: Judgement, config: Config, anew: bool) -> Reward:
    kept = Reward(row.reward_accuracy, row.reward_tool, row.correct, row.format_ok, row.scored)
    if not anew:
        return kept
    made = reward_of(trajectory, judgement, config.reward)
    return replace(made, accuracy=kept.accuracy) if row.by == "own" else made      # a graded answer stands in no dump


def _trajectory(row: DumpedRollout, task: Task, path: Path, chat: ChatFormat, pictures: dict[bytes, Image.Image]) -> Trajectory:
    if not len(row.token_ids) == len(row.mask) == len(row.log_probs) > 0:
        raise DataError(f"{path}: {row.task_id} lacks its tokens or log-probs")
    for data in row.images:
        if data not in pictures:
            with Image.open(io.BytesIO(data)) as opened:
                pictures[data] = opened.convert("RGB")
    images = tuple(pictures[data] for data in row.images)
    placeholders = row.token_ids.count(chat.image_token_id) if chat.image_token_id is not None else 0
    if placeholders and not images:
        raise DataError(f"{path}: {row.task_id} was kept without its pictures (log.rollouts_gib), and can't be trained again")
    if placeholders != sum(num_image_tokens(image.size, chat.factor) for image in images):
        raise DataError(f"{path}: pictures of {row.task_id} were kept smaller than the model saw them, and can't be trained on")
    calls = tuple(ToolCall(call["name"], call["arguments"], call["ok"], said, call["num_images"], call["seconds"],
                           call["infrastructure"]) for call, said in zip(row.calls, row.observations, strict=True))
    return Trajectory(
        task=task, sample_index=row.sample_index, token_ids=row.token_ids, mask=row.mask, log_probs=row.log_probs,
        prompt_length=row.prompt_length, images=images, calls=calls, end=EndReason(row.end), turns=tuple(row.turns),
        weight_version=row.weight_version, seconds=row.seconds, error=row.error, index=row.index,
        versions=row.weight_versions or [])


def compared(recorded: Mapping[str, Any], replayed: Mapping[str, float]) -> list[tuple[str, float, float]]:
    """(name, recorded, replayed) of what a step learns from and with; clocks, memory and the world around are left out."""
    shown = ("actor/", "hdpo/", "mismatch/", "reward/accuracy/mean", "reward/score/mean", "reward/tool_score/mean")
    return [(name, float(recorded[name]), replayed[name]) for name in sorted(replayed)
            if name in recorded and name.startswith(shown)]


def same(first: float, second: float) -> bool:
    return first == second or math.isnan(first) and math.isnan(second)
