"""Which rank computes which rows in which micro-batch: one plan over all ranks, under the budgets of a micro-batch.

Every rank makes the same plan from the same integers, so nothing but the sizes of the rows is communicated. First the
rows are shared out: a rank keeps its own, those that are dear to move before the others, until it has its part of the
work, and what is left goes to the ranks that lack some. Then each rank deals its rows, longest first, onto the lightest
micro-batch with room, and a few swaps even these out. That is as balanced as Karmarkar-Karp, cheaper, and honours the
budgets, which a balance of work alone does not.

Under ZeRO-3 every micro-batch waits for the slowest rank, so all ranks get the same number of them, each in the order of
falling work. Standard library only.
"""
from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

IMAGE_PATCHES = 2048
"""Patches of a middling image, for what attention inside an image costs."""
SLACK = 200
"""A rank may have 1/SLACK more than its part of the work before rows of it are moved to another."""
MOST_TRIED = 16
"""Swaps of two micro-batches that are tried for room."""

Plan = list[list[list[int]]]
"""[rank][micro-batch] -> indices of rows."""


class RowCost(NamedTuple):
    """What planning needs of one row; plain integers, so that every rank computes the same."""

    tokens: int
    patches: int
    work: int                  # see WorkModel
    nbytes: int                # to be moved, were another rank to compute the row
    owner: int                 # the rank that has the row


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


def plan(rows: Sequence[RowCost], num_ranks: int, budget: Budget) -> Plan:
    """The micro-batches of every rank, as indices into `rows`; the same number, at least one, on every rank.

    Every row is planned once. No micro-batch exceeds the budget; only a row that does so alone gets one to itself.
    """
    shares = share(rows, num_ranks)
    count = max([1, *(_fewest([rows[i] for i in mine], budget) for mine in shares)])
    while True:
        dealt = []
        for mine in shares:
            bins = deal(rows, mine, count, budget)
            if bins is None:
                break
            dealt.append(bins)
        else:
            return [_even(rows, bins, budget) for bins in dealt]
        count += 1


def share(rows: Sequence[RowCost], num_ranks: int) -> list[list[int]]:
    """The rows of each rank, by falling work: about equal work, few bytes moved."""
    limit = sum(row.work for row in rows) * (SLACK + 1) // (SLACK * num_ranks)
    loads, ranks, moving = [0] * num_ranks, [0] * len(rows), set()
    worth = [-row.nbytes / row.work for row in rows]
    for index in sorted(range(len(rows)), key=worth.__getitem__):
        _, _, work, _, owner = rows[index]
        if loads[owner] + work <= limit:
            loads[owner] += work
            ranks[index] = owner
        else:
            moving.add(index)
    heap = [(load, rank) for rank, load in enumerate(loads)]
    heapq.heapify(heap)
    work_of = [row.work for row in rows]
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    for index in sorted(range(len(rows)), key=work_of.__getitem__, reverse=True):
        if index in moving:
            load, ranks[index] = heap[0]
            heapq.heapreplace(heap, (load + work_of[index], ranks[index]))
        shares[ranks[index]].append(index)
    return shares


def deal(rows: Sequence[RowCost], mine: Sequence[int], num_bins: int, budget: Budget) -> list[list[int]] | None:
    """`mine`, given by falling work, each onto the lightest micro-batch that has room. None when none has."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    tokens, patches = [0] * num_bins, [0] * num_bins
    heap = [(0, b) for b in range(num_bins)]
    for index in mine:
        more_tokens, more_patches, work, _, _ = rows[index]
        full = []
        while heap:
            load, b = heap[0]
            if not bins[b] or budget.fits(tokens[b] + more_tokens, patches[b] + more_patches):
                bins[b].append(index)
                tokens[b] += more_tokens
                patches[b] += more_patches
                heapq.heapreplace(heap, (load + work, b))
                break
            full.append(heapq.heappop(heap))
        else:
            return None
        for entry in full:
            heapq.heappush(heap, entry)
    return bins


def _even(rows: Sequence[RowCost], bins: list[list[int]], budget: Budget) -> list[list[int]]:
    """Swap a row of the heaviest micro-batch with one of the lightest, while that brings the two closer to each other.

    Returns them by falling work, so that a micro-step is alike on all ranks.
    """
    def fits(bin_: Sequence[int], gets: int, gives: int) -> bool:
        kept = [rows[i] for i in bin_ if i != gives] + [rows[gets]]
        return budget.fits(sum(row.tokens for row in kept), sum(row.patches for row in kept))

    loads = [sum(rows[i].work for i in bin_) for bin_ in bins]
    close = sum(loads) // (len(bins) * SLACK)
    for _ in bins:
        gap = max(loads) - min(loads)
        heavy, light = loads.index(max(loads)), loads.index(min(loads))
        lighter = [(rows[b].work, b) for b in bins[light]]
        pairs = [(abs(gap - 2 * (rows[a].work - work)), a, b) for a in bins[heavy] for work, b in lighter]
        left, a, b = next((pair for pair in sorted(pairs)[:MOST_TRIED]
                           if fits(bins[heavy], pair[2], pair[1]) and fits(bins[light], pair[1], pair[2])), (gap, 0, 0))
        if gap <= close or left >= gap:
            break
        for bin_, gives, gets in ((heavy, a, b), (light, b, a)):
            bins[bin_].remove(gives)
            bins[bin_].append(gets)
            loads[bin_] += rows[gets].work - rows[gives].work
    return [sorted(bins[b]) for b in sorted(range(len(bins)), key=lambda b: -loads[b])]


def _fewest(rows: Sequence[RowCost], budget: Budget) -> int:
    """A lower bound on the micro-batches of a rank."""
    tokens, patches = sum(row.tokens for row in rows), sum(row.patches for row in rows)
    return max(-(-tokens // budget.max_tokens), -(-patches // budget.max_patches))
