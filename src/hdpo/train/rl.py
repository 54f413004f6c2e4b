"""Reinforcement learning, synchronous and colocated: sync, roll out, sleep, score, pack, update, log, evaluate, save."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from hdpo.agent.chat import ChatFormat
from hdpo.agent.rollout import Rollouts
from hdpo.config import Config
from hdpo.data.tasks import TaskStream
from hdpo.errors import ParityError
from hdpo.packing.batching import PackingSpec, make_train_batch
from hdpo.protocols import Engine, Reference
from hdpo.reward.scoring import Scorer, check_unscored, unscored_reasons, unscored_share
from hdpo.state.checkpoint import Checkpoints
from hdpo.state.spool import Spool
from hdpo.train.carry import Carrying
from hdpo.train.collect import Collector, Scored
from hdpo.train.lifecycle import StopSignal, due, go_on, learning_rate
from hdpo.train.objectives import CHANNEL_NAMES, HdpoObjective
from hdpo.train.runlog import RunLog
from hdpo.train.samples import PixelPool, to_samples
from hdpo.train.seen import Seen
from hdpo.train.sync import WeightSync
from hdpo.train.update import StepGuard, old_log_probs, update, with_reference
from hdpo.types import RewardedGroup, Sample, TrainBatch, Trajectory


@dataclass(frozen=True, slots=True)
class RlParts:
    policy: Any                # adapters/deepspeed_policy.DeepSpeedPolicy
    engine: Engine
    chat: ChatFormat
    rollouts: Rollouts
    scorer: Scorer
    tasks: TaskStream
    evaluator: Callable[[str, int], Any]   # evaluate.Evaluator
    spec: PackingSpec
    sync: WeightSync
    pixels: PixelPool
    log: RunLog
    checkpoints: Checkpoints
    spool: Spool
    reference: Reference | None = None     # with hdpo.kl_coef

    def ended(self, trajectory: Trajectory) -> None:
        """What can begin for a trajectory while others still roll out."""
        self.spool.add(trajectory)
        self.scorer.submit(trajectory)
        self.pixels.submit(trajectory)


def train(config: Config, parts: RlParts) -> bool:
    """Every rank runs this function; a prompt's group stays on one rank. Returns False when stopped before its end."""
    policy, engine, rollouts, tasks, log, checkpoints = (
        parts.policy, parts.engine, parts.rollouts, parts.tasks, parts.log, parts.checkpoints)
    world, steps = policy.world, config.optim.steps
    with StopSignal() as stop:
        rollouts.stop = stop
        start, position = checkpoints.resume(engine.sleep)
        go_on(tasks, position, checkpoints.new_rows)
        collect = open_collector(config, parts, position)
        objective = HdpoObjective(config.hdpo, parts.chat.banned_ids, config.rollout.temperature, log,
                                  config.batch.head_chunk_tokens, Seen())
        guard = StepGuard(config.optim.max_skipped)
        world.phase("parity", start)
        parts.sync.open(start, fresh=start == 0)
        if start == 0 and config.eval.before:
            run_evaluation(config, parts, config.eval.label_before, 0)

        for step in log.steps(start, steps, "RL"):
            position = collect.position()
            with log.timed("sync"):
                checkpoints.check()
                send_weights(parts, step, position)
            with log.timed("spool"):
                known = parts.spool.begin(step)
            collected = collect(step, known)
            with log.timed("sleep"):
                engine.sleep()
            if collected is None:
                return leave(config, parts, step, position)
            rewarded, trained = collected
            with log.timed("pack"):
                batch = make_batch(config, parts, trained)
                stop_if_unscored(config, parts, step, position, rewarded.groups)
            if parts.reference is not None:
                with log.timed("reference"):
                    batch = with_reference(parts.reference, batch, objective.log_probs)
            with log.timed("old_log_prob"):
                old = old_log_probs(policy, batch, objective.log_probs, config.optim.ppo_epochs)
            lr = learning_rate(config.optim, step)
            with log.timed("update"):
                for _ in range(config.optim.ppo_epochs):
                    for mini, old_of_mini in zip(batch.mini_batches, old):
                        guard.note(update(policy, mini, objective, lr, old_of_mini))
                del batch, mini   # the step's pixels: not to be held while the next step rolls out
            checkpoints.note(step + 1, log.write(step + 1, {
                **guard.scalars(), "actor/lr": lr, "training/global_step": step + 1, "training/epoch": tasks.epoch,
                "data/skipped": len(tasks.skipped)}, rewarded.groups, rewarded.advantages, objective.seen))
            guard.check(partial(checkpoints.save_last, step + 1, collect.position()))
            if due(step + 1, config.eval.every_steps) and step + 1 < steps:
                run_evaluation(config, parts, f"step_{step + 1:06d}", step + 1)
            with log.timed("save"):
                checkpoints.save_due(step + 1, collect.position(), log.finish)
            if world.any(stop.is_set()) and step + 1 < steps:
                return leave(config, parts, step + 1, collect.position())
        checkpoints.finish()
        if config.eval.after and not run_evaluation(config, parts, config.eval.label_after, steps):
            log.note(f"stopped in the evaluation after step {steps}, which is saved; the same command evaluates again")
            return False
    return True


