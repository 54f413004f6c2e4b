"""How sure a figure is: clustered standard errors, intervals, paired tests. Standard library and numpy; no vendor.

Everything reported is a mean over units (questions, or composites of several) that may come in clusters. The standard
error counts clusters (Miller, arXiv 2411.00640): SE^2 = sum over clusters of (sum of deviations)^2 / n^2, which for
clusters of one is p (1 - p) / n. Intervals are Wilson's with the effective sample size p (1 - p) / SE^2, so that they stay
in [0, 1] and say something at 0 and at 1 too.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Z95 = 1.959963984540054
POWER = Z95 + 0.8416212335729143     # of a two-sided test at 5 %, seen four times in five
RESAMPLES, FLIPS = 1000, 10_000
SEED = 20260408


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over `n` units in `clusters` clusters; None over nothing. `interval` is the 95 % one."""

    score: float | None
    n: int
    se: float | None = None
    interval: tuple[float, float] | None = None
    clusters: int = 0

    @property
    def detectable(self) -> float | None:
        """The smallest difference between two independent runs of this size that a test would show four times in five."""
        return None if self.se is None else min(1.0, POWER * math.sqrt(2) * self.se)

    def record(self) -> dict[str, Any]:
        return {"score": self.score, "n": self.n}


NOTHING = Estimate(None, 0)


def estimate(values: Sequence[float], clusters: Sequence[str] | None = None) -> Estimate:
    """The mean of `values` in [0, 1] with its clustered standard error and interval."""
    n = len(values)
    if not n:
        return NOTHING
    center = math.fsum(values) / n
    sums: dict[str, list[float]] = {}
    for value, cluster in zip(values, clusters if clusters is not None else map(str, range(n)), strict=True):
        sums.setdefault(cluster, []).append(value - center)
    se = math.sqrt(math.fsum(math.fsum(part) ** 2 for part in sums.values())) / n
    spread = center * (1 - center)
    effective = min(float(n), spread / se**2) if se > 0 and spread > 0 else float(len(sums))
    return Estimate(center, n, se, wilson(center, effective), len(sums))


def wilson(share: float, n: float) -> tuple[float, float]:
    """The 95 % interval of a share seen in n draws."""
    share = min(1.0, max(0.0, share))
    middle = (share + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p-value of McNemar's test: how surprising these discordant counts are if both are equally good."""
    n, k = only_first + only_second, min(only_first, only_second)
    if n == 0:
        return 1.0
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


@dataclass(frozen=True, slots=True)
class Comparison:
    """This run against another over the same units: `won` here only, `lost` there only (of units that are 0 or 1)."""

    n: int
    difference: float | None
    interval: tuple[float, float] | None
    won: int
    lost: int
    p: float | None
    test: str
    detectable: float | None

    def record(self) -> dict[str, Any]:
        return {"n": self.n, "difference": self.difference, "ci95": self.interval, "won": self.won, "lost": self.lost,
                "p": self.p, "test": self.test, "detectable": self.detectable}


def compare(first: Sequence[float], second: Sequence[float], clusters: Sequence[str]) -> Comparison:
    """Paired: McNemar's exact test for single right-or-wrong units, a cluster sign-flip test for everything else.

    The interval of the difference comes from RESAMPLES resamples of the clusters with the seed SEED.
    """
    n = len(first)
    if not n:
        return Comparison(0, None, None, 0, 0, None, "none", None)
    deltas = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    won, lost = int((deltas > 0).sum()), int((deltas < 0).sum())
    _, places = np.unique(np.asarray(clusters), return_inverse=True)
    sums, sizes = np.bincount(places, deltas), np.bincount(places)
    generator = np.random.default_rng(SEED)
    drawn = generator.integers(len(sums), size=(RESAMPLES, len(sums)))
    means = sums[drawn].sum(1) / sizes[drawn].sum(1)
    low, high = np.quantile(means, (0.025, 0.975))
    binary = len(sums) == n and set(np.unique(np.abs(deltas))) <= {0.0, 1.0}
    if binary:
        p, test = mcnemar(won, lost), "McNemar, exact"
    else:
        extreme = sum(int((np.abs(generator.choice((-1.0, 1.0), size=(FLIPS // 100, len(sums))) @ sums)
                           >= abs(sums.sum()) - 1e-12).sum()) for _ in range(100))
        p, test = (extreme + 1) / (FLIPS + 1), f"sign flips of {len(sums)} clusters"
    se = math.sqrt(float(((sums - sizes * deltas.mean()) ** 2).sum())) / n
    return Comparison(n, float(deltas.mean()), (float(low), float(high)), won, lost, p, test, POWER * se)
