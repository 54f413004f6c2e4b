"""Every record that flows: Task -> Trajectory (xG) -> RewardedGroup -> Sample (xG) -> TrainBatch -> StepStats.

Records are frozen. No dict with string keys crosses a stage; a failed rollout is data, not an exception. Axes in
names: C channels (0 accuracy, 1 tool), G rollouts of a prompt, B rows, T tokens, N flat (packed) tokens.

What this file does not hold: behaviour. `torch` is imported for type checking only, so that the tool server and the
agent's pure parts can use these words without it.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor

    from hdpo.pixels import PixelScale

ACCURACY, TOOL = 0, 1
"""Indices of the channel axis C."""


class StopReason(Enum):
    """Why one generation ended."""

    TOOL_CALL = "tool_call"    # the closing </tool_call> token was sampled
    END_OF_TURN = "end_of_turn"  # <|im_end|> was sampled
    LENGTH = "length"          # the token budget of the request ran out
    ABORTED = "aborted"        # the engine dropped the request
    CUT = "cut"                # the step ended; the turn goes on in the next (rollout.carry_over)


class EndReason(Enum):
    """Why a trajectory ended. Never tested by truth value."""

    ANSWERED = "answered"              # the last turn ends itself and holds an <answer>
    UNPARSEABLE = "unparseable"        # the last turn ends itself with neither an answer nor a tool call
    MAX_TURNS = "max_turns"            # a tool call after the last allowed one; not executed
    MAX_TOKENS = "max_tokens"          # the response budget ran out
    CONTEXT_FULL = "context_full"      # the next observation would not fit into the model's context
    INFRASTRUCTURE = "infrastructure"  # a tool failed on our side; leaves both channels
    ABORTED = "aborted"                # cut by a wall-clock rule or a shutdown; leaves both channels

    @property
    def scorable(self) -> bool:
        """Whether the outcome says something about the policy."""
        return self not in (EndReason.INFRASTRUCTURE, EndReason.ABORTED)


class Verdict(Enum):
    """Three-valued: an unknown verdict is unscored, never wrong."""

    CORRECT = "correct"
    WRONG = "wrong"
    UNSCORED = "unscored"


@dataclass(frozen=True, slots=True)
class Task:
    """One prompt. `messages` are {"role", "content"} with one `<image>` marker per entry of `images`.

    Example: Task("toy_12", "toy/perception", [{"role": "user", "content": "<image>Which digit?"}], (b"\\x89PNG..",), "7")
    """

    id: str
    data_source: str
    messages: list[dict[str, str]]
    images: tuple[bytes, ...]          # encoded files (PNG, JPEG, ...) at ORIGINAL resolution
    ground_truth: str | list[str]      # never leaves the trainer
    extra: dict[str, Any] = field(default_factory=dict)   # the row's extra_info: index, tool_needed when known, ...
    row: int = field(default=-1, compare=False)           # its number among the rows of all data files; -1: of none

    @property
    def question(self) -> str:
        """The last user message without image markers."""
        text = next(m["content"] for m in reversed(self.messages) if m["role"] == "user")
        return text.replace("<image>", "").strip()

    @property
    def row_index(self) -> str:
        """extra_info.index as text, the key of recorded searches; empty where there is none. 0 is one."""
        index = self.extra.get("index")
        return "" if index is None else str(index)

    @property
    def tool_needed(self) -> bool | None:
        """Whether the row is known to need a tool; None where it doesn't say so in so many words."""
        needed = self.extra.get("tool_needed")
        return bool(needed) if needed in (0, 1) else None


