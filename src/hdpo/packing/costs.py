"""What a training row costs, and what rows cost that are computed together: plain integers, the same on every rank."""
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

IMAGE_PATCHES = 2048
"""Patches of a middling image, for what attention inside an image costs."""


class PromptCost(NamedTuple):
    """What rows with the same prompt save, all but one of a micro-batch."""

    key: int                   # equal for rows that share the prompt
    tokens: int
    patches: int
    work: int


class RowCost(NamedTuple):
    """What planning needs of one row; plain integers, so that every rank computes the same."""

    tokens: int
    patches: int
    work: int                  # see WorkModel
    nbytes: int                # to be moved, were another rank to compute the row
    owner: int                 # the rank that has the row
    prompt: PromptCost | None = None   # is part of what the row costs


@dataclass(frozen=True, slots=True)
class WorkModel:
    """How long a row takes, from its tokens and patches. The defaults lie between Qwen3-VL-2B and 8B.

    They need not be exact: planned with the numbers of the 8B, the 2B has a sync efficiency of 0.97 instead of 0.995
    (benchmarks/bench_batching.py).
    """

    attention_tokens: int = 34_000   # length at which attention costs as much as all else
    patches_per_token: int = 7       # image patches that cost as much as a token

    def __call__(self, tokens: int, patches: int) -> int:
        """In tokens of a short text row."""
        return tokens + tokens * tokens // self.attention_tokens + patches // self.patches_per_token


def work_model(config: Mapping[str, Any]) -> WorkModel:
    """From the sizes in a model folder's config.json; the defaults where it leaves one out.

    A token meets a layer's parameters with 2 FLOP each; causal attention over a row of L tokens adds 2 * L * width a token
    and layer. A patch likewise meets the vision tower's, and all other patches of its image: 4 * patches * width.
    """
    text, vision = config.get("text_config", config), config.get("vision_config")
    try:
        hidden, heads = text["hidden_size"], text["num_attention_heads"]
        width = heads * (text.get("head_dim") or hidden // heads)
        shared = width * (text.get("num_key_value_heads") or heads) // heads
        experts = text.get("num_experts_per_tok")
        inner = experts * text["moe_intermediate_size"] if experts else text["intermediate_size"]
        layer = hidden * (2 * width + 2 * shared + 3 * inner)
        token = text["num_hidden_layers"] * layer
        patch = vision["depth"] * vision["hidden_size"] * (
            4 * vision["hidden_size"] + 2 * vision["intermediate_size"] + 2 * IMAGE_PATCHES) if vision else token
    except KeyError:     # transformers may leave out what equals its own defaults
        return WorkModel()
    return WorkModel(max(1, layer // width), max(1, token // patch))


@dataclass(frozen=True, slots=True)
class Budget:
    """Bounds of one micro-batch. One without images holds a filler image besides its rows (see batching.pack)."""

    max_tokens: int
    max_patches: int
    filler_tokens: int = 0     # 0 for a model that does not see

    def fits(self, tokens: int, patches: int) -> bool:
        return tokens + (0 if patches else self.filler_tokens) <= self.max_tokens and patches <= self.max_patches


class Load:
    """Rows that are computed together, and what they cost with each prompt counted once."""

    __slots__ = ("indices", "tokens", "patches", "work", "prompts")

    def __init__(self) -> None:
        self.indices: list[int] = []
        self.tokens = self.patches = self.work = 0
        self.prompts: dict[int, int] = {}    # by key, rows that have it

    def more(self, row: RowCost) -> int:
        """The work that the row would add."""
        return row.work - row.prompt.work if row.prompt is not None and row.prompt.key in self.prompts else row.work

    def less(self, row: RowCost) -> int:
        """The work that would go with the row, one of these."""
        return row.work - row.prompt.work if row.prompt is not None and self.prompts[row.prompt.key] > 1 else row.work

    def fits(self, row: RowCost, budget: Budget) -> bool:
        tokens, patches = self.tokens + row.tokens, self.patches + row.patches
        if row.prompt is not None and row.prompt.key in self.prompts:
            tokens, patches = tokens - row.prompt.tokens, patches - row.prompt.patches
        return budget.fits(tokens, patches)

    def add(self, index: int, row: RowCost) -> None:
        tokens, patches, work, _, _, prompt = row
        self.indices.append(index)
        self.tokens += tokens
        self.patches += patches
        self.work += work
        if prompt is not None:
            rows = self.prompts.get(prompt.key, 0)
            self.prompts[prompt.key] = rows + 1
            if rows:
                self._count(prompt, -1)

    def remove(self, index: int, row: RowCost) -> None:
        self.indices.remove(index)
        self._count(row, -1)
        if row.prompt is not None:
            rows = self.prompts[row.prompt.key] = self.prompts[row.prompt.key] - 1
            if rows:
                self._count(row.prompt, 1)
            else:
                del self.prompts[row.prompt.key]

    def _count(self, cost: RowCost | PromptCost, sign: int) -> None:
        self.tokens += sign * cost.tokens
        self.patches += sign * cost.patches
        self.work += sign * cost.work


def load(rows: Sequence[RowCost], indices: Iterable[int]) -> Load:
    found = Load()
    for index in indices:
        found.add(index, rows[index])
    return found
