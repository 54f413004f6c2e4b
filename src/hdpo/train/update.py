"""One optimizer step from one mini-batch, and the log-probs an off-policy mini-batch needs. Shared by SFT and RL."""
from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from hdpo.train.objectives import LogProbs
from hdpo.types import MiniBatch, TrainBatch


class Policy(Protocol):
    """What training needs of the policy (see adapters/deepspeed_policy.py). Every method is a collective."""

    def run(self, micro: Any, job: Any) -> tuple[Tensor, ...]: ...

    def backward(self, loss: Tensor, last: bool) -> None: ...

    def step(self, lr: float, loss_is_finite: bool) -> float: ...


def update(policy: Policy, mini: MiniBatch, objective: Any, lr: float, old_log_probs: list[Tensor] | None = None) -> float:
    """Forward, fused loss and backward for each micro-batch, then clip and step. Returns the gradient norm.

    The device is asked once, before the step, whether every loss was finite.
    """
    finite: list[Tensor] = []
    for index, micro in enumerate(mini.micro_batches):
        old = old_log_probs[index] if old_log_probs is not None else None
        (loss,) = policy.run(micro, objective(micro, mini.norms, old))
        policy.backward(loss, last=index == len(mini.micro_batches) - 1)
        finite.append(torch.isfinite(loss.detach()))
    return policy.step(lr, bool(torch.stack(finite).all()))


def old_log_probs(policy: Policy, batch: TrainBatch, log_probs: LogProbs, epochs: int) -> list[list[Tensor] | None]:
    """Log-probs of each mini-batch under the weights that sampled it: per mini-batch, per micro-batch, [M].

    None where none are needed: the first mini-batch is on-policy when it is seen once, so its own forward gives them.
    """
    found: list[list[Tensor] | None] = []
    for index, mini in enumerate(batch.mini_batches):
        if index == 0 and epochs == 1:
            found.append(None)
            continue
        with torch.no_grad():
            found.append([policy.run(micro, log_probs(micro))[0] for micro in mini.micro_batches])
    return found
