"""Rollouts: one coroutine per trajectory on the background loop, the engine stepped by the calling thread.

Each trajectory samples, calls, appends, until it ends; none waits for another's tool, and nothing waits for a batch.
"""
from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from hdpo.agent.builder import Segment, TrajectoryBuilder
from hdpo.agent.chat import ChatFormat
from hdpo.agent.images import decode_image
from hdpo.agent.parse import extract_answer
from hdpo.agent.pump import EnginePump, Key
from hdpo.agent.tools import AgentTools, ToolOutcome
from hdpo.background import BackgroundLoop
from hdpo.config import RolloutConfig, ToolsConfig
from hdpo.errors import DataError
from hdpo.protocols import Engine, GenerateRequest, ToolBackend
from hdpo.types import Completion, EndReason, StopReason, Task, ToolCall, Trajectory

log = logging.getLogger(__name__)

LAG_PERIOD_S = 0.05
CLOSE_TIMEOUT_S = 20.0

OnFinished = Callable[[Trajectory], object]
Progress = Callable[[int, int], object]


def sampling_seed(seed: int, step: int, task_id: str, sample_index: int, turn: int) -> int:
    """The seed of one generation: 31 bits, the same on every machine and in every process."""
    name = f"{seed}|{step}|{task_id}|{sample_index}|{turn}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=4).digest(), "big") >> 1


@dataclass(slots=True)
class _Live:
    """A trajectory while it grows."""

    key: Key
    id: str                    # its name on the tool server: unique over runs
    task: Task
    started: float
    builder: TrajectoryBuilder = field(default_factory=TrajectoryBuilder)
    prompt_length: int = 0
    calls: list[ToolCall] = field(default_factory=list)
    turns: list[str] = field(default_factory=list)
    error: str = ""


@dataclass(slots=True)
class _Run:
    """One call of `collect`."""

    pump: EnginePump
    tasks: Sequence[Task]
    temperature: float
    step: int
    weight_version: int
    on_finished: OnFinished | None
    prompts: list[asyncio.Task[Segment]] = field(default_factory=list)
    clocks: dict[Key, asyncio.Timeout] = field(default_factory=dict)
    stopped: bool = False
    lag_max: float = 0.0
    closed: threading.Event = field(default_factory=threading.Event)