@dataclass(frozen=True, slots=True)
class Completion:
    """What the engine sampled for one request; `token_ids` include the stop token."""

    token_ids: list[int]
    log_probs: list[float]     # natural log, at the sampling temperature, banned ids removed; same length as token_ids
    stop: StopReason
    weight_version: int
    num_cached: int = 0        # prompt tokens that the engine had in its prefix cache


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call the policy made. Calls that failed for our own reasons carry infrastructure=True and do not count."""

    name: str                  # "python" | "text_search" | "image_search" | an own tool's | "" when unparseable
    arguments: dict[str, Any]
    ok: bool                   # the call was well-formed and the tool ran without an error
    observation: str           # text shown to the model
    num_images: int = 0
    seconds: float = 0.0
    infrastructure: bool = False


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One rollout, append-only while it grows. mask[t] is 1 where the policy sampled token t, 0 where it was given.

    `images` are what the model saw (already bounded), in order of their placeholder runs in `token_ids`;
    `image_keys[i]` names the content of `images[i]` (empty where nobody computed it).
    `log_probs[t]` is 0.0 wherever mask[t] is 0. `versions[t]` is the version of the weights that sampled token t with
    log_probs[t], and -1 where mask[t] is 0; empty where nobody asked.
    """

    task: Task
    sample_index: int          # which of the G rollouts of this task
    token_ids: list[int]       # [L] expanded: one placeholder id per image token
    mask: list[int]            # [L]
    log_probs: list[float]     # [L] engine log-probs
    prompt_length: int
    images: tuple[Image, ...]
    calls: tuple[ToolCall, ...]
    end: EndReason
    turns: tuple[str, ...]     # decoded text of each sampled turn (for parsing and display only, never re-encoded)
    weight_version: int = 0    # of the step in which it ended
    seconds: float = 0.0
    error: str = ""            # why, when end is INFRASTRUCTURE or ABORTED
    image_keys: tuple[str, ...] = ()
    index: int = 0             # number of its prompt, over all ranks: in the step, or (rollout.carry_over) in the run
    versions: list[int] = field(default_factory=list)   # [L]
    files: tuple[bytes, ...] = ()      # the encoded file that each of `images` came as; empty where nobody kept them

    @property
    def num_tool_calls(self) -> int:
        """T of the paper: calls the policy made, whatever came of them, without those that failed on our side."""
        return sum(not call.infrastructure for call in self.calls)

    @property
    def num_sampled(self) -> int:
        return sum(self.mask)

    @property
    def final_turn(self) -> str:
        return self.turns[-1] if self.turns else ""

    @property
    def oldest_version(self) -> int:
        """Of the weights that sampled any of its tokens; its last ones where that is not recorded."""
        return min((version for version in self.versions if version >= 0), default=self.weight_version)


@dataclass(frozen=True, slots=True)
class Carried:
    """A trajectory that the end of a step cut short and that goes on in the next, with other weights, from where it stands.

    `so_far` would be ABORTED if it ended here. Its last turn's call is still to be answered where it has more turns than calls.
    """

    so_far: Trajectory
    compact_ids: list[int]     # the engine's stream of so_far.token_ids, see agent/builder.py
    begun: int                 # tokens of the turn under way, at the end of both streams
    session: str               # its name on the tool server


@dataclass(frozen=True, slots=True)
class Judgement:
    """A verdict and who gave it: "rule", "judge", "cache", "own", or "none" (nothing to judge / infrastructure)."""

    verdict: Verdict
    by: str
    detail: str = ""           # raw reply of the judge, or the rule's name
    answer: float | None = None   # an own reward's share of the answer's weight; None: 1 if correct, else 0


@dataclass(frozen=True, slots=True)
class Reward:
    """`correct` is a field: membership of Q is never inferred from a number."""

    accuracy: float            # 0.9 * answer + 0.1 * format
    tool: float                # 1 / (T + 1) if correct, else 0; T counts calls, by reward.tool_cost
    correct: bool
    format_ok: bool
    scored: bool               # False: leaves both channels, group statistics and norms


@dataclass(frozen=True, slots=True)
class RewardedGroup:
    """The G rollouts of one task with their rewards; lives on one rank. The three tuples have equal length.

    A rank may hold any number of a step's groups; `index` says which prompt of the step it is, over all ranks, and so
    to which mini-batch it belongs wherever it was sampled.
    """

    task: Task
    trajectories: tuple[Trajectory, ...]
    judgements: tuple[Judgement, ...]
    rewards: tuple[Reward, ...]
    index: int                 # of the prompt among the step's prompts