def open_collector(config: Config, parts: RlParts, position: dict[str, Any] | None) -> Collector:
    """What collects a step's groups, with whatever the checkpoint carries."""
    carries = config.rollout.carry_over or "started" in (position or {})     # also when run.allow has turned it off meanwhile
    collect = (Carrying if carries else Collector)(config, parts.rollouts, parts.scorer, parts.tasks, parts.policy.world,
                                                   parts.log, parts.ended, parts.spool.cut)
    parts.checkpoints.beside = collect.snapshot
    if position is not None and parts.checkpoints.start is not None:
        collect.restore(parts.checkpoints.start / "trainer", position)
    return collect


def send_weights(parts: RlParts, step: int, position: dict[str, Any]) -> None:
    """The policy's weights into the engine, with the canary when it is due; a run that fails it is saved. Collective."""
    try:
        parts.sync.send(step)
        parts.sync.watch(step)
    except ParityError:
        parts.checkpoints.save_last(step, position)
        raise


class Packs(Protocol):
    """The parts that make a batch."""

    @property
    def policy(self) -> Any: ...

    @property
    def spec(self) -> PackingSpec: ...

    @property
    def pixels(self) -> PixelPool: ...


def make_batch(config: Config, parts: Packs, trained: Scored) -> TrainBatch:
    """Deal the step's groups over its mini-batches by the order of their prompts, wherever they were sampled, and pack.

    Collective: each rank gives the groups it has.
    """
    world = parts.policy.world
    prompts = sorted(index for indices in world.gather([group.index for group in trained.groups]) for index in indices)
    place = {index: position for position, index in enumerate(prompts)}
    num_mini = config.rollout.prompts_per_step // config.optim.mini_batch_prompts
    minis: list[list[Sample]] = [[] for _ in range(num_mini)]
    first = 0
    for group in trained.groups:
        rows = slice(first, first + len(group.rewards))
        first = rows.stop
        minis[place[group.index] * num_mini // len(prompts)] += to_samples(
            [group], trained.advantages[rows], trained.members[rows], parts.pixels, config.hdpo)
    parts.pixels.clear()
    return make_train_batch(minis, parts.spec, world, len(CHANNEL_NAMES))


def stop_if_unscored(config: Config, parts: RlParts, step: int, position: dict[str, Any],
                     rewarded: Sequence[RewardedGroup]) -> None:
    """Stop, after saving, when too many rollouts of the step have no verdict. Collective. Raises UnscoredLimitError."""
    unscored, total = (int(count) for count in parts.policy.world.sum([float(n) for n in unscored_share(rewarded)]))
    if unscored > config.reward.max_unscored * total:
        parts.checkpoints.save_last(step, position)
        check_unscored(unscored, total, config.reward.max_unscored, unscored_reasons(rewarded))


def leave(config: Config, parts: RlParts, step: int, position: dict[str, Any]) -> bool:
    """Save the state after `step` finished steps, unless it is where the run began, and tell the user. Collective."""
    if step == parts.checkpoints.start_step:
        parts.log.note("stopped before a step was finished: there is nothing new to save; the same command begins again")
        return False
    parts.policy.world.phase("save", step)
    parts.checkpoints.save_last(step, position)
    parts.log.note(f"stopped after step {step}; the same command goes on from there")
    return False


def run_evaluation(config: Config, parts: RlParts, label: str, step: int) -> bool:
    """Greedy rollouts of the held-out rows with the present weights; nothing without such rows. Collective. Returns False when
    the run was asked to stop meanwhile."""
    if not config.data.val:
        return True
    with parts.log.timed("evaluation"):
        parts.policy.world.phase("evaluation", step)
        parts.sync.send(step)
        result = parts.evaluator(label, step)
        parts.engine.sleep()
    if result is not None:
        parts.checkpoints.note(step, result.scalars())
        for sink in parts.log.sinks:
            sink.write(step, result.scalars())
    return result is not None
