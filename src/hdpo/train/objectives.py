"""What the policy's head computes for one micro-batch: the HDPO loss, the SFT loss, or log-probs alone. Maths only.

An objective is bound to a run; calling it with a micro-batch gives a *job*, which the policy runs on (hidden [M, H],
weight [V, H]) inside its head (see adapters/policy_model.py). A loss job returns (loss,) and records its statistics, all
detached and left on the device, in a `Metrics`.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from hdpo.config import HdpoConfig
from hdpo.fused_loss import fused_linear_hdpo_loss, fused_linear_log_probs, fused_linear_nll_loss
from hdpo.train.metrics import Metrics
from hdpo.types import MicroBatch

Job = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
CHANNEL_NAMES = ("acc", "tool")


@lru_cache(maxsize=4)
def ban_bias(banned_ids: tuple[int, ...], vocabulary: int, device: torch.device) -> Tensor | None:
    """[V] float32: -100 at ids the engine never samples, so that both normalise over the same set."""
    if not banned_ids:
        return None
    bias = torch.zeros(vocabulary, device=device)
    bias[list(banned_ids)] = -100.0
    return bias


class LogProbs:
    """Job: (log_probs [M], entropy [M]) at the sampling temperature, without a graph."""

    def __init__(self, banned_ids: Sequence[int], temperature: float = 1.0, chunk_tokens: int | None = None) -> None:
        self.banned_ids, self.temperature, self.chunk_tokens = tuple(banned_ids), temperature, chunk_tokens or None

    def __call__(self, micro: MicroBatch) -> Job:
        def job(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
            bias = ban_bias(self.banned_ids, weight.shape[0], weight.device)
            return fused_linear_log_probs(hidden, weight, micro.targets.to(hidden.device), temperature=self.temperature,
                                          bias=bias, chunk_tokens=self.chunk_tokens)
        return job


class SftObjective:
    """Negative log-likelihood of the trained tokens over their global count."""

    def __init__(self, metrics: Metrics, chunk_tokens: int | None = None) -> None:
        self.metrics, self.chunk_tokens = metrics, chunk_tokens or None

    def __call__(self, micro: MicroBatch, norms: Tensor, old_log_probs: Tensor | None = None) -> Job:
        def job(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
            device = hidden.device
            token_weight = micro.weight.to(device)
            loss, stats = fused_linear_nll_loss(
                hidden, weight, micro.targets.to(device), token_weight, norm=norms[0].to(device),
                chunk_tokens=self.chunk_tokens, keep=torch.arange(len(micro.targets), device=device), entropy=False)
            self.metrics.total("sft/loss", loss)
            self.metrics.add("sft/token_accuracy_proxy", stats["log_probs"].exp().mean() if len(micro.targets) else 0.0,
                             len(micro.targets))
            return (loss,)
        return job


class HdpoObjective:
    """The two clipped surrogates (paper, section 3), with truncated importance weights between engine and trainer."""

    def __init__(self, config: HdpoConfig, banned_ids: Sequence[int], temperature: float, metrics: Metrics,
                 chunk_tokens: int | None = None) -> None:
        self.config, self.metrics = config, metrics
        self.log_probs = LogProbs(banned_ids, temperature, chunk_tokens)

    def __call__(self, micro: MicroBatch, norms: Tensor, old_log_probs: Tensor | None) -> Job:
        """`old_log_probs` [M] of the weights that sampled, or None in the first mini-batch, where they are the policy's own."""
        def job(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
            device, c = hidden.device, self.config
            targets, rollout = micro.targets.to(device), micro.rollout_log_probs.to(device)
            old = self.log_probs(micro)(hidden, weight)[0] if old_log_probs is None else old_log_probs.to(device)
            correction = (old - rollout).exp().clamp(max=c.importance_cap) if c.importance == "token" else None
            loss, stats = fused_linear_hdpo_loss(
                hidden, weight, targets, old, micro.advantages.to(device), micro.weight.to(device),
                temperature=self.log_probs.temperature, bias=ban_bias(self.log_probs.banned_ids, weight.shape[0], device),
                member=micro.member.to(device), weights=(c.w_acc, c.w_tool), norms=norms.to(device), clip_low=c.clip_low,
                clip_high=c.clip_high, dual_clip=c.dual_clip, rollout_weights=correction, row=micro.row.to(device),
                chunk_tokens=self.log_probs.chunk_tokens, keep=torch.arange(len(targets), device=device))
            self._record(loss, stats, old, rollout, correction)
            return (loss,)
        return job

    def _record(self, loss: Tensor, stats: dict[str, Tensor], old: Tensor, rollout: Tensor, correction: Tensor | None) -> None:
        m, count = self.metrics, stats["num_tokens"]
        m.total("actor/pg_loss", loss)
        for index, name in enumerate(CHANNEL_NAMES):
            m.total(f"actor/pg_loss/{name}", stats["loss"][index])
            m.add(f"actor/pg_clipfrac/{name}", stats["clip_fraction"][index], stats["tokens"][index])
            m.add(f"actor/pg_clipfrac_lower/{name}", stats["dual_clip_fraction"][index], stats["tokens"][index])
        m.add("actor/ppo_kl", stats["kl_k1"], count)
        m.add("actor/ratio_mean", stats["ratio_mean"], count)
        m.maximum("actor/ratio_max", stats["ratio_max"])
        m.add("actor/entropy", stats["entropy"].sum() / count.clamp(min=1), count)
        m.add_mismatch(old, rollout, torch.ones_like(old))
        if correction is not None and len(old):
            m.add("mismatch/importance_capped", (correction >= self.config.importance_cap).float().mean(), len(old))
