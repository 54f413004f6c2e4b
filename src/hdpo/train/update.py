"""One optimizer step from one mini-batch, and the log-probs an off-policy mini-batch needs. Shared by SFT and RL."""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hdpo.errors import NonFiniteError
from hdpo.protocols import Policy, Reference
from hdpo.train.objectives import LogProbs
from hdpo.types import MicroBatch, MiniBatch, TrainBatch


def update(policy: Policy, mini: MiniBatch, objective: Any, lr: float, old_log_probs: list[Tensor] | None = None) -> float:
    """Forward, fused loss and backward for each micro-batch, then clip and step. Returns the gradient norm.

    A norm that is not finite means that the step was skipped on every rank. A loss that is not finite makes it so, even
    where its gradients would be: the last micro-batch's are spoiled with it, which asks the device and other ranks nothing.
    """
    policy.unpark()
    healthy: Tensor | None = None
    for index, micro in enumerate(mini.micro_batches):
        old = old_log_probs[index] if old_log_probs is not None else None
        (loss,) = policy.run(micro, objective(micro, mini.norms, old))
        last = index == len(mini.micro_batches) - 1
        finite = torch.isfinite(loss.detach())
        healthy = finite if healthy is None else healthy & finite
        policy.world.progress()
        policy.backward(loss * torch.where(healthy, 1.0, math.nan) if last else loss, last)
    return policy.step(lr)


class StepGuard:
    """Watches optimizer steps: counts those skipped because a loss or gradient was not finite, and ends a run of them."""

    def __init__(self, limit: int) -> None:
        self.limit, self.skipped_in_a_row = limit, 0
        self._norms: list[float] = []

    def note(self, norm: float) -> None:
        """Record what `update` returned; it is the same on every rank."""
        self._norms.append(norm)
        self.skipped_in_a_row = 0 if math.isfinite(norm) else self.skipped_in_a_row + 1

    def scalars(self) -> dict[str, float]:
        """What was noted since the last call: mean gradient norm of the steps that were taken, count of those that weren't."""
        taken = [norm for norm in self._norms if math.isfinite(norm)]
        skipped, self._norms = len(self._norms) - len(taken), []
        return {"actor/skipped_steps": skipped} | ({"actor/grad_norm": sum(taken) / len(taken)} if taken else {})

    def check(self, save: Callable[[], object]) -> None:
        """Raise NonFiniteError, having called `save`, once more than `limit` steps in a row were skipped."""
        if self.skipped_in_a_row > self.limit:
            save()
            raise NonFiniteError(
                f"{self.skipped_in_a_row} optimizer steps in a row had a loss or gradient that is not finite; the weights of "
                "the last good step are saved. Lower optim.lr or optim.grad_clip and go on with run.allow=[optim.lr,"
                "optim.grad_clip], or look at the data of these steps (optim.max_skipped is the limit)")


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


def with_reference(reference: Reference, batch: TrainBatch, log_probs: LogProbs) -> TrainBatch:
    """The batch with every token's log-prob under the starting policy. Before the first update: what that needs is still away."""
    def seen(micro: MicroBatch) -> MicroBatch:
        return replace(micro, reference_log_probs=reference.run(micro, log_probs(micro))[0])

    with torch.no_grad():
        minis = [MiniBatch([seen(micro) for micro in mini.micro_batches], mini.norms) for mini in batch.mini_batches]
    reference.park()
    return TrainBatch(minis)
