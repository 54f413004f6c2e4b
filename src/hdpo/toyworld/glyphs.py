"""Handwritten digits as drawing material of the toy world: real pixels, split so that held-out glyphs are never trained on.

Source: the 1,797 8 x 8 scans that ship with scikit-learn (UCI "Optical Recognition of Handwritten Digits"). A scan whose
nearest neighbours do not all carry its own label is left out: such scans are ambiguous to people too and would put a
ceiling on every accuracy measured in this world.
"""
from __future__ import annotations

import functools
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image

from hdpo.errors import DataError

NEIGHBOURS = 4        # scans that must agree with a scan's label
HELD_OUT_EVERY = 4    # every fourth legible scan of a digit is held out


@dataclass(frozen=True)
class Glyphs:
    """`ink` [N, 8, 8] float32 in 0..1 (1 is full ink), `labels` [N] int, `by_digit[d]` the rows of digit d."""

    ink: np.ndarray
    labels: np.ndarray
    by_digit: tuple[np.ndarray, ...]

    def draw(self, rng: random.Random, digit: int, size: int) -> Image.Image:
        """One random glyph of `digit` as a size x size mask of ink (mode L)."""
        rows = self.by_digit[digit]
        row = rows[rng.randrange(len(rows))]
        mask = Image.fromarray(np.rint(self.ink[row] * 255).astype(np.uint8))
        return mask.resize((size, size), Image.Resampling.BICUBIC)


def _legible(ink: np.ndarray, labels: np.ndarray) -> np.ndarray:
    flat = ink.reshape(len(ink), -1)
    square = (flat ** 2).sum(1)
    distance = square[:, None] + square[None] - 2 * flat @ flat.T
    np.fill_diagonal(distance, np.inf)
    nearest = np.argsort(distance, axis=1, kind="stable")[:, :NEIGHBOURS]
    return (labels[nearest] == labels[:, None]).all(1)


@functools.cache
def load_glyphs(split: str) -> Glyphs:
    """The legible glyphs of "train" or "held_out"; the two share no scan and do not depend on any seed.

    Raises DataError when scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError("the toy world draws scikit-learn's handwritten digits: pip install 'hdpo[demo]'") from None
    data = load_digits()
    ink = (data.images / 16.0).astype(np.float32)
    legible = _legible(ink, data.target)
    chosen = []
    for digit in range(10):
        rows = np.flatnonzero(legible & (data.target == digit))
        held_out = np.arange(len(rows)) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
        chosen.append(rows[held_out if split == "held_out" else ~held_out])
    rows = np.concatenate(chosen)
    ends = np.cumsum([len(c) for c in chosen])
    by_digit = tuple(np.arange(end - len(c), end) for c, end in zip(chosen, ends, strict=True))
    return Glyphs(ink[rows], data.target[rows], by_digit)
