"""A step's groups with rollout.carry_over: what is unfinished when a step ends goes on in the next. The rule is agent/carry.py's.

Every token keeps the log-prob and the version of the weights that it was sampled with. The update's old log-probs are the
trainer's own at its start, for all tokens alike, and each token's loss is weighed by exp(old - sampled), truncated
(hdpo.importance): with tokens of several versions that is the decoupled PPO objective, whose proximal policy is not the one that
sampled (arXiv 2110.00641, section 3; for language models AReaL, arXiv 2505.24298). A row's weights are per token, so a row may
hold several versions.

Prompts are numbered over the whole run, since a step trains prompts of several.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hdpo.agent import carry
from hdpo.agent.carry import Carry, Held
from hdpo.agent.queue import PromptQueue
from hdpo.state.records import RecordFile, Records
from hdpo.train.collect import Collector, Scored, score_groups
from hdpo.types import Carried, Task, Trajectory

FILES = "carried_*.spool"
"""Of a checkpoint's trainer/ folder: one per rank, and any number of ranks may go on with them."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Sampled tokens of trajectories over the run, and how many they are."""

    trained_tokens: float = 0.0
    trained: float = 0.0
    dropped_tokens: float = 0.0
    dropped: float = 0.0

    def bias(self, waiting_tokens: float, waiting: float) -> float:
        """Mean length of the trained over the mean of all that were started, less 1. What is still waiting counts with its
        length so far, so that this comes from below and goes to 0."""
        started = self.trained + self.dropped + waiting
        tokens = self.trained_tokens + self.dropped_tokens + waiting_tokens
        return (self.trained_tokens / self.trained) / (tokens / started) - 1.0 if self.trained and tokens else 0.0


