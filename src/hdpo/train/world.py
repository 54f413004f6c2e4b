"""Ranks and the small collectives of the control plane; one process when there is no launcher.

Objects and counts travel over a gloo group on the CPU, so that no metric, verdict or plan ever touches the device
stream. Gradients and gathered weights are the policy's own business.
"""
from __future__ import annotations

import datetime
import os
from typing import Any

import torch
import torch.distributed as dist


class World:
    """Rank and size of this run. Every method is a collective: all ranks call it, in the same order."""

    def __init__(self, timeout_s: float = 7200.0) -> None:
        self.rank = int(os.environ.get("RANK", 0))
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.node = int(os.environ.get("GROUP_RANK", os.environ.get("NODE_RANK", 0)))
        self._timeout = datetime.timedelta(seconds=timeout_s)
        self._group: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def connect(self) -> World:
        """Open the control group; torch.distributed must be initialised first when there is more than one rank."""
        if self.size > 1 and self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=self._timeout)
        return self

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value on every rank."""
        if self._group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise float64 sums over ranks."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: list[float]) -> list[float]:
        return self._reduce(values, dist.ReduceOp.MAX)

    def any(self, flag: bool) -> bool:
        return self.max([float(flag)])[0] > 0

    def barrier(self) -> None:
        if self._group is not None:
            dist.barrier(group=self._group)

    def _reduce(self, values: list[float], op: Any) -> list[float]:
        if self._group is None or not values:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, op=op, group=self._group)
        return [float(v) for v in tensor]
