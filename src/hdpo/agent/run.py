"""What one collection of rollouts keeps while it runs: the state of a call of `Rollouts.collect`."""
from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from hdpo.agent.builder import Segment
from hdpo.agent.carry import Carry
from hdpo.agent.pump import EnginePump
from hdpo.agent.queue import PromptQueue
from hdpo.agent.trajectory import Key
from hdpo.errors import DataError
from hdpo.types import Carried, Task, Trajectory

OnFinished = Callable[[Trajectory], object]


@dataclass(slots=True)
class Run:
    pump: EnginePump
    tasks: Sequence[Task]
    queue: PromptQueue
    numbers: Sequence[int]
    group_size: int
    temperature: float
    step: int
    weight_version: int
    known: Mapping[tuple[int, int], Trajectory | Carried]
    on_finished: OnFinished | None
    most_live: int
    keep: bool = True
    carry: Carry | None = None
    cut: asyncio.Event | None = None      # set when the step is over; None where trajectories are not carried
    group: asyncio.TaskGroup = field(default_factory=asyncio.TaskGroup)
    claimed: dict[int, Task] = field(default_factory=dict)        # by prompt: `tasks` may read a task anew whenever it is asked
    prompts: dict[int, asyncio.Task[Segment | DataError]] = field(default_factory=dict)
    ready: deque[Key] = field(default_factory=deque)     # of claimed prompts, not yet started
    going: dict[Key, Carried] = field(default_factory=dict)       # what goes on, before it is started and after it was cut
    live: int = 0
    done: dict[Key, Trajectory] = field(default_factory=dict)
    left: dict[int, int] = field(default_factory=dict)            # trajectories of a prompt that have yet to end
    clocks: dict[Key, asyncio.Timeout] = field(default_factory=dict)
    stopped: bool = False
    lags: list[float] = field(default_factory=list)
    tool_seconds: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0

    @property
    def over(self) -> bool:
        """Whether nothing further is started."""
        return self.stopped or self.cut is not None and self.cut.is_set()
