"""Which rank computes which rows in which micro-batch: one plan over all ranks, under the budgets of a micro-batch.

Every rank makes the same plan from the same integers, so nothing but the sizes of the rows is communicated. First the
rows are shared out: a rank keeps its own, those that are dear to move before the others, until it has its part of the
work, and what is left goes to the ranks that lack some. Then each rank deals its rows, longest first, onto the lightest
micro-batch with room, and a few swaps even these out. That is as balanced as Karmarkar-Karp, cheaper, and honours the
budgets, which a balance of work alone does not.

A prompt that rows share is computed, and counts, once in each micro-batch that holds some of them. So they are dealt one
after another, and go on to another rank or micro-batch only where one has its part.

Under ZeRO-3 every micro-batch waits for the slowest rank, so all ranks get the same number of them, each in the order of
falling work. Standard library only.
"""
from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from operator import attrgetter

from hdpo.packing.costs import Budget, Load, PromptCost, RowCost

SLACK = 200
"""A rank may have 1/SLACK more than its part of the work before rows of it are moved to another."""
MOST_TRIED = 16
"""Swaps of two micro-batches that are tried for room."""
ROUNDS = 3
"""Plans with shared prompts; each knows which prompts the ranks of the last one had to compute more than once."""
TRIES = 7
"""Sizes of a micro-batch that are tried, of which the smallest that gives few enough is taken."""

WORK = attrgetter("work")
Plan = list[list[list[int]]]
"""[rank][micro-batch] -> indices of rows."""
Groups = list[tuple[int, list[int]]]
"""(work, rows): those with the same prompt together, any other by itself; by falling work, as are the rows of each."""


def plan(rows: Sequence[RowCost], num_ranks: int, budget: Budget) -> Plan:
    """The micro-batches of every rank, as indices into `rows`; the same number, at least one, on every rank.

    Every row is planned once. No micro-batch exceeds the budget; only a row that does so alone gets one to itself.
    """
    best: list[list[Load]] = []
    again, rounds = [0] * num_ranks, 1 if all(row.prompt is None for row in rows) else ROUNDS
    for _ in range(rounds):
        shares = share(rows, again)
        made = _micro_batches(rows, shares, budget)
        if not best or _time(made) < _time(best):
            best = made
        again = [sum(bin_.work for bin_ in bins) - mine.work for bins, mine in zip(made, shares)]
    return [[sorted(bin_.indices) for bin_ in bins] for bins in best]


def _micro_batches(rows: Sequence[RowCost], shares: Sequence[Load], budget: Budget) -> list[list[Load]]:
    """As few as fit, the same number of each rank's share, each in the order of falling work."""
    count = max([1, *(_fewest(mine, budget) for mine in shares)])
    ranks = [_groups(rows, mine.indices) for mine in shares]
    while True:
        made = []
        for mine in ranks:
            bins = deal(rows, mine, count, budget)
            if bins is None:
                break
            made.append(bins)
        else:
            return [sorted(_even(rows, bins, budget), key=WORK, reverse=True) for bins in made]
        count += 1


def _time(made: Sequence[Sequence[Load]]) -> int:
    """Of ranks that wait for each other at every micro-step, in units of work."""
    return sum(max(bin_.work for bin_ in step) for step in zip(*made))


def share(rows: Sequence[RowCost], again: Sequence[int]) -> list[Load]:
    """The rows of each rank: about equal work, few bytes moved. `again` is work that each rank has besides."""
    groups = _groups(rows, range(len(rows)))
    limit = (sum(work for work, _ in groups) + sum(again)) * (SLACK + 1) // (SLACK * len(again))
    loads, moving = [Load() for _ in again], []
    for _, group in sorted(groups, key=lambda group: -sum([rows[i].nbytes for i in group[1]]) / group[0]):
        for index in group:
            row = rows[index]
            mine = loads[row.owner]
            if mine.work + mine.more(row) + again[row.owner] <= limit:
                mine.add(index, row)
            else:
                moving.append(index)
    ranks = range(len(again))
    for _, left in _groups(rows, moving):
        while left:
            rank = min(ranks, key=lambda rank: loads[rank].work + again[rank])
            left = _pour(rows, left, loads[rank], max(limit - again[rank], loads[rank].work + rows[left[0]].work), None)
    return loads


