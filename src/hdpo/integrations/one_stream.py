"""Two channels in one advantage per row, for trainers that carry no second one.

The result is HDPO exactly as long as every ratio is 1, that is with one optimizer step per batch of rollouts. With more, the
channels are added up before they are clipped, which is another objective: a row that is right but wasteful is clipped by
the sign of the sum. Use a trainer with two channels there.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hdpo.advantages import Advantages
from hdpo.objective import WEIGHTS, reciprocal


def one_stream(advantages: Advantages, lengths: Tensor, weights: Sequence[float] = WEIGHTS) -> Tensor:
    """[B]: weighted and rescaled so that a token mean over ALL rows gives the sum of both channels' token means.

    advantages: of all rows of the step, over all ranks; lengths [B]: their trained tokens.
    """
    lengths = lengths.to(advantages.values.dtype)
    norms = advantages.member.to(lengths.dtype) @ lengths
    scale = torch.tensor(list(weights), dtype=lengths.dtype, device=lengths.device) * reciprocal(norms, lengths) * lengths.sum()
    return scale @ advantages.values
