"""What bench_rollout.py rolls out in: an engine and tools that take time and compute nothing, with a plan known beforehand.

`TimedEngine` and `TimedTools` implement hdpo.protocols.Engine and ToolBackend. Everything between them is the real code:
queue, coroutines, pump, tokenizer, images, tool client.
"""
from __future__ import annotations

import asyncio
import io
import math
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from PIL import Image

from hdpo.agent.chat import ChatFormat, load_chat_format
from hdpo.agent.parse import EXAMPLES
from hdpo.agent.queue import sampling_seed
from hdpo.protocols import GenerateRequest, ToolResult
from hdpo.types import Completion, StopReason, Task

SEED, STEP = 1, 0
CALL = EXAMPLES["python"]
ANSWER = "<answer>4</answer>"


def toy_chat(max_pixels: int = 4096) -> ChatFormat:
    return load_chat_format(str(resources.files("hdpo") / "toyworld" / "assets" / "toy-base"), 4096, max_pixels)


@dataclass(frozen=True)
class Turn:
    tokens: int
    tool_s: float | None       # latency of the call that ends this turn; None: it answers


@dataclass
class Plan:
    """What every trajectory (prompt, sample) is going to do, and the request seeds by which the engine knows it."""

    turns: dict[tuple[int, int], list[Turn]]
    by_seed: dict[int, Turn] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for (prompt, sample), turns in self.turns.items():
            for number, turn in enumerate(turns):
                self.by_seed[sampling_seed(SEED, STEP, prompt, sample, number)] = turn

    @property
    def num_turns(self) -> int:
        return sum(map(len, self.turns.values()))


def heavy_tailed(prompts: int, group_size: int, seed: int, *, tokens: float = 150.0, tool_s: float = 0.15,
                 calls: float = 2.5, most_calls: int = 9) -> Plan:
    """Lognormal turn lengths (sigma 0.6) and tool latencies (sigma 1.0), exponential numbers of calls."""
    coin = random.Random(seed)

    def trajectory() -> list[Turn]:
        latencies: list[float | None] = [tool_s * coin.lognormvariate(0, 1.0)
                                         for _ in range(min(most_calls, int(coin.expovariate(1 / calls))))]
        return [Turn(max(40, int(tokens * coin.lognormvariate(0, 0.6))), latency) for latency in [*latencies, None]]
    return Plan({(p, s): trajectory() for p in range(prompts) for s in range(group_size)})


class TimedEngine:
    """A step takes `step_s` seconds and gives each of the `max_num_seqs` oldest requests `tokens_per_step` tokens."""

    def __init__(self, chat: ChatFormat, plan: Plan, *, max_num_seqs: int, step_s: float = 0.01, tokens_per_step: int = 8,
                 max_model_len: int = 1 << 20) -> None:
        self.max_model_len, self.max_num_seqs = max_model_len, max_num_seqs
        self.step_s, self.tokens_per_step = step_s, tokens_per_step
        self._plan = plan
        self._filler = chat.encode_turn(" so")[:1]
        self._ends = {True: chat.encode_turn(CALL), False: [*chat.encode_turn(ANSWER), chat.end_of_turn_id]}
        self._rows: dict[str, list[Any]] = {}     # [request, tokens made]

    def add_request(self, request_id: str, request: GenerateRequest) -> None:
        self._rows[request_id] = [request, 0]

    def step(self) -> list[tuple[str, Completion]]:
        if self.step_s:
            time.sleep(self.step_s)
        finished = []
        for name, row in list(self._rows.items())[:self.max_num_seqs]:
            row[1] += self.tokens_per_step
            turn = self._plan.by_seed[row[0].seed]
            if row[1] >= turn.tokens:
                del self._rows[name]
                finished.append((name, self._completion(turn)))
        return finished

    def _completion(self, turn: Turn) -> Completion:
        calls = turn.tool_s is not None
        end = self._ends[calls]
        ids = self._filler * max(0, turn.tokens - len(end)) + end
        return Completion(ids, [-0.5] * len(ids), StopReason.TOOL_CALL if calls else StopReason.END_OF_TURN, 0)

    def steps_of(self, turn: Turn) -> int:
        return math.ceil(turn.tokens / self.tokens_per_step)

    def lower_bound(self, step_s: float) -> float:
        """Seconds that no order of work can beat: the longest trajectory by itself, or all tokens at full batches.

        `step_s` is what a step really took: a busy machine wakes a sleeper late, which is not the scheduler's doing.
        """
        longest = max(sum(self.steps_of(turn) * step_s + (turn.tool_s or 0.0) for turn in turns)
                      for turns in self._plan.turns.values())
        steps = sum(self.steps_of(turn) for turns in self._plan.turns.values() for turn in turns)
        return max(longest, steps / self.max_num_seqs * step_s)

    def so_far(self, request_id: str) -> Completion:
        made = self._rows[request_id][1] if request_id in self._rows else 0
        return Completion(self._filler * made, [-0.5] * made, StopReason.ABORTED, 0)

    def num_unfinished(self) -> int:
        return len(self._rows)

    def abort(self, request_ids: Sequence[str]) -> None:
        for name in request_ids:
            self._rows.pop(name, None)

    def load_weights(self, weights: Iterable[tuple[str, Any]], version: int) -> None: ...

    def sleep(self) -> None: ...

    def wake(self) -> None: ...

    def close(self) -> None: ...


class TimedTools:
    """Every call takes as long as planned; `finish` is free."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._calls: dict[str, int] = {}

    async def call(self, trajectory_id: str, action: str, task: Task) -> ToolResult:
        number = self._calls.get(trajectory_id, 0)
        self._calls[trajectory_id] = number + 1
        _, _, prompt, sample = trajectory_id.split("-")
        await asyncio.sleep(self._plan.turns[int(prompt), int(sample)][number].tool_s or 0.0)
        return ToolResult("Code execution result:\n7")

    def expect(self, trajectory_id: str) -> None: ...

    async def finish(self, trajectory_id: str) -> None: ...

    async def close(self) -> None: ...


def text_tasks(count: int) -> list[Task]:
    return [Task(f"t{n}", "bench", [{"role": "user", "content": f"Which number is {n}?"}], (), "4") for n in range(count)]


def photo(seed: int, width: int, height: int) -> bytes:
    """A JPEG with the detail of a photograph: coarse structure with fine noise."""
    coarse = Image.effect_noise((width // 32, height // 32), 80).resize((width, height), Image.Resampling.BICUBIC)
    fine = Image.effect_noise((width, height), 20)
    image = Image.merge("RGB", [Image.blend(coarse, fine, 0.2 + 0.1 * ((seed + channel) % 3)) for channel in range(3)])
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def photo_tasks(count: int, width: int, height: int) -> list[Task]:
    """Every task has a picture of its own."""
    return [Task(f"t{n}", "bench", [{"role": "user", "content": "<image>Which number is written there?"}],
                 (photo(n, width, height),), "4") for n in range(count)]
