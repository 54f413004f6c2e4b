"""HDPO under DistributedDataParallel or any trainer that averages gradients over ranks.

`hdpo_loss` with global norms gives losses that add up over ranks and micro-batches; such trainers average them. So the loss
is multiplied by the number of ranks, and the norms are counted over all ranks and all micro-batches of an optimizer step.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hdpo.losses import hdpo_loss


def global_norms(masks: Sequence[Tensor], members: Sequence[Tensor]) -> Tensor:
    """[C] float64: the channels' trained tokens over all ranks and micro-batches of one optimizer step. Collective.

    masks [B, T] and members [C, B] of this rank's micro-batches, in the same order.
    """
    norms = torch.stack([member.double() @ (mask != 0).sum(1).double()
                         for mask, member in zip(masks, members, strict=True)]).sum(0)
    if dist.is_initialized():
        dist.all_reduce(norms)
    return norms


def ddp_hdpo_loss(log_probs: Tensor, old_log_probs: Tensor | None, advantages: Tensor, mask: Tensor, *, norms: Tensor,
                  accumulation_steps: int = 1, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """`hdpo_loss` for a trainer that averages gradients over ranks, and over `accumulation_steps` if it divides by them."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    loss, stats = hdpo_loss(log_probs, old_log_probs, advantages, mask, norms=norms, **options)
    return loss * (ranks * accumulation_steps), stats
