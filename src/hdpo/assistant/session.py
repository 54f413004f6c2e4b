"""The agent as in training: one question is one trajectory, played by the same `Player`, with the same tools and budgets.

Questions are coroutines of the background loop, any number at once; `Assistant.drive` steps the engine for them on the
calling thread.
"""
from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
import uuid
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from hdpo.agent.builder import Segment
from hdpo.agent.chat import IMAGE_MARKER, ChatFormat
from hdpo.agent.own_calls import own_examples
from hdpo.agent.parse import ParsedCall, extract_answer, parse_tool_call
from hdpo.agent.pump import CLOSE_S, EnginePump
from hdpo.agent.queue import sampling_seed
from hdpo.agent.tools import AgentTools
from hdpo.agent.trajectory import Key, Live, Player
from hdpo.assistant.speech import Hear, Reply, Seen, Spoken, TurnEnded, outside_reasoning
from hdpo.background import BackgroundLoop
from hdpo.config import Config
from hdpo.errors import DataError
from hdpo.protocols import Engine, Flag, GenerateRequest, ToolBackend
from hdpo.types import Completion, EndReason, StopReason, Task

T = TypeVar("T")
PERIOD_S = 0.04
"""Between two tellings of a turn that is being sampled, seconds."""


def user_text(text: str, num_images: int) -> str:
    """A user's words as a message's content: the pictures stand where its `<image>` markers say, or before it. A marker more
    or less is no marker."""
    if text.count(IMAGE_MARKER) == num_images:
        return text
    return IMAGE_MARKER * num_images + text.replace(IMAGE_MARKER, "< image >")


@dataclass(frozen=True, slots=True)
class Question:
    """`messages` hold one `<image>` marker for each of `images`, which are encoded files at their original size."""

    messages: list[dict[str, str]]
    images: tuple[bytes, ...] = ()
    temperature: float = 0.0             # 0 is greedy
    max_tokens: int = 0                  # sampled over all turns; 0 leaves it to rollout.max_response_tokens
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Opened:
    """A question whose pictures were decoded and whose prompt fits."""

    question: Question
    live: Live
    prompt: asyncio.Task[Segment | DataError]


