"""One trajectory: sample, call, append, until it ends.

`Player.play` is a coroutine of the background loop. Pixels and long texts are handled in threads; what it waits for are
its own generation and its own tool call, never another trajectory.
"""
from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from hdpo import oddities
from hdpo.agent.builder import Segment, TrajectoryBuilder
from hdpo.agent.chat import IMAGE_MARKER, ChatFormat
from hdpo.agent.images import TOOL_PIXELS, decode_image
from hdpo.agent.parse import extract_answer
from hdpo.agent.tools import AgentTools, ToolOutcome
from hdpo.config import RolloutConfig
from hdpo.errors import DataError, RequestRefused
from hdpo.types import Carried, Completion, EndReason, StopReason, Task, ToolCall, Trajectory

IMAGE_THREADS = max(1, min(8, (os.cpu_count() or 1) // 2))
"""Half the cores at most: the event loop and the thread that steps the engine must find one free when they wake. With every
core decoding pictures the loop's lag was four times as long (benchmarks/bench_rollout.py, R2)."""

Generate = Callable[["Live", int, int], Awaitable[Completion]]
"""generate(trajectory, turn, max_tokens): the next turn, or the rest of it."""


class Key(NamedTuple):
    """A trajectory: the number of its prompt, over all ranks, and which of the group's rollouts it is."""

    prompt: int
    sample: int


@dataclass(slots=True)
class Live:
    """A trajectory while it grows."""

    key: Key
    id: str                    # its name on the tool server: unique over runs
    task: Task
    started: float = field(default_factory=time.monotonic)
    builder: TrajectoryBuilder = field(default_factory=TrajectoryBuilder)
    prompt_length: int = 0
    calls: list[ToolCall] = field(default_factory=list)
    turns: list[str] = field(default_factory=list)
    error: str = ""
    begun: int = 0             # tokens of the turn under way
    before: float = 0.0        # seconds that it was played for in earlier steps
    call: asyncio.Task[ToolOutcome] | None = None    # under way: it outlives the step that began it

    @property
    def played(self) -> float:
        return self.before + time.monotonic() - self.started

    @property
    def sampled(self) -> bool:
        return bool(self.begun or self.turns)

    def record(self, end: EndReason, weight_version: int) -> Trajectory:
        builder = self.builder
        return Trajectory(
            task=self.task, index=self.key.prompt, sample_index=self.key.sample, token_ids=builder.token_ids,
            mask=builder.mask, log_probs=builder.log_probs, prompt_length=self.prompt_length, images=tuple(builder.images),
            calls=tuple(self.calls), end=end, turns=tuple(self.turns), weight_version=weight_version,
            seconds=self.played, error=self.error, image_keys=tuple(builder.image_keys), versions=builder.versions,
            files=tuple(builder.files))

    def carried(self, weight_version: int) -> Carried:
        """What goes on in the next step; this trajectory is not to be played any more."""
        return Carried(self.record(EndReason.ABORTED, weight_version), self.builder.compact_ids, self.begun, self.id)

    @classmethod
    def resumed(cls, carried: Carried) -> Live:
        """A carried trajectory, to be played on. The record stays as it is."""
        past = carried.so_far
        builder = TrajectoryBuilder(list(carried.compact_ids), list(past.token_ids), list(past.mask), list(past.log_probs),
                                    list(past.versions), list(past.images), list(past.image_keys), list(past.files))
        return cls(Key(past.index, past.sample_index), carried.session, past.task, builder=builder,
                   prompt_length=past.prompt_length, calls=list(past.calls), turns=list(past.turns), begun=carried.begun,
                   before=past.seconds)


class Player:
    """What all trajectories of a process share: the chat format, the tools, the budgets and the threads for pixels."""

    def __init__(self, chat: ChatFormat, tools: AgentTools, config: RolloutConfig, max_model_len: int) -> None:
        self._chat, self._tools, self._config, self._max_model_len = chat, tools, config, max_model_len
        self._pool = ThreadPoolExecutor(IMAGE_THREADS, thread_name_prefix="hdpo-images")

    async def prompt(self, task: Task) -> Segment | DataError:
        """Decoded and tokenised once for all rollouts of the task; why not, for a task that cannot be shown."""
        def make() -> Segment:
            images = [decode_image(data, f"image {i} of task {task.id}") for i, data in enumerate(task.images)]
            return self._chat.prompt(task.messages, images, task.images)
        try:
            return await self._in_pool(make)
        except DataError as exc:
            return exc

    async def play(self, live: Live, prompt: asyncio.Task[Segment | DataError] | None, generate: Generate,
                   cut: asyncio.Event | None = None) -> EndReason | None:
        """Grow `live` until it ends; what was sampled so far stays in it when this is cancelled.

        None once `cut` is set: the trajectory can be carried into the next step. Its call, if one is under way, goes on.
        A trajectory that was carried needs no `prompt`.

        A prompt that can't be shown, or that the engine refuses, ends its trajectories and is not the policy's failure.
        """
        try:
            return await self._grow(live, prompt, generate, cut)
        except (DataError, RequestRefused) as exc:
            refused = isinstance(exc, RequestRefused)
            oddities.count("prompt/refused" if refused else "prompt/unreadable")
            live.error = f"the engine refused the request: {exc}" if refused else str(exc)
            return EndReason.INFRASTRUCTURE

    async def _grow(self, live: Live, prompt: asyncio.Task[Segment | DataError] | None, generate: Generate,
                    cut: asyncio.Event | None) -> EndReason | None:
        if not live.builder.token_ids:
            assert prompt is not None
            segment = await asyncio.shield(prompt)   # shared: one rollout's clock must not cancel it
            if isinstance(segment, DataError):
                raise segment
            live.builder.append_given(segment)
            live.prompt_length = len(segment.expanded_ids)
        while True:
            if len(live.turns) > len(live.calls):
                if len(live.turns) > self._config.max_turns:
                    return EndReason.MAX_TURNS
                if (outcome := await self._call(live, cut)) is None:
                    return None
                if (end := await self._observe(live, outcome)) is not None:
                    return end
            if (full := self._full(live)) is not None:
                return full
            budget = min(self._config.max_turn_tokens - live.begun, self._response_left(live), self._context_left(live))
            completion = await generate(live, len(live.turns), budget)
            live.builder.append_sampled(completion)
            live.begun += len(completion.token_ids)
            if completion.stop is StopReason.CUT:
                return None
            live.turns.append(self._chat.decode(live.builder.token_ids[-live.begun:] if live.begun else []))
            live.begun = 0
            if completion.stop is not StopReason.TOOL_CALL:
                return self._final(live, completion.stop)

    def close(self) -> None:
        self._pool.shutdown()

    async def _in_pool(self, function: Callable[..., Segment], *arguments: Any) -> Segment:
        """Pixels and long texts are handled in threads: on the loop they would delay every other trajectory."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)

    def _response_left(self, live: Live) -> int:
        return self._config.max_response_tokens - (len(live.builder.token_ids) - live.prompt_length)

    def _context_left(self, live: Live) -> int:
        return self._max_model_len - len(live.builder.token_ids)

    def _full(self, live: Live, extra: int = 0) -> EndReason | None:
        """Why no token can be sampled after `extra` more given ones; None if one can."""
        if self._context_left(live) <= extra:
            return EndReason.CONTEXT_FULL
        return EndReason.MAX_TOKENS if self._response_left(live) <= extra else None

    def _final(self, live: Live, stop: StopReason) -> EndReason:
        if stop is StopReason.LENGTH:
            return EndReason.MAX_TOKENS
        if stop is StopReason.ABORTED:
            live.error = "the engine dropped the request"
            return EndReason.ABORTED
        return EndReason.UNPARSEABLE if extract_answer(live.turns[-1]) is None else EndReason.ANSWERED

    async def _call(self, live: Live, cut: asyncio.Event | None) -> ToolOutcome | None:
        """Execute the last turn's call; None when `cut` came first, and the call goes on."""
        if cut is None:
            return await self._tools.run(live.id, live.turns[-1], live.task)
        call = live.call = live.call or asyncio.create_task(self._tools.run(live.id, live.turns[-1], live.task))
        over = asyncio.create_task(cut.wait())
        try:
            await asyncio.wait((call, over), return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            call.cancel()
            await asyncio.wait((call,))
            raise
        finally:
            over.cancel()
        if not call.done():
            return None
        live.call = None
        return call.result()

    async def _observe(self, live: Live, outcome: ToolOutcome) -> EndReason | None:
        """Append what came of the last turn's call; why the trajectory ends here, if it does."""
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
        text, images, files = outcome.call.observation, [], []
        places = text.count(IMAGE_MARKER) == len(outcome.images)
        for i, data in enumerate(outcome.images):
            try:
                images.append(decode_image(data, f"image {i + 1}", TOOL_PIXELS))
                files.append(data)
            except DataError as exc:
                oddities.count("image/tool")
                if places:      # the others keep theirs
                    *before, after = text.split(IMAGE_MARKER, len(images) + 1)
                    text = IMAGE_MARKER.join(before) + after
                text += f"\n[{exc}]"
        return self._chat.observation(text, images, self._config.max_observation_tokens, max_images, files)
