"""Which prompts a rank rolls out, and the random numbers of their rollouts."""
from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from typing import NamedTuple


class PromptQueue(NamedTuple):
    """Where a rank's prompts come from: `claim()` gives the number of its next one, at or beyond the end when none is left.

    `claim` is called on the background loop and must not block for long. `ranks` is how many claim from this queue.
    """

    claim: Callable[[], int]
    ranks: int = 1


def static_queue(rank: int = 0, ranks: int = 1) -> PromptQueue:
    """Every `ranks`-th prompt, whatever the others do: what a rank rolls out depends on nothing but its number."""
    return PromptQueue(itertools.count(rank, ranks).__next__)


def sampling_seed(seed: int, step: int, prompt: int, sample_index: int, turn: int) -> int:
    """The seed of one generation: 31 bits, the same on every machine and in every process.

    `prompt` is the prompt's number in the step, not the task's name: a task that comes twice in a step gets twice as many
    different rollouts, and tasks of two files that bear the same name don't share random numbers. A turn that is cut and goes on
    in the next step goes on with that step's.
    """
    name = f"{seed}|{step}|{prompt}|{sample_index}|{turn}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=4).digest(), "big") >> 1
