"""What the core needs of the world. Each protocol has at least two implementations in this repository.

Nothing here knows a vendor: vllm, deepspeed, docker and openai live under `hdpo.adapters`, one file each.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from hdpo.types import Completion, Judgement, MicroBatch, Task

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor

    from hdpo.checksums import Checksum, Comparison


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One generation. `token_ids` are COMPACT: exactly one placeholder id per image; the engine expands them itself."""

    token_ids: list[int]
    images: tuple[Image, ...]
    max_tokens: int
    temperature: float         # 0 = greedy
    seed: int                  # the same request with the same seed and weights gives the same tokens
    image_keys: tuple[str, ...] = ()   # unique per image content, so that the engine need not hash pixels; may be empty
    watch: Callable[[list[int]], object] | None = None   # called by `step` with all ids sampled so far, as they are sampled
    begun: int = 0             # of `token_ids`, the last that were sampled in this turn already, before it was cut


class Engine(Protocol):
    """A generation engine inside this process, driven step by step so that trajectories never wait for each other.

    Stop tokens, banned ids and the context length are fixed at construction. Not thread-safe: one thread drives it.
    """

    max_model_len: int

    def add_request(self, request_id: str, request: GenerateRequest) -> None:
        """Queue one generation. Raises RequestRefused, with nothing else changed, for one that can't be had."""
        ...

    def step(self) -> list[tuple[str, Completion]]:
        """Advance every running request by at least one token; return those that finished."""
        ...

    def num_unfinished(self) -> int: ...

    def so_far(self, request_id: str) -> Completion:
        """What a request has sampled until now: ABORTED, unless it has ended and was not returned yet. Nothing for one that
        is unknown."""
        ...

    def abort(self, request_ids: Sequence[str]) -> None:
        """Drop requests; an aborted request is never returned by `step`."""
        ...

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replace all weights. Consumes the iterator once, in order; every later Completion carries `version`."""
        ...

    def compare_weights(self, sent: Mapping[str, Checksum]) -> Comparison:
        """Compare the weights held now with checksums of those sent last, tensor by tensor, where they correspond."""
        ...

    def sleep(self) -> None:
        """Give device memory back to the trainer (nothing to do on CPU)."""
        ...

    def wake(self) -> None: ...

    def close(self) -> None: ...


@runtime_checkable
class SharedEngine(Engine, Protocol):
    """An engine that several ranks drive together, each with requests of its own; every method that works is a collective.

    From its first `step` until all of them have come to `finish`, a rank goes on calling `step` or `hold`, with requests or
    without. `num_unfinished` counts the requests of all these ranks as of the last step, and what this rank has added since:
    ranks that all add some and then step until there are none end together, without `finish`. A request is looked at in the
    step after it was added, which raises its RequestRefused, on its own rank alone: completions come with the next step.
    """

    def hold(self) -> None:
        """In place of `step`: keep all of them from stepping, and from taking requests, this time."""
        ...

    def finish(self) -> None:
        """Go on stepping for the others until they have come here too."""
        ...


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What a tool server answered. Images are encoded files."""

    text: str
    images: tuple[bytes, ...] = ()
    ok: bool = True
    done: bool = False
    metrics: dict[str, Any] = field(default_factory=dict)


class ToolBackend(Protocol):
    """The tool server as the agent sees it. Methods are coroutines of one event loop."""

    async def call(self, trajectory_id: str, action: str, task: Task) -> ToolResult:
        """Execute the sampled action text. Raises ToolServerError when the failure is ours, never for the policy's."""
        ...

    def expect(self, trajectory_id: str) -> None:
        """The trajectory has had calls, made by an earlier process: if its session is gone, its next call that needs one fails
        as the server's fault."""
        ...

    async def finish(self, trajectory_id: str) -> None:
        """Release everything the trajectory holds on the server. Never raises."""
        ...

    async def close(self) -> None: ...


class Judge(Protocol):
    async def judge(self, question: str, ground_truth: str | list[str], prediction: str) -> Judgement:
        """CORRECT or WRONG, or UNSCORED when no verdict could be had. Never raises for a failing judge."""
        ...

    async def close(self) -> None: ...


class Flag(Protocol):
    """Whether the user asked to stop: a threading.Event, or what a signal handler can set."""

    def is_set(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class ShownRollout:
    """What a viewer shows of a rollout; text and pictures are bounded."""

    task: str
    source: str
    text: str                          # question, turns and observations
    images: tuple[Image, ...]
    verdict: str
    by: str
    truth: str
    calls: int
    advantages: tuple[float, ...]      # accuracy, tool; empty outside training

    @property
    def outcome(self) -> str:
        given = ", ".join(f"{name} {value:+.2f}" for name, value in zip(("accuracy", "tool"), self.advantages))
        return f"[{self.verdict} by {self.by}; truth: {self.truth}{given and f'; advantages: {given}'}]"


class LogSink(Protocol):
    def write(self, step: int, scalars: dict[str, float]) -> None: ...

    def write_rollouts(self, step: int, rollouts: Sequence[ShownRollout]) -> None:
        """A few rollouts of a step, to be looked at. On the log's own thread, beside `write` of a later step."""
        ...

    def close(self) -> None: ...


class Policy(Protocol):
    """Trainable weights over all ranks. Every method is a collective: all ranks call it, in the same order."""

    dtype: torch.dtype         # of the weights in forward, and of what `iter_weights` yields
    world: Any                 # train.world.World

    def run(self, micro: MicroBatch, job: Callable[[Tensor, Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """One forward whose head hands (hidden [M, H], weight [V, H]) to `job`; returns what the job returns."""
        ...

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate gradients of a loss whose norms are global; `last` closes the optimizer step."""
        ...

    def step(self, lr: float) -> float:
        """Clip and update; the global gradient norm before clipping. Not finite: nothing was changed, gradients are cleared."""
        ...

    def iter_weights(self, group_bytes: int) -> Iterator[tuple[str, Tensor]]:
        """Full parameters by Hugging Face name, gathered in groups of bounded size; valid until the iterator advances."""
        ...

    def park(self) -> None:
        """Move what only an update needs (optimizer state, fp32 weights, gradients) to host memory. CUDA; twice is once."""
        ...

    def unpark(self) -> None: ...


class Reference(Protocol):
    """The policy as it was when the run began. Every method is a collective."""

    def run(self, micro: MicroBatch, job: Callable[[Tensor, Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """As `Policy.run`, without gradients."""
        ...

    def park(self) -> None:
        """Give device memory back until the next `run`."""
        ...
