"""Samples -> packed micro-batches, an equal number on every rank, with norms that are global.

Rows are packed one after another. For Qwen-VL this is exact when `position_ids` is [4, 1, N] (row 0 restarts at 0 in
each row, rows 1 to 3 are that row's own multimodal positions) and no attention mask is given: the model's mask
builder reads the row boundaries from row 0. An all-ones mask, or positions computed by the model over the whole pack,
leak across rows without any error (measured: 1.6 in the logits), so this file builds both.

What it does not do: move rows between ranks; a group's rows are trained where they were sampled.
"""
from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hdpo.agent.families import Positions, multimodal_positions
from hdpo.errors import ConfigError
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
    aggregation: str = "token_mean"
    response_budget: int = 1   # tokens; the constant of dr_grpo
    positions: Positions = multimodal_positions


def pack(samples: Sequence[Sample], spec: PackingSpec, channels: int = 0) -> MicroBatch:
    """Concatenate rows into one micro-batch of C = `channels`; adds the filler when no row holds an image."""
    rows = list(samples)
    if not rows or spec.filler.vision is not None and not any(s.vision is not None for s in rows):
        rows.append(spec.filler)
    ids, positions, trained, targets, weight, row_index, log_probs = [], [], [], [], [], [], []
    offset = 0
    for index, sample in enumerate(rows):
        tokens = torch.tensor(sample.token_ids)
        grid = sample.vision.grid_thw if sample.vision is not None else None
        mask = torch.tensor(sample.mask[1:], dtype=torch.bool)   # the first token of a row is never predicted
        sampled = mask.nonzero()[:, 0]
        ids.append(tokens)
        positions.append(spec.positions(tokens, grid, spec.image_token_id, spec.merge_size))
        trained.append(sampled + offset)
        targets.append(tokens[1:][sampled])
        weight.append(torch.full((len(sampled),), token_weight(len(sampled), spec)))
        row_index.append(torch.full((len(sampled),), index, dtype=torch.int64))
        log_probs.append(torch.tensor(sample.rollout_log_probs[1:], dtype=torch.float32)[sampled])
        offset += len(tokens)
    advantages = torch.zeros(channels, len(rows))
    member = torch.zeros(channels, len(rows), dtype=torch.bool)
    for index, sample in enumerate(samples):
        advantages[:, index] = torch.tensor(sample.advantages)
        member[:, index] = torch.tensor(sample.member, dtype=torch.bool)
    seen = [s.vision for s in rows if s.vision is not None]
    vision = Vision(torch.cat([v.pixel_values for v in seen]), torch.cat([v.grid_thw for v in seen])) if seen else None
    return MicroBatch(
        input_ids=torch.cat(ids)[None], position_ids=torch.cat(positions, dim=1)[:, None], trained=torch.cat(trained),
        targets=torch.cat(targets), weight=torch.cat(weight), row=torch.cat(row_index),
        rollout_log_probs=torch.cat(log_probs), advantages=advantages, member=member, vision=vision,
        num_rows=len(samples))


def token_weight(num_trained: int, spec: PackingSpec) -> float:
    """Share of one trained token in its norm: 1, 1/length (sequence_mean) or 1/response budget (dr_grpo)."""
    if spec.aggregation == "token_mean":
        return 1.0
    return 1.0 / (num_trained if spec.aggregation == "sequence_mean" else spec.response_budget) if num_trained else 0.0


def row_norm(sample: Sample, spec: PackingSpec) -> float:
    """What one row adds to the norm of a channel it is a member of: its trained tokens, or 1."""
    num_trained = sum(sample.mask[1:])
    return float(num_trained) if spec.aggregation == "token_mean" else float(num_trained > 0)


def plan(work: Sequence[tuple[int, int]], num_bins: int, max_tokens: int, max_patches: int) -> list[list[int]] | None:
    """Distribute rows (tokens, patches) over bins, longest first onto the lightest bin that has room.

    Returns the rows of each bin, or None when `num_bins` do not suffice. A row beyond a budget on its own gets a bin of
    its own. Greedy longest-first is as balanced here as Karmarkar-Karp, far cheaper, and honours the budget.
    """
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    heap: list[tuple[int, int, int]] = [(0, b, 0) for b in range(num_bins)]   # (tokens, bin, patches)
    for index in sorted(range(len(work)), key=lambda i: -work[i][0]):
        tokens, patches = work[index]
        tried = []
        while heap:
            used_tokens, b, used_patches = heapq.heappop(heap)
            fits = used_tokens + tokens <= max_tokens and used_patches + patches <= max_patches
            if fits or not bins[b]:
                bins[b].append(index)
                heapq.heappush(heap, (used_tokens + tokens, b, used_patches + patches))
                break
            tried.append((used_tokens, b, used_patches))
        else:
            return None
        for entry in tried:
            heapq.heappush(heap, entry)
    return bins


def smallest_plan(work: Sequence[tuple[int, int]], max_tokens: int, max_patches: int) -> int:
    """The fewest bins `plan` manages with."""
    if not work:
        return 0
    bins = max(-(-sum(t for t, _ in work) // max_tokens), -(-sum(p for _, p in work) // max_patches), 1)
    while plan(work, bins, max_tokens, max_patches) is None:
        bins += 1
    return bins


def make_train_batch(mini_batches: Sequence[Sequence[Sample]], spec: PackingSpec, world: World) -> TrainBatch:
    """Pack each mini-batch's rows of this rank. Collective: norms and the micro-batch counts are global.

    Rows whose advantages are all zero count in the norms and are not computed: their gradient is exactly zero.
    """
    built = []
    for samples in mini_batches:
        channels = int(world.max([float(max((len(s.advantages) for s in samples), default=0))])[0])
        counted = [[s for s in samples if s.member[c]] for c in range(channels)] or [list(samples)]
        totals = [sum(row_norm(s, spec) for s in rows) for rows in counted]
        norms = torch.tensor(world.sum(totals), dtype=torch.float32)
        needed = [s for s in samples if not s.advantages or any(s.advantages)]
        work = [_row_work(s) for s in needed]
        count = max(1, int(world.max([float(smallest_plan(work, spec.max_tokens, spec.max_patches))])[0]))
        bins = plan(work, count, spec.max_tokens, spec.max_patches)
        if bins is None:
            raise ConfigError("batch.tokens_per_micro_batch: rows do not fit; raise it")
        bins.sort(key=lambda rows: -sum(work[i][0] for i in rows))   # so that step s is alike on all ranks
        built.append(MiniBatch([pack([needed[i] for i in rows], spec, channels) for rows in bins], norms))
    return TrainBatch(built)


def _row_work(sample: Sample) -> tuple[int, int]:
    return len(sample.token_ids), len(sample.vision.pixel_values) if sample.vision is not None else 0