class Assistant:
    """One per process. `close` it after the last `drive`."""

    def __init__(self, engine: Engine, chat: ChatFormat, backend: ToolBackend, background: BackgroundLoop,
                 config: Config) -> None:
        self._engine, self._chat, self._backend, self._background, self._config = engine, chat, backend, background, config
        self._player = Player(chat, AgentTools(backend, config.tools), config.rollout, config.max_model_len)
        self._own = own_examples(config.tools)
        self._pump = EnginePump(engine, background.loop)
        self._name, self._numbers = uuid.uuid4().hex[:12], itertools.count()
        self._finishing: set[asyncio.Task[None]] = set()

    def drive(self, work: Coroutine[Any, Any, T], stop: Flag | None = None,
              on_stop: Callable[[], object] = lambda: None) -> T:
        """Step the engine until `work`, on the background loop, is done. `on_stop` is called there once `stop` is set.

        Whatever ends this thread's part, Ctrl-C for one, cancels `work` and drops its requests.
        """
        self._pump = EnginePump(self._engine, self._background.loop)
        return self._pump.drive(work, stop, on_stop)

    def close(self) -> None:
        """Wait until the tool server knows of all ended questions."""
        async def wait() -> None:
            if self._finishing:
                await asyncio.wait(self._finishing, timeout=CLOSE_S)
        self._background.run(wait())
        self._player.close()

    # -- coroutines of the background loop ----------------------------------------------------------------------------

    async def open(self, question: Question) -> Opened:
        """Raises DataError for a question that can't be shown to this model."""
        most = self._config.rollout.max_images
        if len(question.images) > most:
            raise DataError(f"the conversation has {len(question.images)} images, rollout.max_images is {most}")
        number = next(self._numbers)
        task = Task("question", "ask", question.messages, question.images, "")
        prompt = asyncio.create_task(self._player.prompt(task))
        segment = await prompt
        if isinstance(segment, DataError):
            raise segment
        length, limit = len(segment.expanded_ids), self._config.data.max_prompt_tokens
        if length > limit:
            raise DataError(f"the prompt has {length} tokens with its images, data.max_prompt_tokens is {limit}")
        return Opened(question, Live(Key(number, 0), f"{self._name}-{number}", task), prompt)

    async def answer(self, opened: Opened, hear: Hear) -> Reply:
        """Play the trajectory to its end. Cancelling it drops the request and closes the tools' session."""
        live = opened.live
        listener = _Listener(self, opened, hear)
        try:
            try:
                async with asyncio.timeout(self._config.rollout.max_seconds):
                    end = await self._player.play(live, opened.prompt, listener.generate)
                assert end is not None, "nothing cuts it"
            except TimeoutError:
                end, live.error = EndReason.ABORTED, f"exceeded {self._config.rollout.max_seconds:g} s (rollout.max_seconds)"
            listener.observed()
        finally:
            finishing = asyncio.ensure_future(self._backend.finish(live.id))
            self._finishing.add(finishing)
            finishing.add_done_callback(self._finishing.discard)
        return self._reply(live, end)

    def _reply(self, live: Live, end: EndReason) -> Reply:
        last = live.turns[-1] if live.turns else ""
        answer = extract_answer(last) if end is EndReason.ANSWERED else None
        sampled = sum(live.builder.mask)
        return Reply(outside_reasoning(last) if answer is None else answer, answer is not None, end, tuple(live.calls),
                     len(live.builder.mask) - sampled, sampled, time.monotonic() - live.started, live.error)

    async def sample(self, opened: Opened, turn: int, max_tokens: int, hear: Hear) -> Completion:
        """The next turn, told piece by piece."""
        question, live, loop = opened.question, opened.live, self._background.loop
        if question.max_tokens:
            max_tokens = min(max_tokens, question.max_tokens - sum(live.builder.mask))
        if max_tokens < 1:
            return Completion([], [], StopReason.LENGTH, 0)
        spoken, due = Spoken(self._chat.decode, hear), 0.0

        def tell(token_ids: list[int]) -> None:
            with contextlib.suppress(OSError):        # nobody listens any more: the last telling says so to who waits
                spoken.so_far(token_ids)

        def watch(token_ids: list[int]) -> None:      # on the engine's thread
            nonlocal due
            if time.monotonic() >= due:
                due = time.monotonic() + PERIOD_S
                loop.call_soon_threadsafe(tell, list(token_ids))

        completion = await self._pump.generate(live.key, GenerateRequest(
            token_ids=list(live.builder.compact_ids), images=tuple(live.builder.images), max_tokens=max_tokens,
            temperature=question.temperature, seed=sampling_seed(question.seed, 0, 0, 0, turn),
            image_keys=tuple(live.builder.image_keys), watch=watch))
        spoken.so_far(completion.token_ids, last=True)
        text = self._chat.decode(completion.token_ids)
        called = completion.stop is StopReason.TOOL_CALL
        parsed = parse_tool_call(text, self._config.tools.offered, self._own) if called else None
        name, arguments = (parsed.name, parsed.arguments) if isinstance(parsed, ParsedCall) else ("", None)
        hear(TurnEnded(text, called, name, arguments))
        return completion


class _Listener:
    """Tells of what was observed when the next turn begins, and at the end."""

    def __init__(self, assistant: Assistant, opened: Opened, hear: Hear) -> None:
        self._assistant, self._opened, self._hear = assistant, opened, hear
        self._calls = 0
        self._images: int | None = None

    async def generate(self, live: Live, turn: int, max_tokens: int) -> Completion:
        self.observed()
        return await self._assistant.sample(self._opened, turn, max_tokens, self._hear)

    def observed(self) -> None:
        live = self._opened.live
        known = len(live.builder.images) if self._images is None else self._images
        if len(live.calls) > self._calls:
            self._hear(Seen(live.calls[-1], tuple(live.builder.images[known:])))
        self._calls, self._images = len(live.calls), len(live.builder.images)
