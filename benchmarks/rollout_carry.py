"""Simulated steps of many ranks with rollout.carry_over, by the rule of hdpo.agent.carry itself. Used by bench_rollout.py (R4).

Engines are those of rollout_queue.py with the decode speed of an 8B model on an H100. A trajectory's tokens are lognormal (mean
2.5k, 99 % below 15k, none above 16,384; rollouts of a prompt share a part of their length), split over turns, between which
tools take a lognormal time. Calls under way at the end of a step go on while the policy trains. Training takes `train_s` seconds
a token and rank, and a sync of the weights `sync_s`. One-step-off: half of the ranks sample whole steps while the others train.
"""
from __future__ import annotations

import heapq
import itertools
import math
import random
import statistics
from collections import deque
from dataclasses import dataclass, field, replace

from rollout_queue import Setting, _Engine

from hdpo.agent import carry
from hdpo.agent.rollout import FIRST_SHARE, LIVE_PER_SEQUENCE

DECODE = Setting(fixed_s=0.0051, per_sequence_s=0.00027)
CAP, MEDIAN, SHARED, OWN = 16384, 1555.0, 0.5, 0.837
WARM_UP, DRAIN = 2, 2


@dataclass(frozen=True)
class Run:
    """`max_versions` is rollout.carry_max_versions."""

    ranks: int = 8
    carry_over: float = 0.0
    max_versions: int = 2
    steps: int = 16
    prompts: int = 128
    group_size: int = 16
    train_s: float = 0.00015
    sync_s: float = 8.0
    tool_s: float = 2.0


@dataclass
class Trajectory:
    turns: list[tuple[float, float]]      # (tokens, seconds of the call that follows)
    turn: int = 0
    left: float = 0.0                     # tokens of the turn
    due: float = 0.0                      # when its call is answered; 0 while it generates
    started: bool = False
    ended: bool = False

    @property
    def tokens(self) -> float:
        return sum(tokens for tokens, _ in self.turns)


@dataclass
class Group:
    index: int
    members: list[Trajectory]
    born: int = -1                        # step in which its first token was sampled

    @property
    def complete(self) -> bool:
        return all(member.ended for member in self.members)


def make_group(run: Run, index: int, coin: random.Random) -> Group:
    hard = coin.lognormvariate(0, SHARED)
    members = []
    for _ in range(run.group_size):
        total = min(CAP, max(30.0, MEDIAN * hard * coin.lognormvariate(0, OWN)))
        cuts = sorted(coin.random() for _ in range(min(10, int(coin.expovariate(1 / 1.5)))))
        parts = [total * (b - a) for a, b in zip([0.0, *cuts], [*cuts, 1.0])]
        waits = [run.tool_s * coin.lognormvariate(0, 1.2) for _ in parts[:-1]] + [0.0]
        members.append(Trajectory(list(zip(parts, waits, strict=True)), left=parts[0]))
    return Group(index, members)


@dataclass
class _Rank:
    engine: _Engine
    groups: dict[int, Group] = field(default_factory=dict)
    ready: deque[tuple[Group, Trajectory]] = field(default_factory=deque)
    live: int = 0


class _Step:
    """One rollout phase: until the rule says that it is over."""

    def __init__(self, run: Run, step: int, now: float, ranks: list[_Rank], new: list[Group]) -> None:
        self.run, self.step, self.now, self.ranks, self.new = run, step, now, ranks, new
        self.tools: list[tuple[float, int, int, Group, Trajectory]] = []
        self.number, self.claimed = itertools.count(), 0
        self.playing: dict[int, tuple[Group, Trajectory]] = {}
        held = [group for rank in ranks for group in rank.groups.values()]
        awaited = [group for group in held if not group.complete and group.born >= 0
                   and not carry.may_wait(group.born, step, run.max_versions)]
        self.awaited, self.left = {group.index for group in awaited}, len(awaited)
        self.complete = sum(group.complete for group in held)
        total = (len(held) + len(new)) * run.group_size
        cap = math.ceil(LIVE_PER_SEQUENCE * DECODE.max_num_seqs)
        self.most_live = min(cap, math.ceil(FIRST_SHARE * total / run.ranks))
        for rank in ranks:
            rank.engine = _Engine(DECODE, 1.0)
            rank.engine.now, rank.live = now, 0
            rank.ready.clear()
            for group in sorted(rank.groups.values(), key=lambda g: (g.born if g.born >= 0 else step, g.index)):
                rank.ready.extend((group, member) for member in group.members if not member.ended)

    def play(self) -> float:
        target = self.most_live
        for self.most_live in range(1, target + 1):      # ranks claim in turn
            for number in range(len(self.ranks)):
                self._fill(number)
        while not carry.is_over(self.complete, self.run.prompts, self.left):
            rank = min(range(len(self.ranks)), key=lambda r: self.ranks[r].engine.next_end())
            end = self.ranks[rank].engine.next_end()
            if self.tools and self.tools[0][0] < end:
                self.now, _, rank, group, member = heapq.heappop(self.tools)
                member.due = 0.0
                self._generate(rank, group, member)
                continue
            self.now = end
            self._generated(rank)
        self._cut()
        return self.now

    def _fill(self, number: int) -> None:
        rank = self.ranks[number]
        while rank.live < self.most_live:
            if not rank.ready:
                if self.claimed == len(self.new):
                    return
                group = self.new[self.claimed]
                self.claimed += 1
                rank.groups[group.index] = group
                rank.ready.extend((group, member) for member in group.members)
            group, member = rank.ready.popleft()
            rank.live += 1
            group.born = self.step if group.born < 0 else group.born
            member.started = True
            if member.due > self.now:
                heapq.heappush(self.tools, (member.due, next(self.number), number, group, member))
            else:
                member.due = 0.0
                self._generate(number, group, member)

    def _generate(self, rank: int, group: Group, member: Trajectory) -> None:
        name, engine = next(self.number), self.ranks[rank].engine
        self.playing[name] = group, member
        engine.advance(self.now)
        engine.add(member.left, name)

    def _generated(self, number: int) -> None:
        rank = self.ranks[number]
        rank.engine.advance(self.now)
        _, name = heapq.heappop(rank.engine.running)
        rank.engine.admit()
        group, member = self.playing.pop(name)
        wait = member.turns[member.turn][1]
        member.turn += 1
        if member.turn < len(member.turns):
            member.left, member.due = member.turns[member.turn][0], self.now + wait
            heapq.heappush(self.tools, (member.due, next(self.number), number, group, member))
            return
        member.ended = True
        rank.live -= 1
        if group.complete:
            self.complete += 1
            self.left -= group.index in self.awaited
        self._fill(number)

    def _cut(self) -> None:
        for rank in self.ranks:
            rank.engine.advance(self.now)
            for end, name in rank.engine.running:
                self.playing[name][1].left = max(0.0, end - rank.engine.virtual)


