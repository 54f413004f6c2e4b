"""A world whose every word is written in the test: an engine that replays text and a tool server that replays results.

Both implement the protocols of hdpo.protocols; nothing of the subject is replaced.
"""
from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hdpo.agent.chat import ChatFormat
from hdpo.protocols import GenerateRequest, ToolResult
from hdpo.types import Completion, StopReason, Task

if TYPE_CHECKING:
    from torch import Tensor

Script = Callable[[str, GenerateRequest], str]


@dataclass
class _Row:
    request: GenerateRequest
    ids: list[int]
    emitted: int = 0


class ScriptedEngine:
    """`script(prompt text, request)` is what the policy writes. A step gives `max_num_seqs` oldest requests up to
    `tokens_per_step` tokens each. `batches` records which prompts (by length and seed) ran together in each step."""

    def __init__(self, chat: ChatFormat, script: Script, *, max_model_len: int = 4096, max_num_seqs: int = 8,
                 tokens_per_step: int = 16) -> None:
        self.max_model_len, self.max_num_seqs, self.tokens_per_step = max_model_len, max_num_seqs, tokens_per_step
        self._chat, self._script = chat, script
        self._rows: dict[str, _Row] = {}
        self.requests: list[GenerateRequest] = []
        self.batches: list[list[tuple[int, int]]] = []
        self.aborted: list[str] = []
        self.version = 0
        self.on_step: Callable[[], None] = lambda: None

    def add_request(self, request_id: str, request: GenerateRequest) -> None:
        assert request_id not in self._rows
        assert request.token_ids.count(self._chat.image_token_id) == len(request.images) == len(request.image_keys)
        text = self._chat._control.decode(request.token_ids, skip_special_tokens=False)
        reply = self._script(text, request)
        ids = self._chat.encode_turn(reply)
        if not reply.endswith("</tool_call>"):
            ids.append(self._chat.end_of_turn_id)
        self.requests.append(request)
        self._rows[request_id] = _Row(request, ids[:request.max_tokens])

    def step(self) -> list[tuple[str, Completion]]:
        self.on_step()
        batch = list(self._rows.items())[:self.max_num_seqs]
        self.batches.append([(len(row.request.token_ids), row.request.seed) for _, row in batch])
        for _, row in batch:
            row.emitted += self.tokens_per_step
        done = [(name, row) for name, row in batch if row.emitted >= len(row.ids)]
        for name, _ in done:
            del self._rows[name]
        return [(name, self._completion(row)) for name, row in done]

    def _completion(self, row: _Row) -> Completion:
        last = row.ids[-1] if row.ids else None
        stop = {self._chat.tool_call_end_id: StopReason.TOOL_CALL,
                self._chat.end_of_turn_id: StopReason.END_OF_TURN}.get(last, StopReason.LENGTH)
        return Completion(row.ids, [-0.01 * (i + 1) for i in range(len(row.ids))], stop, self.version)

    def num_unfinished(self) -> int:
        return len(self._rows)

    def so_far(self, request_id: str) -> Completion:
        row = self._rows.get(request_id)
        ids = row.ids[:row.emitted] if row else []
        return Completion(ids, [-0.01 * (i + 1) for i in range(len(ids))], StopReason.ABORTED, self.version)

    def abort(self, request_ids: Sequence[str]) -> None:
        for name in request_ids:
            if self._rows.pop(name, None) is not None:
                self.aborted.append(name)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        for _ in weights:
            pass
        self.version = version

    def sleep(self) -> None: ...

    def wake(self) -> None: ...

    def close(self) -> None: ...


def delays(seed: int, most_s: float = 0.02) -> Callable[[str], Awaitable[object]]:
    """For `ScriptedTools.before`: calls that take up to `most_s` seconds, drawn from `seed`."""
    draws = random.Random(seed)
    return lambda action: asyncio.sleep(draws.random() * most_s)


class ScriptedTools:
    """`answer(action, task)` is the tool's result; `before(action)`, if given, is awaited first: a slow or failing tool."""

    def __init__(self, answer: Callable[[str, Task], ToolResult] | None = None,
                 before: Callable[[str], Awaitable[object]] | None = None) -> None:
        self.answer = answer or (lambda action, task: ToolResult("Code execution result:\n7"))
        self.before = before
        self.calls: list[tuple[str, str]] = []
        self.started: list[str] = []
        self.finished: list[str] = []
        self.expected: list[str] = []

    def expect(self, trajectory_id: str) -> None:
        self.expected.append(trajectory_id)

    async def call(self, trajectory_id: str, action: str, task: Task) -> ToolResult:
        self.started.append(trajectory_id)
        if self.before is not None:
            await self.before(action)
        else:
            await asyncio.sleep(0)
        self.calls.append((trajectory_id, action))
        return self.answer(action, task)

    async def finish(self, trajectory_id: str) -> None:
        self.finished.append(trajectory_id)

    async def close(self) -> None: ...
