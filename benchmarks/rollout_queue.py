"""Simulated ranks that share a prompt queue: how much of the work to hold back. Used by bench_rollout.py.

An engine serves all its running sequences at once: a step takes `fixed + per_sequence * n` for n of them (a decode step
reads the weights once and each sequence's cache), at most `max_num_seqs` run, the others wait their turn. A trajectory
generates, waits for its tool, generates; lengths and latencies have heavy tails, and the rollouts of a prompt share a
factor, because hard prompts are long in all their rollouts. A node may be slower than the others, as nodes are.
"""
from __future__ import annotations

import heapq
import itertools
import math
import random
import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Setting:
    prompts: int = 128
    group_size: int = 16
    ranks: int = 8
    max_num_seqs: int = 256
    fixed_s: float = 0.0035            # one step's weights: 16 GB at 4.8 TB/s
    per_sequence_s: float = 0.00025    # one sequence's cache: 8k tokens of an 8B model with 8 KV heads
    tokens: float = 400.0              # median of a turn
    turns: float = 2.5                 # mean
    tool_s: float = 2.0                # median latency
    group_spread: float = 0.5          # sigma of the factor that the rollouts of a prompt share
    slow_rank: float = 1.0             # how much longer a step of rank 0 takes

    def step_s(self, n: int) -> float:
        return self.fixed_s + self.per_sequence_s * n


Work = list[list[list[tuple[float, float]]]]
"""[prompt][rollout][turn] -> (tokens, seconds of the tool that follows; 0 after the last)."""


def make_work(setting: Setting, seed: int) -> Work:
    coin = random.Random(seed)
    work = []
    for _ in range(setting.prompts):
        hard = coin.lognormvariate(0, setting.group_spread)
        group = []
        for _ in range(setting.group_size):
            count = 1 + min(9, int(coin.expovariate(1 / setting.turns) * hard))
            turns = [(max(1.0, setting.tokens * hard * coin.lognormvariate(0, 0.7)),
                      setting.tool_s * coin.lognormvariate(0, 1.2)) for _ in range(count)]
            turns[-1] = turns[-1][0], 0.0
            group.append(turns)
        work.append(group)
    return work


def lower_bound(work: Work, setting: Setting) -> float:
    """Seconds that no schedule can beat: all work at the engines' best rate, or the longest trajectory all by itself."""
    tokens = sum(t for group in work for turns in group for t, _ in turns)
    rate = setting.max_num_seqs / setting.step_s(setting.max_num_seqs) * (setting.ranks - 1 + 1 / setting.slow_rank)
    longest = max(sum(t * setting.step_s(1) + wait for t, wait in turns) for group in work for turns in group)
    return max(tokens / rate, longest)


class _Engine:
    """Processor sharing in virtual time: every running sequence has made `virtual` tokens since the start."""

    def __init__(self, setting: Setting, slow: float) -> None:
        self.setting, self.slow, self.virtual, self.now = setting, slow, 0.0, 0.0
        self.running: list[tuple[float, int]] = []     # (virtual end, trajectory)
        self.waiting: deque[tuple[float, int]] = deque()

    def advance(self, now: float) -> None:
        if self.running:
            self.virtual += (now - self.now) / (self.setting.step_s(len(self.running)) * self.slow)
        self.now = now

    def add(self, tokens: float, who: int) -> None:
        self.waiting.append((tokens, who))
        self.admit()

    def admit(self) -> None:
        while self.waiting and len(self.running) < self.setting.max_num_seqs:
            tokens, who = self.waiting.popleft()
            heapq.heappush(self.running, (self.virtual + tokens, who))

    def next_end(self) -> float:
        if not self.running:
            return math.inf
        left = max(0.0, self.running[0][0] - self.virtual)
        return self.now + left * self.setting.step_s(len(self.running)) * self.slow


def makespan(work: Work, setting: Setting, first_share: float | None) -> float:
    """Seconds until the last trajectory ends. `first_share` None is the static split, else a rank keeps that part of its
    even share live and claims the rest from the queue, as `Rollouts` does."""
    prompts, size, ranks = setting.prompts, setting.group_size, setting.ranks
    cap = math.ceil(1.5 * setting.max_num_seqs)
    most_live = cap if first_share is None else min(cap, math.ceil(first_share * prompts * size / ranks))
    shared = itertools.count()
    claims = [itertools.count(r, ranks) if first_share is None else shared for r in range(ranks)]
    engines = [_Engine(setting, setting.slow_rank if r == 0 else 1.0) for r in range(ranks)]
    ready: list[deque[int]] = [deque() for _ in range(ranks)]
    live = [0] * ranks
    turn_of: dict[int, int] = {}
    rank_of: dict[int, int] = {}
    tools: list[tuple[float, int]] = []

    def turns(who: int) -> list[tuple[float, float]]:
        return work[who // size][who % size]

    def fill(rank: int) -> None:
        while live[rank] < most_live:
            if not ready[rank]:
                number = next(claims[rank])
                if number >= prompts:
                    return
                ready[rank].extend(range(number * size, (number + 1) * size))
            who = ready[rank].popleft()
            live[rank] += 1
            rank_of[who], turn_of[who] = rank, 0
            engines[rank].add(turns(who)[0][0], who)

    target = most_live
    for most_live in range(1, target + 1):      # ranks start at the same time: they claim in turn
        for rank in range(ranks):
            fill(rank)
    now = 0.0
    while True:
        rank = min(range(ranks), key=lambda r: engines[r].next_end())
        end = engines[rank].next_end()
        if tools and tools[0][0] < end:
            now, who = heapq.heappop(tools)
            engine = engines[rank_of[who]]
            engine.advance(now)
            engine.add(turns(who)[turn_of[who]][0], who)
            continue
        if end == math.inf:
            return now
        now = end
        engine = engines[rank]
        engine.advance(now)
        _, who = heapq.heappop(engine.running)
        engine.admit()
        wait = turns(who)[turn_of[who]][1]
        turn_of[who] += 1
        if turn_of[who] < len(turns(who)):
            heapq.heappush(tools, (now + wait, who))
        else:
            live[rank] -= 1
            fill(rank)


def compare(setting: Setting, first_share: float, seeds: Iterable[int]) -> dict[str, float]:
    """Means over seeds: makespan over the lower bound of both ways, and the static split's makespan over the shared one's."""
    rows = []
    for seed in seeds:
        work = make_work(setting, seed)
        bound, static, shared = lower_bound(work, setting), makespan(work, setting, None), makespan(work, setting, first_share)
        rows.append((static / bound, shared / bound, static / shared))
    names = ("static_over_bound", "shared_over_bound", "static_over_shared")
    return {name: statistics.fmean(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
