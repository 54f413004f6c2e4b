"""HDPO's surrogate in prime-rl: `[trainer.loss] type = "custom", import_path = "hdpo.integrations.prime_rl.loss"`.

prime-rl carries one advantage per token and divides the summed loss by the global count of trained tokens itself. Make that
advantage with `hdpo.integrations.one_stream` in the orchestrator: HDPO with one optimizer step per batch, see there.
"""
from __future__ import annotations

from typing import TYPE_CHECKING

from hdpo.losses import hdpo_loss

if TYPE_CHECKING:
    from prime_rl.trainer.rl.loss import LossInputs, LossOutputs


def loss(inputs: LossInputs, clip_low: float = 0.2, clip_high: float = 0.2, dual_clip: float = 3.0) -> LossOutputs:
    """The summed loss of one flat sequence [N], and shares of clipped tokens."""
    from prime_rl.trainer.rl.loss import LossOutputs
    value, stats = hdpo_loss(
        inputs.trainer_logprobs, inputs.inference_logprobs, inputs.advantages, inputs.loss_mask, norms=1.0, clip_low=clip_low,
        clip_high=clip_high, dual_clip=dual_clip, rollout_weights=inputs.loss_weights)
    return LossOutputs(loss=value, metrics={
        "clip_fraction": stats["clip_fraction"][0], "dual_clip_fraction": stats["dual_clip_fraction"][0], "kl": stats["kl_k1"]})
