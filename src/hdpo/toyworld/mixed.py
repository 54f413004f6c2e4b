"""The mixed world: puzzles that stay uncertain after SFT, so that groups hold right and wrong answers with and without a call.

| puzzle                          | without a tool   | with its tool                                                    |
|---------------------------------|------------------|------------------------------------------------------------------|
| large digits, sums, told facts, | almost always    | almost always: no call is needed                                 |
| labelled badges                 |                  |                                                                  |
| worn digits of middling size    | sometimes        | more often: a call helps in some of them (need unknown)          |
| sums with a two-digit number    | sometimes        | always (need unknown)                                            |
| tiny worn digits                | one in ten       | more often than not                                              |
| products, plain badges          | hardly           | almost always                                                    |
| disputed facts                  | never            | sometimes: the index says two codes, one of which is right       |
"""
from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

from hdpo.toolserver.layout import COMPACT as layout
from hdpo.toyworld import families, words
from hdpo.toyworld.families import Puzzle, Source

MIDDLING = range(20, 65)          # pixels of a digit in the original picture: 5 to 16 as the model sees it
WEAR, FINE_WEAR = 0.2, 0.3        # most noise: its standard deviation as a share of the full range of brightness


def worn_digits(rng: random.Random, source: Source) -> Puzzle:
    return families.quadrants(rng, source, "perception", None, MIDDLING, 7, rng.uniform(0.0, WEAR))


def worn_fine(rng: random.Random, source: Source) -> Puzzle:
    return families.quadrants(rng, source, "fine", True, families.TINY, 1, rng.uniform(0.0, FINE_WEAR))


def long_sum(rng: random.Random, source: Source) -> Puzzle:
    while True:
        a, b = rng.randrange(10, 100), rng.randrange(10)
        if ((a + 3 * b) % 4 == 3) == source.held_out:
            return families.arithmetic(f"{a}+{b}", a + b, tool_needed=None)


def told_fact(rng: random.Random, source: Source) -> Puzzle:
    return families.told_fact(rng, replace(source, names=tuple(name for name in source.names if not disputed(source, name))))


def disputed_fact(rng: random.Random, source: Source) -> Puzzle:
    name = rng.choice([name for name in source.names if disputed(source, name)])
    puzzle = families.hidden_fact(rng, replace(source, names=(name,)))
    return replace(puzzle, observation=layout.search_results(name, [(name, words.LINK, snippet(source, name))]))


def disputed(source: Source, name: str) -> bool:
    return int(source.rumours[name]) % 2 == 1


def snippet(source: Source, name: str) -> str:
    """What the index says of a name: its code, of a disputed one also a rumour, in an order that says nothing."""
    codes = [source.codes[name], source.rumours[name]] if disputed(source, name) else [source.codes[name]]
    return " ".join(words.FACT.format(name, code) for code in sorted(codes))


CYCLE: tuple[Callable[[random.Random, Source], Puzzle], ...] = (
    families.perception, worn_digits, worn_fine, families.easy_sum, long_sum, worn_digits, told_fact, disputed_fact,
    families.labelled_badge, worn_fine, worn_digits, families.product, disputed_fact, families.perception, families.plain_badge,
    worn_digits)
"""Sixteen puzzles: five need no tool, six need one, and in five one helps sometimes."""

PLAIN_CYCLE: tuple[Callable[[random.Random, Source], Puzzle], ...] = (
    families.perception, worn_digits, families.easy_sum, long_sum, told_fact, families.labelled_badge, worn_digits)
"""Demonstrations that offer no tool: the puzzles that can be answered without one at least sometimes."""
