"""Samples -> packed micro-batches, an equal number on every rank, with norms that are global.

Rows are packed one after another. For Qwen-VL this is exact when `position_ids` is [4, 1, N] (row 0 restarts at 0 in
each row, rows 1 to 3 are that row's own multimodal positions) and attention is told where rows begin and end, as
adapters/packed_attention.py is by `MicroBatch.spans`; other attention finds the boundaries in row 0 when it is given no
mask. An all-ones mask, or positions computed by the model over the whole pack, leak across rows without any error
(measured: 1.6 in the logits), so this file builds both.

Rows of a group begin with the same prompt (see prompts). A micro-batch may hold it once: its tokens, its images, its keys
and values. Each row's positions go on from it, and its last token predicts the first of each. Gradients are the same.

Micro-batches are planned over all ranks (see planning), and rows go to the rank that computes them (see exchange).
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hdpo.agent.families import Positions, multimodal_positions
from hdpo.losses import Aggregation, aggregation_norms, aggregation_token_weights
from hdpo.packing.costs import Budget, PromptCost, RowCost, WorkModel
from hdpo.packing.exchange import collect_rows, row_cost
from hdpo.packing.planning import plan
from hdpo.packing.prompts import prompt_images, sharing_rows
from hdpo.ranks.world import World
from hdpo.types import MicroBatch, MiniBatch, Sample, Span, TrainBatch, Vision, join


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
    share_prompts: bool = False
    every_row: bool = False    # rows without any advantage are computed too: HdpoConfig.every_row

    def sharing(self, rows: Sequence[Sample]) -> list[int]:
        """For each row the first that has the same prompt, -1 where there is no other: see prompts.sharing_rows."""
        return sharing_rows(rows, self.image_token_id, self.merge_size) if self.share_prompts else [-1] * len(rows)

    @property
    def budget(self) -> Budget:
        sees = self.filler.vision is not None
        return Budget(self.max_tokens, self.max_patches, len(self.filler.token_ids) if sees else 0)


def is_computed(advantages: Sequence[float], member: Sequence[bool], every_row: bool) -> bool:
    """Whether a row has a gradient: an advantage or, with `every_row`, the terms over all tokens of the accuracy channel."""
    return any(advantages) or every_row and member[0]


def pack(samples: Sequence[Sample], spec: PackingSpec, channels: int = 0) -> MicroBatch:
    """Concatenate rows into one micro-batch of C = `channels`; adds the filler when no row holds an image.

    With `spec.share_prompts`, a prompt that several rows have is laid down once, before the first of them.
    """
    rows = list(samples)
    if not rows or spec.filler.vision is not None and not any(s.vision is not None for s in rows):
        rows.append(spec.filler)
    trained, targets, log_probs = [], [], []
    strip = _Strip(spec)
    for sample, first in zip(rows, spec.sharing(rows)):
        place = strip.lay(sample, first)
        mask = torch.tensor(sample.mask[1:], dtype=torch.bool)   # the first token of a row is never predicted
        sampled = mask.nonzero()[:, 0]
        trained.append(place[sampled])
        targets.append(torch.tensor(sample.token_ids[1:])[sampled])
        log_probs.append(torch.tensor(sample.rollout_log_probs[1:], dtype=torch.float32)[sampled])
    lengths = torch.tensor([len(sampled) for sampled in trained])
    row = torch.repeat_interleave(lengths)
    advantages = torch.zeros(channels, len(rows))
    member = torch.zeros(channels, len(rows), dtype=torch.bool)
    for index, sample in enumerate(samples):
        advantages[:, index] = torch.tensor(sample.advantages)
        member[:, index] = torch.tensor(sample.member, dtype=torch.bool)
    return MicroBatch(
        input_ids=torch.cat(strip.ids)[None], position_ids=torch.cat(strip.positions, dim=1)[:, None],
        trained=torch.cat(trained), targets=torch.cat(targets),
        weight=aggregation_token_weights(lengths, spec.aggregation)[row], row=row, rollout_log_probs=torch.cat(log_probs),
        advantages=advantages, member=member, vision=strip.vision(), num_rows=len(samples), spans=tuple(strip.spans),
        groups=tuple(sample.group for sample in rows),
        origins=tuple((sample.group, sample.sample_index) for sample in samples))


class _Strip:
    """The tokens of a pack, laid down span by span; images in the order in which their tokens lie."""

    def __init__(self, spec: PackingSpec) -> None:
        self.ids: list[Tensor] = []
        self.positions: list[Tensor] = []
        self.spans: list[Span] = []
        self._spec, self._length = spec, 0
        self._visions: list[Vision] = []
        self._prompts: dict[int, tuple[int, Tensor]] = {}     # by first row: the prompt's span and its places

    def lay(self, sample: Sample, first: int) -> Tensor:
        """Add a row, less the prompt if another row with the same `first` has brought it. Returns its tokens' places [L]."""
        spec, vision = self._spec, sample.vision
        ids = torch.tensor(sample.token_ids)
        positions = spec.positions(ids, vision.grid_thw if vision is not None else None, spec.image_token_id, spec.merge_size)
        if first < 0:
            return self._lay(ids, positions, vision)
        given, shown = sample.prompt_length, prompt_images(sample, spec.image_token_id, spec.merge_size)
        if first not in self._prompts:
            before = vision.part(slice(shown)) if vision is not None else None
            self._prompts[first] = len(self.spans), self._lay(ids[:given], positions[:, :given], before)
        number, places = self._prompts[first]
        after = vision.part(slice(shown, None)) if vision is not None else None
        return torch.cat([places, self._lay(ids[given:], positions[:, given:], after, number)])

    def _lay(self, ids: Tensor, positions: Tensor, vision: Vision | None, prompt: int = -1) -> Tensor:
        self.ids.append(ids)
        self.positions.append(positions)
        self.spans.append(Span(len(ids), prompt))
        if vision is not None:
            self._visions.append(vision)
        self._length += len(ids)
        return torch.arange(self._length - len(ids), self._length)

    def vision(self) -> Vision | None:
        return join(self._visions)