def simulate(run: Run, seed: int) -> dict[str, float]:
    """Tokens trained per second of the steps between warm-up and drain; `bias` is the mean length of the trained over that of all
    that were started by then, less 1 (when the run has ended both are the same)."""
    coin, now, started = random.Random(seed), 0.0, list[Group]()
    ranks = [_Rank(_Engine(DECODE, 1.0)) for _ in range(run.ranks)]
    pool: deque[Group] = deque()
    steps: list[tuple[float, float, float]] = []     # (seconds, tokens, share of groups that were carried)
    trained: list[Group] = []
    for step in range(run.steps):
        begun, held = now, sum(len(rank.groups) for rank in ranks)
        while len(pool) < 2 * run.prompts:
            pool.append(make_group(run, len(started) + len(pool), coin))
        fresh = carry.open_prompts(run.prompts, run.carry_over, run.steps - step) - held
        phase = _Step(run, step, now, ranks, [pool[n] for n in range(max(0, fresh))])
        now = phase.play()
        started += [pool.popleft() for _ in range(phase.claimed)]
        complete = [(carry.may_wait(group.born, step, run.max_versions), index)
                    for rank in ranks for index, group in rank.groups.items() if group.complete]
        chosen = carry.chosen(complete, run.prompts)
        rows = [rank.groups.pop(index) for rank in ranks for index in list(rank.groups) if index in chosen]
        assert len(rows) == run.prompts and all(step - group.born < run.max_versions for group in rows)
        tokens = sum(member.tokens for group in rows for member in group.members)
        now += run.sync_s + run.train_s * tokens / run.ranks
        steps.append((now - begun, tokens, sum(group.born < step for group in rows) / len(rows)))
        trained += rows
        if step == run.steps - DRAIN - 1:
            bias = _mean(trained) / _mean(started) - 1.0
    assert sorted(group.index for group in trained) == sorted(group.index for group in started)
    middle = steps[WARM_UP:-DRAIN]
    seconds, tokens, carried = zip(*middle)
    return {"tokens_per_s": sum(tokens) / sum(seconds), "step_s": statistics.fmean(seconds),
            "groups_carried": statistics.fmean(carried), "bias": bias}


def _mean(groups: list[Group]) -> float:
    return statistics.fmean(member.tokens for group in groups for member in group.members)


def bound(run: Run, seed: int) -> float:
    """Tokens per second when engines are always full and nothing is waited for; training and sync as they are."""
    coin = random.Random(seed)
    tokens = _mean([make_group(run, n, coin) for n in range(4 * run.prompts)]) * run.prompts * run.group_size
    each = min(DECODE.max_num_seqs, run.prompts * run.group_size / run.ranks * (1 + run.carry_over))
    rollout = tokens / run.ranks * DECODE.step_s(int(each)) / each
    return tokens / (rollout + run.sync_s + run.train_s * tokens / run.ranks)


def one_step_off(run: Run, seed: int) -> float:
    """Tokens per second when half of the ranks sample the next step while the others train; both wait for each other."""
    half = replace(run, ranks=run.ranks // 2, carry_over=0.0, train_s=0.0, sync_s=0.0)
    found = simulate(half, seed)
    tokens = found["tokens_per_s"] * found["step_s"]
    return tokens / (run.sync_s + max(found["step_s"], run.train_s * tokens / half.ranks))
