"""Supervised fine-tuning: rollouts that were recorded earlier, through the same chat, batching and policy as RL."""
from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from hdpo.agent.chat import ChatFormat
from hdpo.config import Config
from hdpo.data.tasks import DemonstrationStream
from hdpo.train import checkpoint
from hdpo.train.batching import PackingSpec, make_train_batch
from hdpo.train.lifecycle import StopSignal, due, learning_rate
from hdpo.train.objectives import SftObjective
from hdpo.train.runlog import RunLog
from hdpo.train.update import StepGuard, update
from hdpo.types import Sample


@dataclass(frozen=True, slots=True)
class SftParts:
    policy: checkpoint.Saved
    chat: ChatFormat
    spec: PackingSpec
    demonstrations: DemonstrationStream
    log: RunLog


def train(config: Config, parts: SftParts) -> bool:
    """Every rank runs this function. Returns False when it was stopped before its last step."""
    policy, demos, log, world = parts.policy, parts.demonstrations, parts.log, parts.policy.world
    run, steps = config.run.path, config.optim.steps
    start, position = checkpoint.resume(run, policy, config)
    if position is not None:
        demos.restore(position)
    objective = SftObjective(log, config.batch.head_chunk_tokens)
    guard = StepGuard(config.optim.max_skipped)

    with StopSignal() as stop, ThreadPoolExecutor(min(8, os.cpu_count() or 1), "hdpo-encode") as threads:
        for step in log.steps(start, steps, "SFT"):
            with log.timed("data"):
                rows = demos.take(config.optim.rows_per_step)[world.rank::world.size]
                samples = list(threads.map(partial(encode, parts.chat), rows))
            with log.timed("pack"):
                batch = make_train_batch([samples], parts.spec, world, channels=0)
            lr = learning_rate(config.optim, step)
            with log.timed("update"):
                guard.note(update(policy, batch.mini_batches[0], objective, lr))
            log.write(step + 1, {**guard.scalars(), "actor/lr": lr, "training/global_step": step + 1,
                                 "training/epoch": demos.epoch,
                                 "data/skipped": len(demos.skipped)})
            guard.check(partial(checkpoint.save, run, step + 1, policy, demos.state(), config))
            stopping = world.any(stop.requested)
            if stopping or step + 1 == steps or due(step + 1, config.checkpoint.every_steps):
                with log.timed("save"):
                    checkpoint.save(run, step + 1, policy, demos.state(), config)
            if stopping and step + 1 < steps:
                log.note(f"stopped after step {step + 1}; the same command goes on from there")
                return False
    return True


def encode(chat: ChatFormat, row: object) -> Sample:
    """A demonstration as a training row: the same tokens, masks and images as a rollout, with C = 0."""
    token_ids, mask, images = chat.encode_demonstration(row.messages, row.images)   # type: ignore[attr-defined]
    return Sample(token_ids, mask, [0.0] * len(token_ids), (), (), chat.vision(images))