def make_train_batch(mini_batches: Sequence[Sequence[Sample]], spec: PackingSpec, world: World, channels: int) -> TrainBatch:
    """Pack the rows of all ranks, mini-batch by mini-batch; each rank gives those it has. Collective.

    Rows that are not `is_computed` count in the norms and are neither moved nor computed: their gradient is exactly
    zero. Norms and token weights are those of `losses.aggregation_norms` and `aggregation_token_weights`. `channels` is
    C, 0 for SFT.
    """
    needed = [[s for s in samples if not channels or is_computed(s.advantages, s.member, spec.every_row)]
              for samples in mini_batches]
    ranks = world.gather([(_norms(samples, spec, channels), _costs(rows, spec, world))
                          for samples, rows in zip(mini_batches, needed)])
    minis = list(zip(*ranks, strict=True))     # [mini-batch][rank]
    costs = [[cost for _, some in mini for cost in some] for mini in minis]
    plans = [plan(some, world.size, spec.budget) for some in costs]
    mine = collect_rows(needed, costs, plans, world)
    return TrainBatch([
        MiniBatch([pack([rows[i] for i in bin_], spec, channels) for bin_ in plan_[world.rank]],
                  torch.tensor([sum(parts) for parts in zip(*(norms for norms, _ in mini), strict=True)], dtype=torch.float64))
        for mini, plan_, rows in zip(minis, plans, mine)])


def _costs(rows: Sequence[Sample], spec: PackingSpec, world: World) -> list[RowCost]:
    """What planning needs of this rank's rows. A prompt is named by the first row that has it, and its rank."""
    prompts: dict[int, PromptCost] = {}
    costs = []
    for row, first in zip(rows, spec.sharing(rows)):
        if first >= 0 and first not in prompts:
            shown = prompt_images(row, spec.image_token_id, spec.merge_size)
            patches = sum(map(len, row.vision.pixels[:shown])) if row.vision is not None else 0
            prompts[first] = PromptCost(first * world.size + world.rank, row.prompt_length, patches,
                                        spec.work(row.prompt_length, patches))
        costs.append(row_cost(row, world.rank, spec.work, prompts.get(first)))
    return costs


def _norms(samples: Sequence[Sample], spec: PackingSpec, channels: int) -> list[float]:
    """This rank's part of the norms [C], or [1] for SFT."""
    lengths = torch.tensor([sum(s.mask[1:]) for s in samples])
    member = torch.tensor([s.member for s in samples], dtype=torch.bool).reshape(len(samples), channels).T
    counted = member if channels else torch.ones(1, len(samples), dtype=torch.bool)
    return aggregation_norms(lengths, counted, spec.aggregation, spec.response_budget).tolist()
