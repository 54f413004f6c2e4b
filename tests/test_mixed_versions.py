"""The loss of rows whose tokens were sampled by several versions of the weights, beside a reference written token by token."""
from __future__ import annotations

import math

import pytest
import torch

from hdpo.fused_loss import fused_linear_hdpo_loss
from hdpo.losses import hdpo_loss

ROWS, TOKENS, WEIGHTS, CAP = 5, 9, (1.0, 0.15), 2.0


def reference(new: torch.Tensor, old: torch.Tensor, sampled: torch.Tensor, advantages: torch.Tensor,
              member: torch.Tensor) -> float:
    """Decoupled PPO: ratio to the update's start, weighed by exp(start - sampled), each token by the weights that sampled it."""
    total = 0.0
    for channel, weight in enumerate(WEIGHTS):
        norm = sum(TOKENS for row in range(ROWS) if member[channel, row])
        for row in range(ROWS):
            for token in range(TOKENS if member[channel, row] else 0):
                ratio = math.exp(float(new[row, token] - old[row, token]))
                advantage = float(advantages[channel, row])
                value = max(-advantage * ratio, -advantage * min(max(ratio, 0.8), 1.2))
                if advantage < 0:
                    value = min(value, -advantage * 3.0)
                importance = min(math.exp(float(old[row, token] - sampled[row, token])), CAP)
                total += weight * importance * value / norm
    return total


@pytest.mark.parametrize("on_policy", [True, False])
def test_tokens_of_several_versions_are_weighed_one_by_one(on_policy: bool) -> None:
    draw = torch.Generator().manual_seed(4)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)
    hidden, head = random(ROWS * TOKENS, 7), random(13, 7)
    targets = torch.randint(13, (ROWS * TOKENS,), generator=draw)
    new = (hidden @ head.T).log_softmax(-1).gather(-1, targets[:, None]).view(ROWS, TOKENS)
    old = new if on_policy else new + 0.3 * random(ROWS, TOKENS)
    versions = torch.arange(TOKENS).expand(ROWS, TOKENS) // 3              # each row: three versions, one after the other
    lag = torch.stack([torch.zeros(ROWS, TOKENS).double(), 0.2 * random(ROWS, TOKENS), 0.9 * random(ROWS, TOKENS)])
    sampled = old + lag.gather(0, versions[None])[0]
    advantages, member = random(2, ROWS), torch.tensor([[True] * ROWS, [True, False, True, True, False]])
    expected = reference(new, old, sampled, advantages, member)
    mask = torch.ones(ROWS, TOKENS, dtype=torch.float64)
    plain, _ = hdpo_loss(new, old, advantages, mask, member=member, rollout_log_probs=sampled, importance_cap=CAP)
    row = torch.arange(ROWS).repeat_interleave(TOKENS)
    fused, _ = fused_linear_hdpo_loss(
        hidden, head, targets, None if on_policy else old.flatten(), advantages, mask.flatten(), member=member, row=row,
        rollout_log_probs=sampled.flatten(), importance_cap=CAP, chunk_tokens=8)
    assert plain.item() == pytest.approx(expected, rel=1e-12)
    assert fused.item() == pytest.approx(expected, rel=1e-12)