@dataclass(frozen=True, slots=True)
class Vision:
    """The images of one sample or micro-batch: uint8 patches of one frame with a scale, or the processor's own tensors.

    Rows that show the same image hold the same tensor, so patches are laid side by side only on their way to the device.
    """

    pixels: tuple[Tensor, ...]   # per image: [patches, channels * side * side] uint8; without a scale [patches, patch_dim]
    grid_thw: Tensor           # [images, 3] int64
    scale: PixelScale | None = None

    @property
    def num_patches(self) -> int:
        return sum(len(pixels) for pixels in self.pixels)

    @property
    def pixel_values(self) -> Tensor:
        """[patches, patch_dim] of all images as the processor makes it, a fresh tensor."""
        return self.expand()

    def part(self, images: slice) -> Vision:
        return Vision(self.pixels[images], self.grid_thw[images], self.scale)

    def expand(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """`pixel_values` on `device` in `dtype`: laid side by side, scaled and cast there, not by one CPU thread here."""
        import torch

        from hdpo.pixels import expand
        dtype = dtype or torch.float32
        moved = [pixels.to(device, non_blocking=True) for pixels in self.pixels]
        if self.scale is None:
            return torch.cat([pixels.to(dtype) for pixels in moved])
        return expand(torch.cat(moved), self.scale, dtype)


def join(visions: Sequence[Vision]) -> Vision | None:
    """The images of all, which are one model's, in order; None if there are none."""
    import torch
    some = [vision for vision in visions if vision.pixels]
    return Vision(tuple(pixels for vision in some for pixels in vision.pixels), torch.cat([v.grid_thw for v in some]),
                  some[0].scale) if some else None


@dataclass(frozen=True, slots=True)
class Sample:
    """One training row. SFT is a rollout recorded earlier: C = 0 and empty advantages."""

    token_ids: list[int]       # [L]
    mask: list[int]            # [L] 1 = trained token
    rollout_log_probs: list[float]   # [L] engine log-probs (zeros for SFT)
    advantages: tuple[float, ...]    # [C]
    member: tuple[bool, ...]         # [C] whether the row counts in channel c's norm
    vision: Vision | None
    prompt_length: int = 0     # tokens before the first that the policy sampled
    group: int = -1            # of the rollouts of one prompt, the same number; -1 in no group; for SFT that of the source
    sample_index: int = -1     # which of the G rollouts of its prompt


class Span(NamedTuple):
    """Consecutive tokens of a pack: a whole row, a prompt that rows share, or what one of these rows adds to it."""

    length: int
    prompt: int = -1           # number of the span that its row begins with; -1: with this one


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows packed one after another, exact for Qwen-VL: position_ids [4, 1, N] are those of each row by itself and there is
    no mask. `spans` say which tokens attend to which: those of a span to their span up to themselves, and to the prompt.

    Token n of a row predicts its successor. Only the M positions whose successor is trained reach the head: they are
    listed in `trained`, on the CPU, when the batch is packed, so that the device never has to be asked how many they are.
    The last token of a shared prompt is listed once for each row.
    """

    input_ids: Tensor          # [1, N] int64
    position_ids: Tensor       # [4, 1, N] int64: text positions, then temporal, height, width
    trained: Tensor            # [M] int64, indices into N
    targets: Tensor            # [M] int64
    weight: Tensor             # [M] float32, the token's share in its channel norms (1 for token_mean)
    row: Tensor                # [M] int64, row of each trained token
    rollout_log_probs: Tensor  # [M] float32, from the engine
    advantages: Tensor         # [C, B] float32
    member: Tensor             # [C, B] bool
    vision: Vision | None
    num_rows: int              # B; a filler row (it keeps ranks in step) is not counted
    spans: tuple[Span, ...]    # their lengths add up to N
    groups: tuple[int, ...] = ()     # [B] of each row, a filler's too
    origins: tuple[tuple[int, int], ...] = ()   # (group, sample_index) of each row
    reference_log_probs: Tensor | None = None   # [M] float32, of the starting policy (hdpo.kl_coef)


@dataclass(frozen=True, slots=True)
class MiniBatch:
    """The micro-batches of one optimizer step; norms are global over ranks and micro-batches."""

    micro_batches: list[MicroBatch]
    norms: Tensor              # [C] (for SFT [1]) float64: summed weights of each channel's tokens, over all ranks


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """Same number of mini-batches, and of micro-batches in each, on every rank."""

    mini_batches: list[MiniBatch]


@dataclass(frozen=True, slots=True)
class StepStats:
    """One line of metrics.jsonl: scalars of one step, already reduced over ranks."""

    step: int
    scalars: dict[str, float]
