"""Samples -> packed micro-batches, an equal number on every rank, with norms that are global.

Rows are packed one after another. For Qwen-VL this is exact when `position_ids` is [4, 1, N] (row 0 restarts at 0 in
each row, rows 1 to 3 are that row's own multimodal positions) and no attention mask is given: transformers reads the row
boundaries from row 0. With FlashAttention it builds no mask, hands row 0 to every layer, and each derives cumulative
lengths from where it is 0 and calls the varlen kernel. With SDPA it would build a block-diagonal mask, N x N; there
adapters/packed_attention.py goes row by row instead, so that either way a pack costs the sum of its rows' squares. An
all-ones mask, or positions computed by the model over the whole pack, leak across rows without any error (measured: 1.6
in the logits), so this file builds both.

Micro-batches are planned over all ranks (see planning), and rows go to the rank that computes them (see exchange).
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hdpo.agent.families import Positions, multimodal_positions
from hdpo.losses import Aggregation, aggregation_norms, aggregation_token_weights
from hdpo.train.exchange import collect_rows, row_cost
from hdpo.train.planning import Budget, WorkModel, plan
from hdpo.train.world import World
from hdpo.types import MicroBatch, MiniBatch, Sample, TrainBatch, Vision


@dataclass(frozen=True, slots=True)
class PackingSpec:
    """What packing must know of the model and the settings.

    `filler` is a row with nothing trained and, for a model that sees, one small image. It fills a micro-batch of a rank
    that has run out of rows, and joins one without images, so that under ZeRO-3 every rank gathers the same modules in
    the same order.
    """

    image_token_id: int | None
    merge_size: int            # patches per side that become one image token
    max_tokens: int
    max_patches: int
    filler: Sample
    aggregation: Aggregation = "token_mean"
    response_budget: int = 1   # tokens; the constant of dr_grpo
    positions: Positions = multimodal_positions
    work: WorkModel = WorkModel()

    @property
    def budget(self) -> Budget:
        sees = self.filler.vision is not None
        return Budget(self.max_tokens, self.max_patches, len(self.filler.token_ids) if sees else 0)


def pack(samples: Sequence[Sample], spec: PackingSpec, channels: int = 0) -> MicroBatch:
    """Concatenate rows into one micro-batch of C = `channels`; adds the filler when no row holds an image."""
    rows = list(samples)
    if not rows or spec.filler.vision is not None and not any(s.vision is not None for s in rows):
        rows.append(spec.filler)
    ids, positions, trained, targets, log_probs = [], [], [], [], []
    offset = 0
    for sample in rows:
        tokens = torch.tensor(sample.token_ids)
        grid = sample.vision.grid_thw if sample.vision is not None else None
        mask = torch.tensor(sample.mask[1:], dtype=torch.bool)   # the first token of a row is never predicted
        sampled = mask.nonzero()[:, 0]
        ids.append(tokens)
        positions.append(spec.positions(tokens, grid, spec.image_token_id, spec.merge_size))
        trained.append(sampled + offset)
        targets.append(tokens[1:][sampled])
        log_probs.append(torch.tensor(sample.rollout_log_probs[1:], dtype=torch.float32)[sampled])
        offset += len(tokens)
    lengths = torch.tensor([len(sampled) for sampled in trained])
    row = torch.repeat_interleave(lengths)
    advantages = torch.zeros(channels, len(rows))
    member = torch.zeros(channels, len(rows), dtype=torch.bool)
    for index, sample in enumerate(samples):
        advantages[:, index] = torch.tensor(sample.advantages)
        member[:, index] = torch.tensor(sample.member, dtype=torch.bool)
    seen = [s.vision for s in rows if s.vision is not None]
    vision = Vision(tuple(p for v in seen for p in v.pixels), torch.cat([v.grid_thw for v in seen])) if seen else None
    return MicroBatch(
        input_ids=torch.cat(ids)[None], position_ids=torch.cat(positions, dim=1)[:, None], trained=torch.cat(trained),
        targets=torch.cat(targets), weight=aggregation_token_weights(lengths, spec.aggregation)[row], row=row,
        rollout_log_probs=torch.cat(log_probs), advantages=advantages, member=member, vision=vision,
        num_rows=len(samples))


def make_train_batch(mini_batches: Sequence[Sequence[Sample]], spec: PackingSpec, world: World, channels: int) -> TrainBatch:
    """Pack the rows of all ranks, mini-batch by mini-batch; each rank gives those it has. Collective.

    Rows whose advantages are all zero count in the norms and are neither moved nor computed: their gradient is exactly
    zero. Norms and token weights are those of `losses.aggregation_norms` and `aggregation_token_weights`. `channels` is
    C, 0 for SFT.
    """
    needed = [[s for s in samples if not channels or any(s.advantages)] for samples in mini_batches]
    ranks = world.gather([(_norms(samples, spec, channels), [row_cost(s, world.rank, spec.work) for s in rows])
                          for samples, rows in zip(mini_batches, needed)])
    minis = list(zip(*ranks, strict=True))     # [mini-batch][rank]
    costs = [[cost for _, some in mini for cost in some] for mini in minis]
    plans = [plan(some, world.size, spec.budget) for some in costs]
    mine = collect_rows(needed, costs, plans, world)
    return TrainBatch([
        MiniBatch([pack([rows[i] for i in bin_], spec, channels) for bin_ in plan_[world.rank]],
                  torch.tensor([sum(parts) for parts in zip(*(norms for norms, _ in mini), strict=True)], dtype=torch.float64))
        for mini, plan_, rows in zip(minis, plans, mine)])


def _norms(samples: Sequence[Sample], spec: PackingSpec, channels: int) -> list[float]:
    """This rank's part of the norms [C], or [1] for SFT."""
    lengths = torch.tensor([sum(s.mask[1:]) for s in samples])
    member = torch.tensor([s.member for s in samples], dtype=torch.bool).reshape(len(samples), channels).T
    counted = member if channels else torch.ones(1, len(samples), dtype=torch.bool)
    return aggregation_norms(lengths, counted, spec.aggregation, spec.response_budget).tolist()