class Rollouts:
    """Collects trajectories. One per process; `collect` is called by the thread that owns the engine.

    `stop`: set this to an Event; when it is set during `collect`, every live trajectory ends ABORTED and `collect` returns.
    `metrics` describes the last `collect`: engine steps and seconds, idle seconds (the engine had nothing to do because
    every trajectory was waiting for its tool), summed tool seconds, largest event-loop lag, seconds in all.
    """

    def __init__(self, engine: Engine, chat: ChatFormat, tools_backend: ToolBackend, background: BackgroundLoop,
                 config: RolloutConfig, tools_config: ToolsConfig, max_model_len: int, seed: int = 1,
                 deterministic: bool = False) -> None:
        self._engine, self._chat, self._backend, self._background = engine, chat, tools_backend, background
        self._config, self._max_model_len, self._seed, self._deterministic = config, max_model_len, seed, deterministic
        self._tools = AgentTools(tools_backend, tools_config)
        self._pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="hdpo-images")
        self._finishing: set[asyncio.Task[None]] = set()
        self._nonce = uuid.uuid4().hex[:12]
        self._collections = 0
        self.stop: threading.Event | None = None
        self.metrics: dict[str, float] = {}

    def collect(self, tasks: Sequence[Task], *, group_size: int, temperature: float, step: int, weight_version: int,
                on_finished: OnFinished | None = None, progress: Progress | None = None) -> list[tuple[Trajectory, ...]]:
        """group_size trajectories of every task, one tuple per task in order.

        `on_finished` is called on the background loop the moment a trajectory ends, `progress(done, total)` on this
        thread. Raises DataError for a task that cannot be shown; KeyboardInterrupt and failures of the engine abort all
        requests, close all trajectories and are raised again.
        """
        if not tasks:
            return []
        self._collections += 1
        started = time.monotonic()
        keys = [Key(t, s) for t in range(len(tasks)) for s in range(group_size)]

        def ended(num_live: int) -> None:
            if progress is not None:
                progress(len(keys) - num_live, len(keys))

        pump = EnginePump(self._engine, self._background.loop, keys, deterministic=self._deterministic, on_ended=ended)
        run = _Run(pump, tasks, temperature, step, weight_version, on_finished)
        outcome = self._background.submit(self._collect(run, keys))
        outcome.add_done_callback(lambda _: pump.close())
        try:
            pump.run(self.stop, lambda: self._background.loop.call_soon_threadsafe(self._abort, run))
        except BaseException:
            outcome.cancel()
            pump.abort_all()
            run.closed.wait(CLOSE_TIMEOUT_S)
            self._wait_for_finishes()
            raise
        trajectories = outcome.result()
        self.metrics = self._measure(run, trajectories, time.monotonic() - started)
        return [tuple(trajectories[t * group_size:(t + 1) * group_size]) for t in range(len(tasks))]

    def close(self) -> None:
        """Wait until the tool server has been told about every ended trajectory."""
        self._wait_for_finishes()
        self._pool.shutdown()

    # -- on the background loop -----------------------------------------------------------------------------------

    async def _collect(self, run: _Run, keys: Sequence[Key]) -> list[Trajectory]:
        watch = asyncio.create_task(_watch_lag(run))
        try:
            async with asyncio.TaskGroup() as group:
                run.prompts = [group.create_task(self._prompt(task)) for task in run.tasks]
                rollouts = [group.create_task(self._trajectory(run, key)) for key in keys]
            return [rollout.result() for rollout in rollouts]
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None     # the first one cancelled the others
        finally:
            watch.cancel()
            run.closed.set()

    def _abort(self, run: _Run) -> None:
        run.stopped = True
        for clock in run.clocks.values():
            if not clock.expired():
                clock.reschedule(self._background.loop.time())

    async def _in_pool(self, function: Callable[..., Segment], *arguments: Any) -> Segment:
        """Pixels and long texts are handled in threads: on the loop they would delay every other trajectory."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)

    async def _prompt(self, task: Task) -> Segment:
        """Decoded and tokenised once for all rollouts of the task."""
        def make() -> Segment:
            images = [decode_image(data, f"image {i} of task {task.id}") for i, data in enumerate(task.images)]
            return self._chat.prompt(task.messages, images)
        return await self._in_pool(make)

    async def _trajectory(self, run: _Run, key: Key) -> Trajectory:
        name = f"{self._nonce}-{self._collections}-{key.task}-{key.sample}"
        live = _Live(key, name, run.tasks[key.task], time.monotonic())
        try:
            try:
                async with asyncio.timeout(0 if run.stopped else self._config.max_seconds) as clock:
                    run.clocks[key] = clock
                    end = await self._play(run, live)
            except TimeoutError:
                if not clock.expired():
                    raise
                end = EndReason.ABORTED
                live.error = "the run was stopped" if run.stopped else f"exceeded {self._config.max_seconds:g} s"
            finally:
                run.clocks.pop(key, None)
            trajectory = self._record(run, live, end)
            if end in (EndReason.ABORTED, EndReason.INFRASTRUCTURE) and not run.stopped:
                log.warning("task %s, rollout %d: %s: %s", live.task.id, key.sample, end.value, live.error)
            if run.on_finished is not None:
                run.on_finished(trajectory)
            return trajectory
        finally:
            run.pump.ended(key)
            finishing = asyncio.ensure_future(self._backend.finish(live.id))
            self._finishing.add(finishing)
            finishing.add_done_callback(self._finishing.discard)

    async def _play(self, run: _Run, live: _Live) -> EndReason:
        """Sample, call, append, until it ends."""
        prompt = await asyncio.shield(run.prompts[live.key.task])   # shared: one rollout's clock must not cancel it
        live.builder.append_given(prompt)
        live.prompt_length = len(prompt.expanded_ids)
        for turn in range(self._config.max_turns + 1):
            if (full := self._full(live)) is not None:
                return full
            completion = await self._generate(run, live, turn)
            live.builder.append_sampled(completion)
            live.turns.append(self._chat.decode(completion.token_ids))
            if completion.stop is not StopReason.TOOL_CALL:
                return self._final(live, completion.stop)
            if turn == self._config.max_turns:
                break
            if (end := await self._observe(live)) is not None:
                return end
        return EndReason.MAX_TURNS

    def _response_left(self, live: _Live) -> int:
        return self._config.max_response_tokens - (len(live.builder.token_ids) - live.prompt_length)

    def _context_left(self, live: _Live) -> int:
        return self._max_model_len - len(live.builder.token_ids)

    def _full(self, live: _Live, extra: int = 0) -> EndReason | None:
        """Why no token can be sampled after `extra` more given ones; None if one can."""
        if self._context_left(live) <= extra:
            return EndReason.CONTEXT_FULL
        return EndReason.MAX_TOKENS if self._response_left(live) <= extra else None

    async def _generate(self, run: _Run, live: _Live, turn: int) -> Completion:
        builder = live.builder
        completion = await run.pump.generate(live.key, GenerateRequest(
            token_ids=list(builder.compact_ids), images=tuple(builder.images), image_keys=tuple(builder.image_keys),
            max_tokens=min(self._config.max_turn_tokens, self._response_left(live), self._context_left(live)),
            temperature=run.temperature,
            seed=sampling_seed(self._seed, run.step, live.task.id, live.key.sample, turn)))
        if completion.weight_version != run.weight_version:
            raise RuntimeError(
                f"the engine sampled with weights {completion.weight_version}, expected {run.weight_version}")
        return completion

    def _final(self, live: _Live, stop: StopReason) -> EndReason:
        if stop is StopReason.LENGTH:
            return EndReason.MAX_TOKENS
        if stop is StopReason.ABORTED:
            live.error = "the engine dropped the request"
            return EndReason.ABORTED
        return EndReason.UNPARSEABLE if extract_answer(live.turns[-1]) is None else EndReason.ANSWERED

    async def _observe(self, live: _Live) -> EndReason | None:
        """Execute the turn's call and append what came of it; why the trajectory ends here, if it does."""
        outcome = await self._tools.run(live.id, live.turns[-1], live.task)
        live.calls.append(outcome.call)
        if outcome.call.infrastructure:
            live.error = outcome.error
            return EndReason.INFRASTRUCTURE
        room = max(0, self._config.max_images - len(live.builder.images))
        segment = await self._in_pool(self._observation, outcome, room)
        if (full := self._full(live, len(segment.expanded_ids))) is not None:
            return full
        live.builder.append_given(segment)
        return None

    def _observation(self, outcome: ToolOutcome, max_images: int) -> Segment:
        text, images = outcome.call.observation, []
        for i, data in enumerate(outcome.images):
            try:
                images.append(decode_image(data, f"image {i + 1}"))
            except DataError as exc:
                text += f"\n[{exc}]"
        return self._chat.observation(text, images, self._config.max_observation_tokens, max_images)

    def _record(self, run: _Run, live: _Live, end: EndReason) -> Trajectory:
        builder = live.builder
        return Trajectory(
            task=live.task, sample_index=live.key.sample, token_ids=builder.token_ids, mask=builder.mask,
            log_probs=builder.log_probs, prompt_length=live.prompt_length, images=tuple(builder.images),
            calls=tuple(live.calls), end=end, turns=tuple(live.turns), weight_version=run.weight_version,
            seconds=time.monotonic() - live.started, error=live.error, image_keys=tuple(builder.image_keys))

    # -- on the calling thread ------------------------------------------------------------------------------------

    def _wait_for_finishes(self) -> None:
        async def wait() -> None:
            if self._finishing:
                await asyncio.wait(self._finishing, timeout=CLOSE_TIMEOUT_S)
        self._background.run(wait())

    def _measure(self, run: _Run, trajectories: Sequence[Trajectory], seconds: float) -> dict[str, float]:
        calls = [call for trajectory in trajectories for call in trajectory.calls]
        return {
            "rollout/seconds": seconds,
            "rollout/engine_steps": float(run.pump.engine_steps),
            "rollout/engine_seconds": run.pump.engine_seconds,
            "rollout/idle_seconds": run.pump.idle_seconds,
            "rollout/tool_seconds": sum(call.seconds for call in calls),
            "rollout/loop_lag_max_seconds": run.lag_max,
            "rollout/aborted": float(sum(t.end is EndReason.ABORTED for t in trajectories)),
        }


async def _watch_lag(run: _Run) -> None:
    """How late the event loop wakes a sleeper: whatever blocks it delays every trajectory."""
    while True:
        due = time.monotonic() + LAG_PERIOD_S
        await asyncio.sleep(LAG_PERIOD_S)
        run.lag_max = max(run.lag_max, time.monotonic() - due)
