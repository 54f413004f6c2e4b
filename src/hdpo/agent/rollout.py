"""Rollouts: one coroutine per trajectory on the background loop, the engine stepped by the calling thread.

No trajectory waits for another's tool, and nothing waits for a batch. A rank keeps a bounded number of trajectories
live; when one ends the next starts, and prompts come from a queue that all ranks may share.
"""
from __future__ import annotations

import asyncio
import logging
import math
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence

from hdpo.agent.carry import POLL_S, Carry, Held
from hdpo.agent.chat import ChatFormat
from hdpo.agent.pump import CLOSE_S, EnginePump
from hdpo.agent.queue import PromptQueue, sampling_seed, static_queue
from hdpo.agent.run import OnFinished, Run
from hdpo.agent.tools import AgentTools, ToolOutcome
from hdpo.agent.trajectory import Key, Live, Player
from hdpo.background import BackgroundLoop, watch_lag
from hdpo.config import RolloutConfig, ToolsConfig
from hdpo.protocols import Engine, Flag, GenerateRequest, ToolBackend
from hdpo.types import Carried, Completion, EndReason, Task, Trajectory

log = logging.getLogger(__name__)

LIVE_PER_SEQUENCE = 1.5
"""Live trajectories per sequence the engine runs at once: the surplus are those that wait for their tools."""
FIRST_SHARE = 0.75
"""Part of its even share that a rank keeps live while others claim from the same queue: see `_most_live`."""


