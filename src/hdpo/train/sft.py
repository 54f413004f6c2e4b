"""Supervised fine-tuning: rollouts that were recorded earlier, through the same chat, batching and policy as RL."""
from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from hdpo.agent.chat import ChatFormat
from hdpo.agent.demonstration import encode_demonstration
from hdpo.config import Config
from hdpo.data.streams import Unread
from hdpo.data.tasks import Demonstration, DemonstrationStream
from hdpo.packing.batching import PackingSpec, make_train_batch
from hdpo.state.checkpoint import Checkpoints
from hdpo.train.held_out import HeldOut
from hdpo.train.lifecycle import StopSignal, go_on, learning_rate
from hdpo.train.objectives import SftObjective
from hdpo.train.runlog import RunLog
from hdpo.train.sampled import Sampled
from hdpo.train.update import StepGuard, update
from hdpo.types import Sample


@dataclass(frozen=True, slots=True)
class SftParts:
    policy: Any                # adapters/deepspeed_policy.DeepSpeedPolicy
    chat: ChatFormat
    spec: PackingSpec
    demonstrations: DemonstrationStream
    held_out: Sequence[Demonstration]      # may be none
    log: RunLog
    checkpoints: Checkpoints
    sampled: Sampled | None = None         # eval.tasks


def train(config: Config, parts: SftParts) -> bool:
    """Every rank runs this function. Returns False when it was stopped before its last step."""
    policy, demos, log, world = parts.policy, parts.demonstrations, parts.log, parts.policy.world
    checkpoints, steps = parts.checkpoints, config.optim.steps
    ahead: list[Future[Sample]] = []       # of this rank's rows of the next step, which are encoded while this one trains

    with StopSignal() as stop, ThreadPoolExecutor(min(8, os.cpu_count() or 1), "hdpo-encode") as threads:
        sampled = parts.sampled
        start, position = checkpoints.resume(sampled.engine.sleep if sampled is not None else lambda: None)
        go_on(demos, position, checkpoints.new_rows)
        objective = SftObjective(log, config.batch.head_chunk_tokens, demos.sources)
        guard = StepGuard(config.optim.max_skipped)
        held_out = HeldOut(config, policy, parts.held_out, partial(encode, parts.chat), parts.spec, threads)

        def evaluate(step: int) -> dict[str, float]:
            return held_out(step) | (sampled(step) if sampled is not None else {})

        world.phase("evaluation", start)
        if sampled is not None:
            sampled.open(start, stop)
        for sink in log.sinks if start == 0 and (at_start := evaluate(0)) else []:
            sink.write(0, at_start)

        def begin(rows: Unread[Demonstration]) -> list[Future[Sample]]:
            mine = rows[world.rank::world.size]
            return [threads.submit(lambda number: encode(parts.chat, mine[number]), number) for number in range(len(mine))]

        for step in log.steps(start, steps, "SFT"):
            with log.timed("data"):
                checkpoints.check()
                rows = demos.take(config.optim.rows_per_step)
                samples = [row.result() for row in ahead or begin(rows)]
                ahead = begin(demos.peek(config.optim.rows_per_step)) if step + 1 < steps else []
            with log.timed("pack"):
                batch = make_train_batch([samples], parts.spec, world, channels=0)
            lr = learning_rate(config.optim, step)
            with log.timed("update"):
                guard.note(update(policy, batch.mini_batches[0], objective, lr))
            with log.timed("evaluation"):
                held = evaluate(step + 1)
            checkpoints.note(step + 1, log.write(step + 1, {
                **held, **guard.scalars(), "actor/lr": lr, "training/global_step": step + 1, "training/epoch": demos.epoch,
                "data/skipped": len(demos.skipped)}))
            guard.check(partial(checkpoints.save_last, step + 1, demos.state()))
            stopping = world.any(stop.is_set())
            with log.timed("save"):
                checkpoints.save_due(step + 1, demos.state())
            if stopping and step + 1 < steps:
                checkpoints.save_last(step + 1, demos.state())
                log.note(f"stopped after step {step + 1}; the same command goes on from there")
                return False
        checkpoints.finish()
    return True


def encode(chat: ChatFormat, row: Demonstration) -> Sample:
    """A demonstration as a training row: the same tokens, masks and images as a rollout, with C = 0."""
    token_ids, mask, images = encode_demonstration(chat, row.messages, row.images)
    return Sample(token_ids, mask, [0.0] * len(token_ids), (), (), chat.vision(images), group=row.source)
