"""A step's groups: prompts that all ranks share -> rollouts -> verdicts -> advantages, refilled where there is no signal.

Every rank takes the same prompts from the stream, so that the data position is the same everywhere and a step repeats
after a resume; which rank rolls out which prompt is settled while it runs. A group stays on one rank.
"""
from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hdpo.agent.carry import Carry
from hdpo.agent.queue import PromptQueue, static_queue
from hdpo.agent.rollout import Rollouts
from hdpo.agent.run import OnFinished
from hdpo.config import Config, HdpoConfig
from hdpo.data.tasks import TaskStream
from hdpo.ranks.world import World
from hdpo.reward.scoring import Scorer
from hdpo.state.records import Records
from hdpo.train.runlog import RunLog
from hdpo.train.samples import group_advantages, is_trained
from hdpo.types import Carried, RewardedGroup, Task, Trajectory

OnCut = Callable[[Iterable[Carried], Iterable[Trajectory], int], object]
"""Called when a step is over before its trajectories are, see Spool.cut."""


@dataclass(frozen=True, slots=True)
class Scored:
    """Groups of this rank and the advantages of their trajectories [B][C], those of the first group first."""

    groups: list[RewardedGroup]
    advantages: list[list[float]]
    members: list[list[bool]]


def score_groups(groups: Sequence[RewardedGroup], config: HdpoConfig) -> Scored:
    return Scored(list(groups), *group_advantages(groups, config))


def prompt_queue(world: World, deterministic: bool) -> PromptQueue:
    """One queue for all ranks, so that none idles while another has prompts left; `deterministic` fixes every rank's part.

    Ranks call this in the same order; it does not communicate.
    """
    return static_queue(world.rank, world.size) if deterministic else PromptQueue(world.queue(), world.size)


class Collector:
    """Collects a step's groups; one per rank. `Rollouts.stop` says when to give up."""

    def __init__(self, config: Config, rollouts: Rollouts, scorer: Scorer, tasks: TaskStream, world: World, log: RunLog,
                 on_finished: OnFinished, on_cut: OnCut = lambda going, failed, claimed: None) -> None:
        self._config, self._rollouts, self._scorer = config, rollouts, scorer
        self._tasks, self._world, self._log, self._on_finished, self._on_cut = tasks, world, log, on_finished, on_cut

    def restore(self, folder: Path, position: dict[str, Any]) -> None:
        """Go on as the state in a checkpoint's trainer/ folder says; `position` is its data position, where the tasks stand."""

    def __call__(self, step: int, known: Records | None = None) -> tuple[Scored, Scored] | None:
        """(all groups this rank rolled out, those of them that are trained), or None when the run was asked to stop.

        Rollouts of the step that are `known` already are taken as they are. Collective. Over all ranks, prompts_per_step
        groups are trained. The two are the same unless rollout.dynamic_sampling replaces groups without signal: see
        `_chosen`.
        """
        config = self._config
        wanted, rounds = config.rollout.prompts_per_step, config.rollout.dynamic_sampling
        rewarded: list[RewardedGroup] = []
        taken = signals = refills = 0
        while True:
            with self._log.timed("data"):
                prompts = self._tasks.take(wanted - signals)     # unread: who claims one reads it
            groups = self._roll_out(prompts, step, taken, known)
            if groups is None:
                return None
            taken += len(prompts)
            with self._log.timed("score"):
                rewarded += self._scorer.score(groups, step + 1)
            self._log.totals(self._scorer.stats())
            scored = score_groups(rewarded, config.hdpo)
            if not rounds:
                return scored, scored
            signals = int(self._world.sum([float(sum(signal_of(scored, config.hdpo)))])[0])
            if signals == wanted or refills == rounds:
                break
            refills += 1
        self._log.add("rollout/groups_with_signal", signals)
        self._log.add("rollout/groups_dropped", max(0, taken - wanted))
        self._log.add("rollout/refills", refills)
        return scored, self._chosen(scored, wanted)

    def position(self) -> dict[str, Any]:
        """Where the data stands, for a checkpoint."""
        return self._tasks.state()

    def snapshot(self, folder: Path) -> Callable[[], list[Path]]:
        """What else a checkpoint of now must hold: call the returned function, on any thread, to write it; it returns files."""
        return list

    def _roll_out(self, prompts: Sequence[Task], step: int, first_index: int, known: Mapping[tuple[int, int], Any] | None,
                  queue: PromptQueue | None = None, carry: Carry | None = None) -> list[tuple[Trajectory, ...]] | None:
        config, world, log = self._config, self._world, self._log
        started = time.monotonic()
        with log.timed("rollout"):
            groups = self._rollouts.collect(
                prompts, queue=queue or prompt_queue(world, config.run.deterministic), first_index=first_index, step=step,
                weight_version=step, group_size=config.rollout.group_size, temperature=config.rollout.temperature,
                known=known, on_finished=self._on_finished, carry=carry)
            stop = self._rollouts.stop
            stopped = world.any(stop is not None and stop.is_set())     # here ranks wait for each other
        self._note(time.monotonic() - started)
        return None if stopped else groups

    def _note(self, seconds: float) -> None:
        """Where the phase's time went: shares of its wall clock, averaged over ranks."""
        found, log = self._rollouts.metrics, self._log
        log.divide("rollout", {"generation": found["rollout/engine_seconds"], "tools": found["rollout/idle_seconds"],
                               "ranks": seconds - found["rollout/seconds"]})
        for name, part in (("engine", found["rollout/engine_seconds"]), ("tools", found["rollout/idle_seconds"]),
                           ("ranks", seconds - found["rollout/seconds"])):
            log.add(f"rollout/share_{name}", part / seconds, weight=seconds)
        log.add("rollout/prefix_hit_rate", found["rollout/cached_prompt_tokens"] / max(1.0, found["rollout/prompt_tokens"]),
                weight=found["rollout/prompt_tokens"])
        log.totals({name: found[name] for name in ("rollout/engine_steps", "rollout/tool_seconds")})
        for name in ("rollout/loop_lag_p99_seconds", "rollout/loop_lag_max_seconds"):
            log.maximum(name, found[name])

    def _chosen(self, scored: Scored, wanted: int) -> Scored:
        """The groups with signal; where they are too few after all rounds, the first of those without fill the places, so
        that mini-batches are as large as they are without dynamic sampling. Collective."""
        signals = signal_of(scored, self._config.hdpo)
        gathered = self._world.gather([(not signal, group.index) for signal, group in zip(signals, scored.groups)])
        chosen = {index for _, index in sorted(entry for part in gathered for entry in part)[:wanted]}
        return score_groups([group for group in scored.groups if group.index in chosen], self._config.hdpo)


def signal_of(scored: Scored, config: HdpoConfig) -> list[bool]:
    """Per group, whether a row of it would move the policy: trained, and with an advantage in a channel that has weight.

    A group that is all correct has no signal in the accuracy channel and may well have one in the tool channel.
    """
    weights, advantages = (config.w_acc, config.w_tool), iter(scored.advantages)
    moved = [[any(w * a for w, a in zip(weights, next(advantages))) for _ in group.rewards] for group in scored.groups]
    return [any(is_trained(t, r, config) and moves for t, r, moves in zip(group.trajectories, group.rewards, rows))
            for group, rows in zip(scored.groups, moved, strict=True)]