class Rollouts:
    """Collects trajectories. One per process; `collect` is called by the thread that owns the engine.

    `stop`: set this to a Flag; when it is set during `collect`, every live trajectory ends ABORTED, no further one starts
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
        self._calls: dict[str, asyncio.Task[ToolOutcome]] = {}     # under way between steps, by the trajectory's name
        self._nonce = uuid.uuid4().hex[:12]
        self._collections = 0
        self.stop: Flag | None = None
        self.progress: Callable[[], None] = lambda: None
        self.metrics: dict[str, float] = {}

    def collect(self, tasks: Sequence[Task], *, group_size: int, temperature: float, step: int, weight_version: int,
                queue: PromptQueue | None = None, first_index: int = 0, numbers: Sequence[int] | None = None,
                known: Mapping[tuple[int, int], Trajectory | Carried] | None = None, on_finished: OnFinished | None = None,
                keep: bool = True, carry: Carry | None = None) -> list[tuple[Trajectory, ...]]:
        """group_size trajectories of each of `tasks` that `queue` gives to this rank (None: of all), in their order.

        The k-th task is prompt number first_index + k of the step, or numbers[k]: `Trajectory.index`, by which its seeds go.
        `known` holds trajectories of this very step, by (index, sample index): they are taken as they are instead of being
        sampled.
        `on_finished` is called on the background loop for every trajectory, sampled or known, the moment it is there, but
        not for those that `stop` cut short. Groups that it kept from starting as a whole are not returned. Without `keep`
        nothing is returned, and a trajectory with its pictures is forgotten as soon as `on_finished` had it.

        With `carry` its groups are gone on with first, the step may end before its trajectories do, and `carry.groups` hold
        what there is then; they stay as they were when `stop` was set. A trajectory `known` to have been cut goes on from there.

        Raises DataError for a task that cannot be shown; KeyboardInterrupt and failures of the engine abort all requests,
        close all trajectories and are raised again.
        """
        self._collections += 1
        started = time.monotonic()
        queue = queue or static_queue()
        pump = EnginePump(self._engine, self._background.loop, deterministic=self._deterministic, progress=self.progress)
        run = Run(pump, tasks, queue, numbers or range(first_index, first_index + len(tasks)), group_size, temperature, step,
                  weight_version, known or {}, on_finished,
                  most_live=self._most_live((carry.open if carry else len(tasks)) * group_size, queue.ranks), keep=keep,
                  carry=carry, cut=asyncio.Event() if carry else None)
        try:
            groups = pump.drive(self._collect(run), self.stop, lambda: self._abort(run))
        except BaseException:
            self._wait_for_finishes()
            raise
        self.metrics = self._measure(run, time.monotonic() - started)
        return groups

    def close(self) -> None:
        """Wait until the tool server has been told about every ended trajectory. Calls still under way are given up."""
        self._background.run(self._give_up())
        self._wait_for_finishes()
        self._player.close()

    def release(self, names: Iterable[str]) -> None:
        """Trajectories of these names on the tool server are not gone on with."""
        async def release() -> None:
            for name in names:
                if (call := self._calls.pop(name, None)) is not None:
                    call.cancel()
                self._release(name)
        self._background.run(release())

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

    async def _collect(self, run: Run) -> list[tuple[Trajectory, ...]]:
        watch = asyncio.create_task(watch_lag(run.lags))
        try:
            async with run.group:
                for held in sorted(run.carry.groups.values(), key=Held.age) if run.carry else ():
                    self._open(run, held.index, held.task, held)
                self._fill(run)
                if run.carry is not None:
                    run.group.create_task(self._until_over(run, run.carry))
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None     # the first one cancelled the others
        finally:
            watch.cancel()
        if run.carry is not None and not run.stopped:
            run.carry.groups = {index: self._held(run, index, task) for index, task in run.claimed.items()}
        samples = range(run.group_size)
        groups = [[run.done.get(Key(index, sample)) for sample in samples] for index in sorted({k.prompt for k in run.done})]
        return [tuple(t for t in group if t is not None) for group in groups if None not in group]

    def _fill(self, run: Run) -> None:
        """Start trajectories until enough are live; a prompt is claimed when the ones before it have all started."""
        while run.live < run.most_live and not run.over and (run.ready or self._claim(run)):
            key = run.ready.popleft()
            if key not in run.going and key.prompt not in run.prompts:
                run.prompts[key.prompt] = run.group.create_task(self._player.prompt(run.claimed[key.prompt]))
            run.live += 1
            run.pump.started(key)
            run.group.create_task(self._trajectory(run, key))

    def _claim(self, run: Run) -> bool:
        """Claim prompts until one has rollouts to be sampled; False when none is left."""
        while not run.ready:
            number = run.queue.claim()
            if number >= len(run.tasks):
                return False
            self._open(run, run.numbers[number], run.tasks[number])
        return True

    def _open(self, run: Run, index: int, task: Task, held: Held | None = None) -> None:
        """Make a group's rollouts ready, but for those that have ended or are known."""
        run.claimed[index], run.left[index] = task, run.group_size
        for key in (Key(index, sample) for sample in range(run.group_size)):
            found = run.known.get(key)
            if held is not None and key.sample in held.done:
                run.done[key] = held.done[key.sample]
                self._ended(run, key)
            elif isinstance(found, Trajectory) and found.task.id == task.id:
                self._finish(run, key, found)
                self._ended(run, key)
            elif isinstance(found, Carried) and found.so_far.task.id == task.id:
                run.ready.append(key)
                run.going[key] = found
            else:
                run.ready.append(key)
                if held is not None and key.sample in held.going:
                    run.going[key] = held.going[key.sample]

    def _ended(self, run: Run, key: Key) -> None:
        """One rollout less of its group has yet to end; of a whole group, what only rollouts need is forgotten."""
        run.left[key.prompt] -= 1
        if not run.left[key.prompt]:
            run.prompts.pop(key.prompt, None)
            if run.carry is None:
                del run.claimed[key.prompt]
            else:
                run.carry.completed(key.prompt)

    async def _until_over(self, run: Run, carry: Carry) -> None:
        """Cut the step when it is over."""
        while run.live and not run.stopped:
            if carry.is_over():
                assert run.cut is not None
                run.cut.set()
                run.pump.cut()
                return
            await asyncio.sleep(POLL_S)

    def _held(self, run: Run, index: int, task: Task) -> Held:
        keys = [Key(index, sample) for sample in range(run.group_size)]
        return Held(index, task, {key.sample: run.done[key] for key in keys if key in run.done},
                    {key.sample: run.going[key] for key in keys if key in run.going})

    def _finish(self, run: Run, key: Key, trajectory: Trajectory) -> None:
        run.tool_seconds += sum(call.seconds for call in trajectory.calls)
        if run.keep:
            run.done[key] = trajectory
        if run.on_finished is not None and not (run.stopped and trajectory.end is EndReason.ABORTED):
            run.on_finished(trajectory)

    def _abort(self, run: Run) -> None:
        run.stopped = True
        for clock in run.clocks.values():
            if not clock.expired():
                clock.reschedule(self._background.loop.time())

    async def _trajectory(self, run: Run, key: Key) -> None:
        live = self._live(run, key)
        end: EndReason | None = EndReason.ABORTED
        try:
            end = await self._timed(run, live)
            if end is None:
                self._cut(run, live)
                return
            if end in (EndReason.ABORTED, EndReason.INFRASTRUCTURE) and not run.stopped:
                log.warning("task %s, rollout %d: %s: %s", live.task.id, key.sample, end.value, live.error)
            self._finish(run, key, live.record(end, run.weight_version))
            run.live -= 1
            self._ended(run, key)
            self._fill(run)    # before `ended`: a deterministic pump must not step between the two
        finally:
            run.pump.ended(key)
            if end is not None:
                self._release(live.id)

    def _live(self, run: Run, key: Key) -> Live:
        if (carried := run.going.pop(key, None)) is None:
            return Live(key, f"{self._nonce}-{self._collections}-{key.prompt}-{key.sample}", run.claimed[key.prompt])
        live = Live.resumed(carried)
        live.call = self._calls.pop(live.id, None)
        if not live.id.startswith(self._nonce) and any(call.name == "python" for call in live.calls):
            self._backend.expect(live.id)
        return live

    def _cut(self, run: Run, live: Live) -> None:
        """Keep what goes on in the next step; a trajectory without a sampled token is begun anew there."""
        run.live -= 1
        if live.sampled:
            run.going[live.key] = live.carried(run.weight_version)
        if live.call is not None:
            self._calls[live.id] = live.call

    def _release(self, name: str) -> None:
        finishing = asyncio.ensure_future(self._backend.finish(name))
        self._finishing.add(finishing)
        finishing.add_done_callback(self._finishing.discard)

    async def _timed(self, run: Run, live: Live) -> EndReason | None:
        """Play under the trajectory's own clock."""
        async def generate(live: Live, turn: int, max_tokens: int) -> Completion:
            return await self._generate(run, live, turn, max_tokens)
        try:
            async with asyncio.timeout(0 if run.stopped else self._config.max_seconds - live.before) as clock:
                run.clocks[live.key] = clock
                return await self._player.play(live, run.prompts.get(live.key.prompt), generate, run.cut)
        except TimeoutError:
            if not clock.expired():
                raise
            live.error = "the run was stopped" if run.stopped else f"exceeded {self._config.max_seconds:g} s"
            return EndReason.ABORTED
        finally:
            run.clocks.pop(live.key, None)

    async def _generate(self, run: Run, live: Live, turn: int, max_tokens: int) -> Completion:
        builder = live.builder
        completion = await run.pump.generate(live.key, GenerateRequest(
            token_ids=list(builder.compact_ids), images=tuple(builder.images), image_keys=tuple(builder.image_keys),
            max_tokens=max_tokens, temperature=run.temperature, begun=live.begun,
            seed=sampling_seed(self._seed, run.step, live.key.prompt, live.key.sample, turn)))
        if completion.token_ids and completion.weight_version != run.weight_version:
            raise RuntimeError(
                f"the engine sampled with weights {completion.weight_version}, expected {run.weight_version}")
        run.prompt_tokens += len(builder.token_ids)
        run.cached_tokens += completion.num_cached
        return completion

    # -- on the calling thread ------------------------------------------------------------------------------------

    async def _give_up(self) -> None:
        for call in self._calls.values():
            call.cancel()
        self._calls.clear()

    def _wait_for_finishes(self) -> None:
        async def wait() -> None:
            if self._finishing:
                await asyncio.wait(self._finishing, timeout=CLOSE_S)
        self._background.run(wait())

    def _measure(self, run: Run, seconds: float) -> dict[str, float]:
        """Seconds in all, in the engine, and idle (nothing to generate: every live trajectory waited for a tool or an
        image); engine steps; summed seconds of tool calls; lag of the event loop; prompt tokens asked for, and those of
        them that the engine had in its prefix cache."""
        lags = sorted(run.lags) or [0.0]
        return {
            "rollout/seconds": seconds,
            "rollout/engine_steps": float(run.pump.engine_steps),
            "rollout/engine_seconds": run.pump.engine_seconds,
            "rollout/idle_seconds": run.pump.idle_seconds,
            "rollout/tool_seconds": run.tool_seconds,
            "rollout/loop_lag_p99_seconds": lags[math.ceil(0.99 * len(lags)) - 1],
            "rollout/loop_lag_max_seconds": lags[-1],
            "rollout/prompt_tokens": float(run.prompt_tokens),
            "rollout/cached_prompt_tokens": float(run.cached_tokens),
        }
