"""Rollouts: one coroutine per trajectory on the background loop, the engine stepped by the calling thread.

No trajectory waits for another's tool, and nothing waits for a batch. A rank keeps a bounded number of trajectories
live; when one ends the next starts, and prompts come from a queue that all ranks may share.
"""
from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
import math
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from hdpo.agent.builder import Segment
from hdpo.agent.chat import ChatFormat
from hdpo.agent.pump import EnginePump
from hdpo.agent.tools import AgentTools
from hdpo.agent.trajectory import Key, Live, Player
from hdpo.background import BackgroundLoop
from hdpo.config import RolloutConfig, ToolsConfig
from hdpo.errors import DataError
from hdpo.protocols import Engine, GenerateRequest, ToolBackend
from hdpo.types import Completion, EndReason, Task, Trajectory

log = logging.getLogger(__name__)

LAG_PERIOD_S = 0.02
CLOSE_TIMEOUT_S = 20.0
LIVE_PER_SEQUENCE = 1.5
"""Live trajectories per sequence the engine runs at once: the surplus are those that wait for their tools."""
FIRST_SHARE = 0.75
"""Part of its even share that a rank keeps live while others claim from the same queue: see `_most_live`."""

OnFinished = Callable[[Trajectory], object]


class PromptQueue(NamedTuple):
    """Where a rank's prompts come from: `claim()` gives the number of its next one, at or beyond the end when none is left.

    `claim` is called on the background loop and must not block for long. `ranks` is how many claim from this queue.
    """

    claim: Callable[[], int]
    ranks: int = 1


def static_queue(rank: int = 0, ranks: int = 1) -> PromptQueue:
    """Every `ranks`-th prompt, whatever the others do: what a rank rolls out depends on nothing but its number."""
    return PromptQueue(itertools.count(rank, ranks).__next__)


def sampling_seed(seed: int, step: int, prompt: int, sample_index: int, turn: int) -> int:
    """The seed of one generation: 31 bits, the same on every machine and in every process.

    `prompt` is the prompt's number in the step, not the task's name: a task that comes twice in a step gets twice as many
    different rollouts, and tasks of two files that bear the same name don't share random numbers.
    """
    name = f"{seed}|{step}|{prompt}|{sample_index}|{turn}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=4).digest(), "big") >> 1


@dataclass(slots=True)
class _Run:
    """One call of `collect`."""

    pump: EnginePump
    tasks: Sequence[Task]
    queue: PromptQueue
    numbers: Sequence[int]
    group_size: int
    temperature: float
    step: int
    weight_version: int
    known: Mapping[tuple[int, int], Trajectory]
    on_finished: OnFinished | None
    most_live: int
    keep: bool = True
    group: asyncio.TaskGroup = field(default_factory=asyncio.TaskGroup)
    claimed: dict[int, Task] = field(default_factory=dict)        # by prompt: `tasks` may read a task anew whenever it is asked
    prompts: dict[int, asyncio.Task[Segment | DataError]] = field(default_factory=dict)
    ready: deque[Key] = field(default_factory=deque)     # of claimed prompts, not yet started
    live: int = 0
    done: dict[Key, Trajectory] = field(default_factory=dict)
    left: dict[int, int] = field(default_factory=dict)            # trajectories of a prompt that have yet to end
    clocks: dict[Key, asyncio.Timeout] = field(default_factory=dict)
    stopped: bool = False
    lags: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    closed: threading.Event = field(default_factory=threading.Event)