def deal(rows: Sequence[RowCost], groups: Groups, num_bins: int, budget: Budget) -> list[Load] | None:
    """A rank's rows in micro-batches of about equal work. None when the budget asks for more of them.

    Groups are laid end to end and cut where a micro-batch has its part: each cut computes one prompt once more. Rows that
    share nothing go, longest first, onto the lightest micro-batch that has room.
    """
    shared, alone = [group for _, group in groups if len(group) > 1], [group[0] for _, group in groups if len(group) == 1]
    work = sum(work for work, _ in groups)
    found, low, high = None, work // num_bins, 2 * work
    for _ in range(TRIES):
        bins = _cut(rows, shared, high if found is None else (low + high) // 2, budget)
        bins += [Load() for _ in range(num_bins - len(bins))]
        if len(bins) == num_bins and _spread(rows, alone, bins, budget):
            found, high = bins, max(bin_.work for bin_ in bins)
        elif found is None:
            return None
        else:
            low = (low + high) // 2
        if not shared:
            break
    return found


def _groups(rows: Sequence[RowCost], indices: Iterable[int]) -> Groups:
    groups: list[tuple[int, list[int]]] = []
    shared: dict[PromptCost, list[int]] = {}
    for index in sorted(indices, key=lambda i: rows[i].work, reverse=True):
        prompt = rows[index].prompt
        if prompt is None:
            groups.append((rows[index].work, [index]))
        else:
            shared.setdefault(prompt, []).append(index)
    if shared:
        groups += [(sum(rows[i].work for i in some) - (len(some) - 1) * prompt.work, some) for prompt, some in shared.items()]
        groups.sort(key=lambda group: group[0], reverse=True)
    return groups


def _pour(rows: Sequence[RowCost], indices: Sequence[int], into: Load, limit: int, budget: Budget | None) -> list[int]:
    """Add rows to a load while its work stays within the limit, at least one to an empty load. Returns those left over."""
    left = []
    for index in indices:
        row = rows[index]
        if into.indices and (into.work + into.more(row) > limit or budget is not None and not into.fits(row, budget)):
            left.append(index)
        else:
            into.add(index, row)
    return left


def _cut(rows: Sequence[RowCost], groups: Iterable[list[int]], limit: int, budget: Budget) -> list[Load]:
    """Groups end to end in micro-batches of at most `limit` work."""
    bins: list[Load] = []
    for left in groups:
        if bins:
            left = _pour(rows, left, bins[-1], limit, budget)
        while left:
            bins.append(Load())
            left = _pour(rows, left, bins[-1], limit, budget)
    return bins


def _spread(rows: Sequence[RowCost], indices: Sequence[int], bins: Sequence[Load], budget: Budget) -> bool:
    """Add rows, given by falling work, each to the lightest micro-batch that has room. False when none has."""
    heap = [(bin_.work, place) for place, bin_ in enumerate(bins)]
    heapq.heapify(heap)
    for index in indices:
        row, full = rows[index], []
        while heap:
            place = heap[0][1]
            if not bins[place].indices or bins[place].fits(row, budget):
                bins[place].add(index, row)
                heapq.heapreplace(heap, (bins[place].work, place))
                break
            full.append(heapq.heappop(heap))
        else:
            return False
        for entry in full:
            heapq.heappush(heap, entry)
    return True


def _even(rows: Sequence[RowCost], bins: list[Load], budget: Budget) -> list[Load]:
    """Swap a row of the heaviest micro-batch with one of the lightest, while that makes the heavier of the two lighter."""
    close = sum(bin_.work for bin_ in bins) // (len(bins) * SLACK)
    for _ in bins:
        heavy, light = max(bins, key=WORK), min(bins, key=WORK)
        if heavy.work - light.work <= close:
            break
        before = heavy.work
        lighter = [(heavy.more(rows[b]), light.less(rows[b]), b) for b in light.indices]
        heavier = [(before - heavy.less(rows[a]), light.work + light.more(rows[a]), a) for a in heavy.indices]
        pairs = [(one if (one := kept + gets) > (other := grown - gives) else other, a, b)
                 for kept, grown, a in heavier for gets, gives, b in lighter]
        for _, a, b in sorted(pairs)[:MOST_TRIED]:
            _swap(rows, heavy, light, a, b)
            if max(heavy.work, light.work) < before and all(budget.fits(bin_.tokens, bin_.patches) for bin_ in (heavy, light)):
                break
            _swap(rows, heavy, light, b, a)
        else:
            break
    return bins


def _swap(rows: Sequence[RowCost], one: Load, other: Load, a: int, b: int) -> None:
    one.remove(a, rows[a])
    other.remove(b, rows[b])
    one.add(b, rows[b])
    other.add(a, rows[a])


def _fewest(mine: Load, budget: Budget) -> int:
    """A lower bound on the micro-batches of a rank."""
    return max(-(-mine.tokens // budget.max_tokens), -(-mine.patches // budget.max_patches))
