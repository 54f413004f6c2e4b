"""Training rows from rank to rank: raw tensors over the control plane, nothing through rank 0.

Rows that show the same image share its tensor, and it is sent to a rank once. A row arrives as it left, bit for bit.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor

from hdpo.packing.costs import PromptCost, RowCost, WorkModel
from hdpo.packing.planning import Plan
from hdpo.pixels import PixelScale
from hdpo.ranks.world import World
from hdpo.types import Sample, Vision

BYTES_PER_TOKEN = 4 + 1 + 8
"""Of a row on its way: id, mask and log-prob of a token."""


def row_cost(sample: Sample, owner: int, work: WorkModel, prompt: PromptCost | None = None) -> RowCost:
    """What planning needs of a row that rank `owner` has, and that shares `prompt` with others."""
    pixels = sample.vision.pixels if sample.vision is not None else ()
    tokens, patches = len(sample.token_ids), sum(map(len, pixels))
    return RowCost(tokens, patches, work(tokens, patches),
                   nbytes=BYTES_PER_TOKEN * tokens + sum(p.nbytes for p in pixels), owner=owner, prompt=prompt)


def collect_rows(rows: Sequence[Sequence[Sample]], costs: Sequence[Sequence[RowCost]], plans: Sequence[Plan],
                 world: World) -> list[dict[int, Sample]]:
    """The rows that this rank computes: per mini-batch, by index in its plan. Collective.

    `rows` are those the rank has, per mini-batch; `costs` and `plans` are all ranks', the same everywhere.
    """
    def passing(source: int, target: int) -> Iterator[tuple[int, int]]:
        """(mini-batch, index) of the rows that go from one rank to another, in one order on both."""
        for mini, plan_ in enumerate(plans):
            yield from ((mini, i) for i in sorted(chain(*plan_[target])) if costs[mini][i].owner == source)

    first = [next((i for i, cost in enumerate(some) if cost.owner == world.rank), 0) for some in costs]
    arrived = exchange_rows([
        [rows[mini][i - first[mini]] for mini, i in passing(world.rank, target)] for target in range(world.size)], world)
    mine: list[dict[int, Sample]] = [{} for _ in plans]
    for source in range(world.size):
        for (mini, i), sample in zip(passing(source, world.rank), arrived[source], strict=True):
            mine[mini][i] = sample
    return mine


def exchange_rows(outgoing: Sequence[Sequence[Sample]], world: World) -> list[list[Sample]]:
    """`outgoing[r]` are the rows for rank r; returns the rows from each rank, in the order they were given. Collective."""
    arrived = world.exchange([to_tensors(rows) if rank != world.rank else [] for rank, rows in enumerate(outgoing)])
    return [to_rows(tensors) if rank != world.rank else list(outgoing[rank]) for rank, tensors in enumerate(arrived)]


def to_tensors(rows: Sequence[Sample]) -> list[Tensor]:
    """Rows as contiguous tensors on the CPU: nine for all rows together, then one per distinct image."""
    if not rows:
        return []
    images: dict[int, Tensor] = {}      # by identity: rows hold the very same tensor
    for row in rows:
        for pixels in row.vision.pixels if row.vision is not None else ():
            images.setdefault(id(pixels), pixels)
    place = {key: index for index, key in enumerate(images)}
    visions = [row.vision for row in rows]
    shown = [[place[id(pixels)] for pixels in vision.pixels] if vision is not None else [] for vision in visions]
    return [
        torch.tensor([(len(row.token_ids), len(some), row.prompt_length, row.group, row.sample_index)
                      for row, some in zip(rows, shown)]),
        torch.tensor([token for row in rows for token in row.token_ids], dtype=torch.int32),
        torch.tensor([trained for row in rows for trained in row.mask], dtype=torch.int8),
        torch.tensor([value for row in rows for value in row.rollout_log_probs], dtype=torch.float64),
        torch.tensor([row.advantages for row in rows], dtype=torch.float64),
        torch.tensor([row.member for row in rows], dtype=torch.bool),
        torch.tensor([index for some in shown for index in some], dtype=torch.int32),
        torch.cat([torch.zeros(0, 3, dtype=torch.int64), *(v.grid_thw for v in visions if v is not None)]),
        _scale_tensor(next((vision.scale for vision in visions if vision is not None), None)),
        *images.values(),
    ]


def to_rows(tensors: Sequence[Tensor]) -> list[Sample]:
    """What `to_tensors` was given."""
    if not tensors:
        return []
    sizes, token_ids, mask, log_probs, advantages, member, shown, grids, scaled, *images = tensors
    lengths, counts, prompt_lengths, groups, samples = sizes.T.tolist()
    scale = _scale_of(scaled)
    rows = []
    for index, (ids, trained, values, some, grid) in enumerate(zip(
            token_ids.split(lengths), mask.split(lengths), log_probs.split(lengths), shown.split(counts),
            grids.split(counts), strict=True)):
        vision = Vision(tuple(images[i] for i in some.tolist()), grid, scale) if len(some) else None
        rows.append(Sample(ids.tolist(), trained.tolist(), values.tolist(), tuple(advantages[index].tolist()),
                           tuple(member[index].tolist()), vision, prompt_lengths[index], groups[index], samples[index]))
    return rows


def _scale_tensor(scale: PixelScale | None) -> Tensor:
    """A run's images all have the same scale, or none: it travels once a message."""
    return torch.tensor([] if scale is None else [*scale.mean, *scale.std, scale.frames], dtype=torch.float64)


def _scale_of(tensor: Tensor) -> PixelScale | None:
    if not len(tensor):
        return None
    *values, frames = tensor.tolist()
    return PixelScale(tuple(values[:len(values) // 2]), tuple(values[len(values) // 2:]), int(frames))