class Rollouts:
    """Collects trajectories. One per process; `collect` is called by the thread that owns the engine.

    `stop`: set this to an Event; when it is set during `collect`, every live trajectory ends ABORTED, no further one starts
    and `collect` returns. `progress`: set it to what is to be called whenever generations have finished.
    `metrics` describes the last `collect`; see `_measure`.
    """

    def __init__(self, engine: Engine, chat: ChatFormat, tools_backend: ToolBackend, background: BackgroundLoop,
                 config: RolloutConfig, tools_config: ToolsConfig, max_model_len: int, seed: int = 1,
                 deterministic: bool = False) -> None:
        self._engine, self._backend, self._background = engine, tools_backend, background
        self._config, self._seed, self._deterministic = config, seed, deterministic
        self._player = Player(chat, AgentTools(tools_backend, tools_config), config, max_model_len)
        self._finishing: set[asyncio.Task[None]] = set()
        self._nonce = uuid.uuid4().hex[:12]
        self._collections = 0
        self.stop: threading.Event | None = None
        self.progress: Callable[[], None] = lambda: None
        self.metrics: dict[str, float] = {}

    def collect(self, tasks: Sequence[Task], *, group_size: int, temperature: float, step: int, weight_version: int,
                queue: PromptQueue | None = None, first_index: int = 0, numbers: Sequence[int] | None = None,
                known: Mapping[tuple[int, int], Trajectory] | None = None, on_finished: OnFinished | None = None,
                keep: bool = True) -> list[tuple[Trajectory, ...]]:
        """group_size trajectories of each of `tasks` that `queue` gives to this rank (None: of all), in their order.

        The k-th task is prompt number first_index + k of the step, or numbers[k]: `Trajectory.index`, by which its seeds go.
        `known` holds trajectories of this very step, by (index, sample index): they are taken as they are instead of being
        sampled.
        `on_finished` is called on the background loop for every trajectory, sampled or known, the moment it is there, but
        not for those that `stop` cut short. Groups that it kept from starting as a whole are not returned. Without `keep`
        nothing is returned, and a trajectory with its pictures is forgotten as soon as `on_finished` had it.

        Raises DataError for a task that cannot be shown; KeyboardInterrupt and failures of the engine abort all requests,
        close all trajectories and are raised again.
        """
        self._collections += 1
        started = time.monotonic()
        queue = queue or static_queue()
        pump = EnginePump(self._engine, self._background.loop, deterministic=self._deterministic, progress=self.progress)
        run = _Run(pump, tasks, queue, numbers or range(first_index, first_index + len(tasks)), group_size, temperature, step,
                   weight_version, known or {}, on_finished,
                   most_live=self._most_live(len(tasks) * group_size, queue.ranks), keep=keep)
        outcome = self._background.submit(self._collect(run))
        outcome.add_done_callback(lambda _: pump.close())
        try:
            pump.run(self.stop, lambda: self._background.loop.call_soon_threadsafe(self._abort, run))
        except BaseException:
            outcome.cancel()
            pump.abort_all()
            run.closed.wait(CLOSE_TIMEOUT_S)
            self._wait_for_finishes()
            raise
        groups = outcome.result()
        self.metrics = self._measure(run, time.monotonic() - started)
        return groups

    def close(self) -> None:
        """Wait until the tool server has been told about every ended trajectory."""
        self._wait_for_finishes()
        self._player.close()

    def _most_live(self, trajectories: int, ranks: int) -> int:
        """How many trajectories of a collection this rank keeps live at once.

        Never more than the engine can use. Where ranks share the queue, no more than FIRST_SHARE of an even share: a rank
        keeps that many live by claiming prompts as others end, so that the rest of the work goes to whoever is ahead.
        Less would starve engines and start the longest trajectories late, more would leave nothing to share
        (simulated in benchmarks/rollout_queue.py).
        """
        cap = math.ceil(LIVE_PER_SEQUENCE * self._config.max_num_seqs)
        return cap if ranks == 1 else max(1, min(cap, math.ceil(FIRST_SHARE * trajectories / ranks)))

    # -- on the background loop -----------------------------------------------------------------------------------

    async def _collect(self, run: _Run) -> list[tuple[Trajectory, ...]]:
        watch = asyncio.create_task(_watch_lag(run))
        try:
            async with run.group:
                self._fill(run)
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None     # the first one cancelled the others
        finally:
            watch.cancel()
            run.closed.set()
        samples = range(run.group_size)
        groups = [[run.done.get(Key(index, sample)) for sample in samples] for index in sorted({k.prompt for k in run.done})]
        return [tuple(t for t in group if t is not None) for group in groups if None not in group]

    def _fill(self, run: _Run) -> None:
        """Start trajectories until enough are live; a prompt is claimed when the ones before it have all started."""
        while run.live < run.most_live and not run.stopped and (run.ready or self._claim(run)):
            key = run.ready.popleft()
            run.live += 1
            run.pump.started(key)
            run.group.create_task(self._trajectory(run, key))

    def _claim(self, run: _Run) -> bool:
        """Claim prompts until one has rollouts to be sampled; False when none is left."""
        while not run.ready:
            number = run.queue.claim()
            if number >= len(run.tasks):
                return False
            index, task = run.numbers[number], run.tasks[number]
            for key in (Key(index, sample) for sample in range(run.group_size)):
                found = run.known.get(key)
                if found is not None and found.task.id == task.id:
                    self._finish(run, key, found)
                else:
                    run.ready.append(key)
            if run.ready:
                run.claimed[index], run.left[index] = task, len(run.ready)
                run.prompts[index] = run.group.create_task(self._player.prompt(task))
        return True

    def _finish(self, run: _Run, key: Key, trajectory: Trajectory) -> None:
        if run.keep:
            run.done[key] = trajectory
        if run.on_finished is not None and not (run.stopped and trajectory.end is EndReason.ABORTED):
            run.on_finished(trajectory)

    def _abort(self, run: _Run) -> None:
        run.stopped = True
        for clock in run.clocks.values():
            if not clock.expired():
                clock.reschedule(self._background.loop.time())

    async def _trajectory(self, run: _Run, key: Key) -> None:
        name = f"{self._nonce}-{self._collections}-{key.prompt}-{key.sample}"
        live = Live(key, name, run.claimed[key.prompt])
        try:
            end = await self._timed(run, live)
            if end in (EndReason.ABORTED, EndReason.INFRASTRUCTURE) and not run.stopped:
                log.warning("task %s, rollout %d: %s: %s", live.task.id, key.sample, end.value, live.error)
            self._finish(run, key, live.record(end, run.weight_version))
            run.live -= 1
            run.left[key.prompt] -= 1
            if not run.left[key.prompt]:
                del run.claimed[key.prompt], run.prompts[key.prompt]
            self._fill(run)    # before `ended`: a deterministic pump must not step between the two
        finally:
            run.pump.ended(key)
            finishing = asyncio.ensure_future(self._backend.finish(live.id))
            self._finishing.add(finishing)
            finishing.add_done_callback(self._finishing.discard)

    async def _timed(self, run: _Run, live: Live) -> EndReason:
        """Play under the trajectory's own clock."""
        async def generate(live: Live, turn: int, max_tokens: int) -> Completion:
            return await self._generate(run, live, turn, max_tokens)
        try:
            async with asyncio.timeout(0 if run.stopped else self._config.max_seconds) as clock:
                run.clocks[live.key] = clock
                return await self._player.play(live, run.prompts[live.key.prompt], generate)
        except TimeoutError:
            if not clock.expired():
                raise
            live.error = "the run was stopped" if run.stopped else f"exceeded {self._config.max_seconds:g} s"
            return EndReason.ABORTED
        finally:
            run.clocks.pop(live.key, None)

    async def _generate(self, run: _Run, live: Live, turn: int, max_tokens: int) -> Completion:
        builder = live.builder
        completion = await run.pump.generate(live.key, GenerateRequest(
            token_ids=list(builder.compact_ids), images=tuple(builder.images), image_keys=tuple(builder.image_keys),
            max_tokens=max_tokens, temperature=run.temperature,
            seed=sampling_seed(self._seed, run.step, live.key.prompt, live.key.sample, turn)))
        if completion.weight_version != run.weight_version:
            raise RuntimeError(
                f"the engine sampled with weights {completion.weight_version}, expected {run.weight_version}")
        run.prompt_tokens += len(builder.token_ids)
        run.cached_tokens += completion.num_cached
        return completion

    # -- on the calling thread ------------------------------------------------------------------------------------

    def _wait_for_finishes(self) -> None:
        async def wait() -> None:
            if self._finishing:
                await asyncio.wait(self._finishing, timeout=CLOSE_TIMEOUT_S)
        self._background.run(wait())

    def _measure(self, run: _Run, seconds: float) -> dict[str, float]:
        """Seconds in all, in the engine, and idle (nothing to generate: every live trajectory waited for a tool or an
        image); engine steps; summed seconds of tool calls; lag of the event loop; prompt tokens asked for, and those of
        them that the engine had in its prefix cache."""
        calls = [call for trajectory in run.done.values() for call in trajectory.calls]
        lags = sorted(run.lags) or [0.0]
        return {
            "rollout/seconds": seconds,
            "rollout/engine_steps": float(run.pump.engine_steps),
            "rollout/engine_seconds": run.pump.engine_seconds,
            "rollout/idle_seconds": run.pump.idle_seconds,
            "rollout/tool_seconds": sum(call.seconds for call in calls),
            "rollout/loop_lag_p99_seconds": lags[math.ceil(0.99 * len(lags)) - 1],
            "rollout/loop_lag_max_seconds": lags[-1],
            "rollout/prompt_tokens": float(run.prompt_tokens),
            "rollout/cached_prompt_tokens": float(run.cached_tokens),
        }


async def _watch_lag(run: _Run) -> None:
    """How late the event loop wakes a sleeper, seconds: whatever blocks it delays every trajectory."""
    while True:
        due = time.monotonic() + LAG_PERIOD_S
        await asyncio.sleep(LAG_PERIOD_S)
        run.lags.append(max(0.0, time.monotonic() - due))