class Carrying(Collector):
    """Collects a step's groups, and holds those of this rank that wait."""

    _held: dict[int, Held] = {}
    _started = 0              # prompts of the run that some rank began
    _lengths = Lengths()

    def restore(self, folder: Path, position: dict[str, Any]) -> None:
        """Each rank takes its share of what was carried, whichever rank held it."""
        self._started = int(position.get("started", 0))
        self._lengths = Lengths(*position.get("lengths", ()))
        found = Records(sorted(folder.glob(FILES)), {})
        mine = list(found.groups().items())[self._world.rank::self._world.size]
        self._held = {index: self._group(found, index, task) for index, task in mine}

    def position(self) -> dict[str, Any]:
        sums = self._lengths
        return {**super().position(), "started": self._started,
                "lengths": [sums.trained_tokens, sums.trained, sums.dropped_tokens, sums.dropped]}

    def snapshot(self, folder: Path) -> Callable[[], list[Path]]:
        held, path = list(self._held.values()), folder / "trainer" / FILES.replace("*", f"{self._world.rank:05d}")

        def write() -> list[Path]:
            with path.open("wb") as file:
                records = RecordFile(file, {})
                for group in held:
                    records.task(group.index, group.task)
                    for trajectory in group.done.values():
                        records.put(trajectory)
                    for carried in group.going.values():
                        records.put(carried)
            return [path]
        return write

    def __call__(self, step: int, known: Records | None = None) -> tuple[Scored, Scored] | None:
        config, world = self._config.rollout, self._world
        held = self._without_old(step)
        wanted, before = config.prompts_per_step, self._tasks.state()
        open_now = carry.open_prompts(wanted, config.carry_over, self._config.optim.steps - step)
        with self._log.timed("data"):
            prompts = self._tasks.take(max(0, open_now - int(world.sum([float(len(held))])[0])))
        if known is not None and known.claimed is not None:
            claimed, groups = known.claimed, self._replayed(prompts, known, held)
        else:
            found = self._collected(prompts, step, known, held, open_now)
            if found is None:
                self._tasks.restore(before)
                return None
            claimed, groups = found
        self._tasks.restore(before)
        self._tasks.take(claimed)        # the others are begun by a later step
        self._started += claimed
        complete = [(carry.may_wait(group.oldest_version(step), step, config.carry_max_versions), index)
                    for index, group in groups.items() if group.complete(config.group_size)]
        chosen = carry.chosen([pair for part in world.gather(complete) for pair in part], wanted)
        trained = [groups[index].trajectories() for index in sorted(groups) if index in chosen]
        self._held = {index: group for index, group in groups.items() if index not in chosen}
        with self._log.timed("score"):
            rewarded = self._scorer.score(trained, step + 1)
        self._log.totals(self._scorer.stats())
        self._note_carried(trained, step)
        scored = score_groups(rewarded, self._config.hdpo)
        return scored, scored

    def _without_old(self, step: int) -> dict[int, Held]:
        limit = self._config.rollout.carry_max_versions
        held = {index: carry.without_old(group, step, limit) for index, group in self._held.items()}
        dropped = [trajectory for index, group in held.items() for sample, trajectory in group.done.items()
                   if trajectory is not self._held[index].done.get(sample)]
        self._rollouts.release(carried.session for index, group in self._held.items()
                               for sample, carried in group.going.items() if sample not in held[index].going)
        self._log.total("carry/dropped", len(dropped))
        tokens, count = self._world.sum([float(sum(t.num_sampled for t in dropped)), float(len(dropped))])
        self._lengths = replace(self._lengths, dropped_tokens=self._lengths.dropped_tokens + tokens,
                                dropped=self._lengths.dropped + count)
        return held

    def _collected(self, prompts: Sequence[Task], step: int, known: Records | None, held: dict[int, Held], open_now: int,
                   ) -> tuple[int, dict[int, Held]] | None:
        """(prompts that were begun, groups of this rank when the step was over), or None when the run was asked to stop."""
        config, world = self._config.rollout, self._world
        awaited = {index for index, group in held.items() if not group.complete(config.group_size)
                   and not carry.may_wait(group.oldest_version(step), step, config.carry_max_versions)}
        all_awaited = int(world.sum([float(len(awaited))])[0])
        complete, arrived, claim = world.queue(), world.queue(), world.queue()

        def completed(index: int) -> None:
            complete(1)
            if index in awaited:
                arrived(1)

        def is_over() -> bool:
            done = complete(0)
            return done >= config.prompts_per_step and carry.is_over(done, config.prompts_per_step, all_awaited - arrived(0))
        carried = Carry(held, open_now, completed, is_over)
        if self._roll_out(prompts, step, self._started, known, PromptQueue(claim, world.size), carried) is None:
            return None
        claimed = min(len(prompts), claim(0))      # all ranks have come out of the rollout by now
        groups = carried.groups
        failed = [trajectory for index, group in groups.items() for sample, trajectory in group.done.items()
                  if not trajectory.end.scorable and not (index in held and sample in held[index].done)]
        self._on_cut([going for group in groups.values() for going in group.going.values()], failed, claimed)
        return claimed, groups

    def _replayed(self, prompts: Sequence[Task], known: Records, held: dict[int, Held]) -> dict[int, Held]:
        """The groups as they were when the step was over in a life of this run that was killed later."""
        mine = range(self._world.rank, known.claimed or 0, self._world.size)
        groups = held | {self._started + n: Held(self._started + n, prompts[n], {}, {}) for n in mine}
        replayed = {index: self._group(known, index, group.task) for index, group in groups.items()}
        for trajectory in (t for group in replayed.values() for t in group.done.values()):
            self._on_finished(trajectory)
        return {index: replace(found, done={**found.done, **groups[index].done}) for index, found in replayed.items()}

    def _group(self, records: Records, index: int, task: Task) -> Held:
        found = {sample: records.get((index, sample)) for sample in range(self._config.rollout.group_size)}
        return Held(index, task, {sample: one for sample, one in found.items() if isinstance(one, Trajectory)},
                    {sample: one for sample, one in found.items() if isinstance(one, Carried)})

    def _note_carried(self, trained: Sequence[tuple[Trajectory, ...]], step: int) -> None:
        """How much of what is trained was sampled by earlier weights, what waits, and whether lengths are those of all."""
        rows = [trajectory for group in trained for trajectory in group]
        ages = [step - version for trajectory in rows for version in trajectory.versions if version >= 0]
        if ages:
            self._log.add("carry/share", sum(map(bool, ages)) / len(ages), weight=len(ages))
            self._log.add("carry/age_mean", sum(ages) / len(ages), weight=len(ages))
            self._log.maximum("carry/age_max", max(ages))
        waiting = [trajectory for group in self._held.values() for trajectory in group.all()]
        sums = self._world.sum([float(value) for some in (rows, waiting)
                                for value in (sum(t.num_sampled for t in some), len(some))])
        self._lengths = replace(self._lengths, trained_tokens=self._lengths.trained_tokens + sums[0],
                                trained=self._lengths.trained + sums[1])
        self._log.total("carry/groups_waiting", len(self._held))
        self._log.total("carry/trajectories_unfinished", sum(len(group.going) for group in self._held.values()))
        self._log.maximum("carry/length_bias", self._lengths.bias(sums[2], sums[3]))
