"""What is carried from one step into the next (rollout.carry_over), and the rule by which a step ends and groups are trained.

A step has more prompts open than it trains. It is over as soon as `wanted` groups are complete over all ranks and none is
incomplete that may not wait any longer; what is unfinished then goes on in the next step from where it stands (partial
rollouts, APRIL, arXiv 2509.18521). Of the complete groups those that may not wait are trained, then those of the oldest prompts;
the others wait too. So every prompt that was started is trained, in time, whatever the length of its answers: nothing is chosen
by how soon it ended but the step in which it is trained.

A group whose oldest token was sampled `max_versions` - 1 steps ago may not wait: no token that is trained is ever older. One
that is older all the same (the limit was lowered for a resumed run) has its trajectories dropped, which leaves them unscored.

A group belongs to the rank that started it.
"""
from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from hdpo.types import Carried, EndReason, Task, Trajectory

POLL_S = 0.05
"""How often a rank looks whether the step is over, seconds."""


@dataclass(frozen=True, slots=True)
class Held:
    """A group that was started and is not trained yet; samples that are in neither mapping are still to be started."""

    index: int
    task: Task
    done: Mapping[int, Trajectory]
    going: Mapping[int, Carried]

    def complete(self, group_size: int) -> bool:
        return len(self.done) == group_size

    def oldest_version(self, now: int) -> int:
        """Of the weights that sampled any of its tokens; `now` when there are none."""
        return min((trajectory.oldest_version for trajectory in self.all()), default=now)

    def all(self) -> list[Trajectory]:
        """Those that have ended and, as they stand, those that go on."""
        return [*self.done.values(), *(carried.so_far for carried in self.going.values())]

    def age(self) -> tuple[int, int]:
        """Sorts the oldest first."""
        return self.oldest_version(sys.maxsize), self.index

    def trajectories(self) -> tuple[Trajectory, ...]:
        return tuple(self.done[sample] for sample in sorted(self.done))


def open_prompts(wanted: int, carry_over: float, steps_left: int) -> int:
    """Prompts that a step has open, carried ones included: no more than there are steps to train them in."""
    return min(math.ceil(wanted * (1 + carry_over)), wanted * steps_left)


def may_wait(oldest_version: int, step: int, max_versions: int) -> bool:
    """Whether a group with such tokens can be trained after `step` and still be young enough."""
    return step + 1 - oldest_version < max_versions


def too_old(oldest_version: int, step: int, max_versions: int) -> bool:
    return step - oldest_version >= max_versions


def is_over(complete: int, wanted: int, awaited: int) -> bool:
    """Whether a step is over with so many groups complete and so many incomplete ones that may not wait."""
    return complete >= wanted and awaited <= 0


def chosen(complete: Iterable[tuple[bool, int]], wanted: int) -> set[int]:
    """The numbers of the groups that are trained, of those that are complete: (may wait, number of its prompt)."""
    return {index for _, index in sorted(complete)[:wanted]}


def without_old(held: Held, step: int, max_versions: int) -> Held:
    """The group with the trajectories that are too old ended as ABORTED: they are unscored, and the others what they were."""
    def dropped(trajectory: Trajectory) -> Trajectory:
        if not too_old(trajectory.oldest_version, step, max_versions):
            return trajectory
        return replace(trajectory, end=EndReason.ABORTED, error=f"older than rollout.carry_max_versions ({max_versions})")

    done = {sample: dropped(trajectory) for sample, trajectory in held.done.items()}
    going = {sample: dropped(carried.so_far) for sample, carried in held.going.items()}
    ended = {sample: trajectory for sample, trajectory in going.items() if trajectory.error}
    return replace(held, done=done | ended, going={s: c for s, c in held.going.items() if s not in ended})


@dataclass(slots=True)
class Carry:
    """For one collection: the groups to go on with, and what is known of the step over all ranks.

    `completed` is called once for every group of this rank that becomes complete, `is_over` every POLL_S; both on the background
    loop, where they must not block for long. Afterwards `groups` are all that this rank holds, complete ones included.
    """

    groups: dict[int, Held]
    open: int = 0              # prompts that are open in the step, over all ranks
    completed: Callable[[int], object] = lambda index: None
    is_over: Callable[[], bool] = lambda: False
