"""Which rank computes which rows in which micro-batch: one plan over all ranks, under the budgets of a micro-batch.

Every rank makes the same plan from the same integers, so nothing but the sizes of the rows is communicated. First the
rows are shared out: a rank keeps its own, those that are dear to move before the others, until it has its part of the
work, and what is left goes to the ranks that lack some. Then each rank deals its rows, longest first, onto the lightest
micro-batch with room. Greedy longest-first is as balanced here as Karmarkar-Karp, far cheaper, and honours the budgets,
which a balance of work alone does not.

Under ZeRO-3 every micro-batch waits for the slowest rank, so all ranks get the same number of them, each in the order of
falling work. Standard library only.
"""
from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

ATTENTION_TOKENS = 40_000
"""Length at which attention costs as much as all else: layers * 2 * length**2 * width against 2 * length * parameters,
47k tokens for Qwen3-VL-8B, 25k for 2B."""
PATCHES_PER_TOKEN = 8
"""Image patches that cost as much as one token: 11 for Qwen3-VL-8B (0.8 GFLOP a patch, 1.3 with the attention inside a
large image, against 14), 4 for 2B. Neither constant needs to be exact: rows of a step are alike enough that a factor of
two changes the balance by less than a per cent (benchmarks/bench_batching.py)."""
SLACK = 200
"""A rank may have 1/SLACK more than its part of the work before rows of it are moved to another."""


Plan = list[list[list[int]]]
"""[rank][micro-batch] -> indices of rows."""


class RowCost(NamedTuple):
    """What planning needs of one row; plain integers, so that every rank computes the same."""

    tokens: int
    patches: int
    nbytes: int                # to be moved, were another rank to compute the row
    owner: int                 # the rank that has the row

    @property
    def work(self) -> int:
        """In tokens of a short text row."""
        return self.tokens + self.tokens * self.tokens // ATTENTION_TOKENS + self.patches // PATCHES_PER_TOKEN


@dataclass(frozen=True, slots=True)
class Budget:
    """Bounds of one micro-batch. One without images holds a filler image besides its rows (see batching.pack)."""

    max_tokens: int
    max_patches: int
    filler_tokens: int = 0     # 0 for a model that does not see

    def fits(self, tokens: int, patches: int) -> bool:
        return tokens + (0 if patches else self.filler_tokens) <= self.max_tokens and patches <= self.max_patches


def plan(rows: Sequence[RowCost], num_ranks: int, budget: Budget) -> Plan:
    """The micro-batches of every rank, as indices into `rows`; the same number of micro-batches, at least one, on every rank.

    Every row is planned once. No micro-batch exceeds the budget; only a row that does so alone gets one to itself.
    """
    shares = share(rows, num_ranks)
    count = max([1, *(_fewest(rows, mine, budget) for mine in shares)])
    while True:
        dealt = [deal(rows, mine, count, budget) for mine in shares]
        if None not in dealt:
            return [bins for bins in dealt if bins is not None]
        count += 1


def share(rows: Sequence[RowCost], num_ranks: int) -> list[list[int]]:
    """The rows of each rank: about equal work, few bytes moved."""
    works = [row.work for row in rows]
    limit = sum(works) * (SLACK + 1) // (SLACK * num_ranks)
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    loads, moving = [0] * num_ranks, []
    for index in sorted(range(len(rows)), key=lambda i: -rows[i].nbytes / works[i]):
        owner = rows[index].owner
        if loads[owner] + works[index] <= limit:
            loads[owner] += works[index]
            shares[owner].append(index)
        else:
            moving.append(index)
    heap = [(load, rank) for rank, load in enumerate(loads)]
    heapq.heapify(heap)
    for index in sorted(moving, key=lambda i: -works[i]):
        load, rank = heap[0]
        shares[rank].append(index)
        heapq.heapreplace(heap, (load + works[index], rank))
    return shares


def deal(rows: Sequence[RowCost], mine: Sequence[int], num_bins: int, budget: Budget) -> list[list[int]] | None:
    """`mine` over `num_bins` micro-batches, those with the most work first; None when they do not suffice."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    heap = [(0, b, 0, 0) for b in range(num_bins)]   # (work, bin, tokens, patches)
    for index in sorted(mine, key=lambda i: (-rows[i].work, i)):
        row, full = rows[index], []
        while heap:
            work, b, tokens, patches = heapq.heappop(heap)
            tokens, patches = tokens + row.tokens, patches + row.patches
            if budget.fits(tokens, patches) or not bins[b]:
                bins[b].append(index)
                heapq.heappush(heap, (work + row.work, b, tokens, patches))
                break
            full.append((work, b, tokens - row.tokens, patches - row.patches))
        else:
            return None
        for entry in full:
            heapq.heappush(heap, entry)
    order = {b: work for work, b, _, _ in heap}
    return [sorted(bins[b]) for b in sorted(order, key=lambda b: (-order[b], b))]


def _fewest(rows: Sequence[RowCost], mine: Sequence[int], budget: Budget) -> int:
    """A lower bound on the micro-batches of a rank."""
    tokens, patches = sum(rows[i].tokens for i in mine), sum(rows[i].patches for i in mine)
    return max(-(-tokens // budget.max_tokens), -(-patches // budget.max_patches))
