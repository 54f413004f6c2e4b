"""What one step measured: an accumulator that touches the device once.

Statistics of trajectories are in `hdpo.train.rollout_metrics`, the file that keeps a step's scalars in `hdpo.train.jsonl`;
this one is about numbers that training code adds while it runs.
"""
from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

Gather = Callable[[Any], list[Any]]
"""Collective over ranks: takes this rank's picklable object, returns every rank's, in rank order."""

Kind = Literal["mean", "sum", "max", "min", "time", "p50", "p99"]

_LOG_RATIO_BINS, _LOG_RATIO_LEAST, _LOG_RATIO_MOST = 600, 1e-6, 20.0   # bins of |log ratio| in nat, equal on a log scale
_LOG_RATIO_STEP = math.log(_LOG_RATIO_MOST / _LOG_RATIO_LEAST) / _LOG_RATIO_BINS
_PERCENTILES: dict[Kind, float] = {"p50": 0.5, "p99": 0.99}


def alone(item: Any) -> list[Any]:
    """The Gather of a single process."""
    return [item]


class Metrics:
    """Collects one step's numbers. Device tensors stay on the device until `reduce_over_ranks`, which moves them once.

        metrics = Metrics()
        with metrics.timed("update"):
            metrics.add("actor/pg_loss", loss.detach(), weight=tokens)
        scalars = metrics.reduce_over_ranks(gather)      # the same dict on every rank; the accumulator is empty again

    A mean is exact over any split into micro-batches and ranks, because numerator and weight travel apart.
    """

    def __init__(self) -> None:
        self._kinds: dict[str, Kind] = {}
        self._parts: dict[str, list[Tensor | float]] = {}      # name -> [numerator, weight] of a mean, else [value]

    def add(self, name: str, value: Tensor | float, weight: Tensor | float = 1.0) -> None:
        """Contribute `value` (scalar) with `weight` to the mean called `name`; weight 0 contributes nothing."""
        value, weight = _detached(value), _detached(weight)
        numerator: Tensor | float     # a NaN without weight (an empty micro-batch) must not count
        if isinstance(weight, Tensor):
            numerator = torch.where(weight != 0, value * weight, 0.0)
        else:
            numerator = value * weight if weight else 0.0
        self._merge(name, "mean", [numerator, weight])

    def total(self, name: str, value: Tensor | float) -> None:
        self._merge(name, "sum", [_detached(value)])

    def totals(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.total(name, value)

    def maximum(self, name: str, value: Tensor | float) -> None:
        self._merge(name, "max", [_detached(value)])

    def minimum(self, name: str, value: Tensor | float) -> None:
        self._merge(name, "min", [_detached(value)])

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the wall seconds of the block to `time/{phase}`, and note the memory held at its end as `memory/{phase}_gb`.

        Over ranks the mean counts, so that phases add up to the step (a rank that is early waits inside of some phase), and
        the fullest of them. Phases must not hold one another.
        """
        start = time.perf_counter()
        try:
            yield
        finally:
            if torch.cuda.is_available() and torch.cuda.is_initialized():
                torch.cuda.synchronize()    # a phase pays for the kernels it queued; a handful of phases a step
            self._merge(f"time/{phase}", "time", [time.perf_counter() - start])
            self.maximum(f"memory/{phase}_gb", memory_held() / 2**30)

    def divide(self, phase: str, parts: Mapping[str, float]) -> None:
        """Where a phase's seconds went, for a timeline; only a run's log keeps one."""

    def close_step(self, seconds: float) -> None:
        """Add `time/step`, the wall clock of the step on this rank, and `time/other`, what no phase accounts for."""
        timed = sum(float(parts[0]) for name, parts in self._parts.items() if self._kinds[name] == "time")
        self._merge("time/other", "time", [seconds - timed])
        self._merge("time/step", "time", [seconds])

    def forget_times(self) -> None:
        """Phases that were timed before the first step belong to none."""
        for name in [name for name, kind in self._kinds.items() if kind == "time"]:
            del self._kinds[name], self._parts[name]

    def add_mismatch(self, log_probs: Tensor, rollout_log_probs: Tensor, mask: Tensor) -> None:
        """How far trainer (`log_probs`) and engine are apart on sampled tokens; all three [N] (or any equal shape).

        With d = log_probs - rollout_log_probs and the engine as the sampling distribution: k1 = -d (its mean estimates
        KL(engine || trainer), may be negative), k3 = exp(d) - 1 - d (never negative, less variance), abs = |d|, ratio =
        exp(|d|), so a ratio of 2 is twice as likely in either direction; its p50 and p99 are exact to 3 % of |d|. unknown is
        the share of tokens that have no finite d; they count nowhere else.
        """
        d = (log_probs.detach() - rollout_log_probs.detach()).float()
        sampled = mask.detach().bool()
        kept = sampled & torch.isfinite(d)
        d = torch.where(kept, d, torch.zeros_like(d)).clamp(-_LOG_RATIO_MOST, _LOG_RATIO_MOST)
        count = kept.sum()
        self._merge("mismatch/unknown", "mean", [sampled.sum() - count, sampled.sum()])
        for name, value in (("k1", -d), ("k3", torch.expm1(d) - d), ("abs", d.abs())):
            self._merge(f"mismatch/{name}", "mean", [value.sum(), count])
        self._merge("mismatch/ratio_max", "max", [d.abs().amax().exp() if d.numel() else 1.0])
        bins = ((d.abs() / _LOG_RATIO_LEAST).log() / _LOG_RATIO_STEP).clamp(0, _LOG_RATIO_BINS - 1).long().flatten()
        # not bincount: it reads the largest bin back from the device
        counts = d.new_zeros(_LOG_RATIO_BINS).index_add_(0, bins, kept.flatten().float())
        for kind in _PERCENTILES:
            self._merge(f"mismatch/ratio_{kind}", kind, [counts])

    def reduce_over_ranks(self, gather: Gather = alone) -> dict[str, float]:
        """Move to the host, combine over ranks, clear. Collective when `gather` is; names may differ between ranks."""
        mine = (self._kinds, self._host())
        self._kinds, self._parts = {}, {}
        kinds: dict[str, Kind] = {}
        merged: dict[str, list[float]] = {}
        gathered = gather(mine)
        ranks = len(gathered)
        for rank_kinds, rank_values in gathered:
            for name, values in rank_values.items():
                kinds[name] = kind = rank_kinds[name]
                merged[name] = values if name not in merged else _combine(kind, merged[name], values)
        finished = {name: _finish(kinds[name], values, ranks) for name, values in merged.items()}
        return {name: value for name, value in finished.items() if value is not None}

    def _merge(self, name: str, kind: Kind, values: list[Tensor | float]) -> None:
        if self._kinds.setdefault(name, kind) != kind:
            raise ValueError(f"metric {name} was a {self._kinds[name]} and is now added as a {kind}")
        held = self._parts.get(name)
        self._parts[name] = values if held is None else _combine(kind, held, values)

    def _host(self) -> dict[str, list[float]]:
        """All parts as floats, with one transfer per device."""
        tensors: dict[torch.device, list[Tensor]] = {}
        for values in self._parts.values():
            for value in values:
                if isinstance(value, Tensor):
                    tensors.setdefault(value.device, []).append(value.flatten().double())
        moved = {device: iter(torch.cat(parts).tolist()) for device, parts in tensors.items()}
        host: dict[str, list[float]] = {}
        for name, values in self._parts.items():
            host[name] = []
            for value in values:
                if isinstance(value, Tensor):
                    host[name] += itertools.islice(moved[value.device], value.numel())
                else:
                    host[name].append(float(value))
        return host


def _detached(value: Tensor | float) -> Tensor | float:
    return value.detach() if isinstance(value, Tensor) else value


def _combine(kind: Kind, held: list, new: list) -> list:
    if kind not in ("max", "min"):
        return [a + b for a, b in zip(held, new, strict=True)]
    return [_extreme(kind, a, b) for a, b in zip(held, new, strict=True)]


def _extreme(kind: Kind, a: Any, b: Any) -> Any:
    """max or min of floats and tensors; never reads a tensor back, which would wait for the device."""
    if not isinstance(a, Tensor):
        a, b = b, a
    if not isinstance(a, Tensor):
        return max(a, b) if kind == "max" else min(a, b)
    return a.clamp(min=b) if kind == "max" else a.clamp(max=b)


def _finish(kind: Kind, values: list[float], ranks: int) -> float | None:
    if kind == "time":
        return values[0] / ranks
    if kind == "mean":
        return values[0] / values[1] if values[1] else None     # nothing was counted: no number, rather than a zero
    if kind in _PERCENTILES:
        return _percentile(values, _PERCENTILES[kind])
    return values[0]


def _percentile(counts: list[float], share: float) -> float | None:
    """The ratio exp(|d|) that `share` of the tokens stay below, from the histogram of |d|; upper edge of its bin."""
    wanted, seen = share * sum(counts), 0.0
    if not wanted:
        return None
    for index, count in enumerate(counts, start=1):
        seen += count
        if seen >= wanted:
            return math.exp(_LOG_RATIO_LEAST * math.exp(index * _LOG_RATIO_STEP))
    return None


def memory_held() -> int:
    """Bytes in use on this rank's device, by engine and trainer together; without a device those of this process."""
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return total - free
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:     # not Linux
        return 0


def memory_scalars() -> dict[str, float]:
    """GiB in use under the reference's names, for this rank: device (peak since the last reset) and host memory."""
    scalars = {}
    if torch.cuda.is_available():
        scalars["perf/max_memory_allocated_gb"] = torch.cuda.max_memory_allocated() / 2**30
        scalars["perf/max_memory_reserved_gb"] = torch.cuda.max_memory_reserved() / 2**30
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    except OSError:     # not Linux
        return scalars
    used = int(fields["MemTotal"].split()[0]) - int(fields["MemAvailable"].split()[0])
    return scalars | {"perf/cpu_memory_used_gb": used / 2**20}
