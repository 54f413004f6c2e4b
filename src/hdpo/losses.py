"""The HDPO objective on log-probabilities: one clipped surrogate per channel, clipped first and summed afterwards.

    loss = sum_c weight_c / norm_c * sum_{tokens of members of c} mask * surrogate(ratio, advantage_c)

Source: HDPO (arXiv 2604.08545); the surrogate is PPO's with the dual clip of arXiv 1912.09729. Channels are an axis:
C = 1 is GRPO. Adding the advantages up before clipping is another objective as soon as a batch takes more than one
optimizer step, because each channel must be clipped by its own sign. With `norms` counted over all micro-batches and
ranks, the losses of any split of a batch add up to the loss of the whole.

Axes: C channels, B rows, T tokens, N flat tokens. Imports torch only. `hdpo.fused_loss` computes the same from hidden
states without ever holding all logits.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Aggregation = Literal["token_mean", "sequence_mean", "dr_grpo"]
Norms = Tensor | Sequence[float]


def hdpo_loss(
    log_probs: Tensor, old_log_probs: Tensor | None, advantages: Tensor, mask: Tensor, *, member: Tensor | None = None,
    weights: Sequence[float] = (1.0, 0.15), norms: Norms | None = None, clip_low: float = 0.2, clip_high: float = 0.2,
    dual_clip: float | None = 3.0, rollout_weights: Tensor | None = None, rollout_log_probs: Tensor | None = None,
    importance_cap: float = 2.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and its detached statistics.

    log_probs, old_log_probs: [B, T], or flat [N]; natural log. old_log_probs None: on-policy, the ratio is exactly 1.
    advantages: [C, B] (one scalar per row) or [C, B, T]; for flat tokens [C, N].
    mask: shape of log_probs; nonzero where the policy sampled the token. May hold fractional token weights (see
        `aggregation_token_weights`). Whatever stands at masked tokens, NaN included, reaches neither loss nor gradient.
    member: bool, shape of advantages: the row counts in channel c's norm. None: every row in every channel.
    weights: one per channel. norms [C]: the channels' denominators over ALL micro-batches and ranks of the optimizer
        step; None: this batch's own sum of mask over members. A norm of 0 makes the channel contribute exactly 0.
    clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high]. dual_clip: bound on the ratio where the
        advantage is negative; 0 or None turns it off.
    rollout_weights: shape of log_probs; constants (such as the 0 and 1 of `rows_within`) multiplied onto each token's loss.
    rollout_log_probs: shape of log_probs; what the engine stated when it sampled. Multiplies each token's loss by the
        constant min(exp(old - rollout), importance_cap), which corrects for engine and trainer being two programs
        (truncated importance sampling); old is log_probs itself when old_log_probs is None. NaN counts as weight 1.
        Neither these weights nor rollout_weights enter the norms: norms are global and fixed before any forward, so a
        token that is weighed down or dropped makes the step smaller instead of the others' weight larger.

    The loss is float32 (float64 for float64 input) and attached to the graph of log_probs even if no token counts.
    Statistics: per channel [C] `loss` (unweighted, additive over splits when norms are given), `norm` (this batch's own),
    `tokens` (members' tokens), `clip_fraction`, `dual_clip_fraction` (shares of `tokens`); scalars `num_tokens`,
    `ratio_mean`, `ratio_max`, `kl_k1`, `kl_k3` (estimates of KL(old || new), nat, over masked-in tokens).
    Raises ValueError when shapes do not fit.
    """
    if log_probs.shape != mask.shape:
        raise ValueError(f"mask must have the shape of log_probs, {list(log_probs.shape)}, not {list(mask.shape)}")
    objective = make_objective(old_log_probs, advantages, mask, member, weights, norms, clip_low, clip_high, dual_clip,
                               rollout_weights, rollout_log_probs, importance_cap, precise_dtype(log_probs.dtype))
    log_probs = torch.where(objective.mask != 0, log_probs.to(objective.mask.dtype), 0.0)
    return objective.loss(log_probs), objective.stats(log_probs.detach())


def nll_loss(log_probs: Tensor, mask: Tensor, norm: Tensor | float | None = None) -> Tensor:
    """Negative log-likelihood of the masked-in tokens over `norm` (None: this batch's sum of mask): the SFT loss.

    log_probs and mask have any one shape. Attached to the graph, and exactly 0 when norm is 0.
    """
    mask = mask.to(precise_dtype(log_probs.dtype))
    log_probs = torch.where(mask != 0, log_probs.to(mask.dtype), 0.0)
    return -(log_probs * mask).sum() * reciprocal(mask.sum() if norm is None else norm, mask)


def rows_within(old_log_probs: Tensor, rollout_log_probs: Tensor, mask: Tensor, row: Tensor, num_rows: int, low: float,
                high: float) -> Tensor:
    """[num_rows] bool: whether the geometric mean of exp(old - rollout) over a row's tokens lies in [low, high].

    The first four are [N] flat tokens, row their row indices; tokens with mask 0 do not count, a row without tokens is
    within. The mean over a row does not grow with its length, as the product would. `rows_within(...)[row]` as
    rollout_weights drops the rows outside from the loss but not from the norms, see `hdpo_loss`.
    """
    sampled = (mask != 0).double()
    log_ratio = torch.where(mask != 0, _log_importance(old_log_probs.detach(), rollout_log_probs), 0.0).double()
    total, count = (x.new_zeros(num_rows).index_add_(0, row, x) for x in (log_ratio, sampled))
    mean = total / count.clamp(min=1.0)
    return (mean >= math.log(low)) & (mean <= math.log(high))


def _log_importance(old_log_probs: Tensor, rollout_log_probs: Tensor) -> Tensor:
    return (old_log_probs - rollout_log_probs).nan_to_num(nan=0.0).clamp(-20.0, 20.0)


def aggregation_token_weights(lengths: Tensor, how: Aggregation) -> Tensor:
    """[B] weight of every trained token of a row with `lengths` [B] trained tokens; multiply it onto the row's mask.

    token_mean and dr_grpo weigh all tokens alike; sequence_mean gives each row the same total of 1.
    """
    if how == "sequence_mean":
        return 1.0 / lengths.clamp(min=1).float()
    if how in ("token_mean", "dr_grpo"):
        return torch.ones_like(lengths, dtype=torch.float32)
    raise ValueError(f"how must be 'token_mean', 'sequence_mean' or 'dr_grpo', not {how!r}")


def aggregation_norms(lengths: Tensor, member: Tensor, how: Aggregation, budget: int | None = None) -> Tensor:
    """[C] float64 denominators that belong to `aggregation_token_weights`; they add up over micro-batches and ranks.

    lengths [B] trained tokens per row, member [C, B] bool. token_mean counts tokens, sequence_mean rows that have any,
    dr_grpo such rows times `budget`, the constant response budget in tokens (required there).
    """
    rows = (member & (lengths > 0)).double()
    if how == "token_mean":
        return rows @ lengths.double()
    if how == "sequence_mean":
        return rows.sum(-1)
    if how == "dr_grpo" and budget:
        return rows.sum(-1) * budget
    raise ValueError(f"how must be 'token_mean', 'sequence_mean' or 'dr_grpo' with a budget, not {how!r} with {budget!r}")


@dataclass(frozen=True, slots=True)
class Objective:
    """All of the HDPO objective but the policy's log-probs: made once, then evaluated on any part of the tokens.

    Tensors are [...] or [C, ...] where [...] is the shape of the tokens; masked tokens hold zeros everywhere.
    """

    old_log_probs: Tensor | None   # [...]
    advantages: Tensor             # [C, ...]
    mask: Tensor                   # [...] token weights
    counted: Tensor                # [C, ...] member * mask
    coefficient: Tensor            # [C, ...] counted * rollout weight / norm, without the channel's weight
    rollout_log_probs: Tensor | None   # [...]
    weights: tuple[float, ...]     # [C]; Python numbers, so that using them never waits for the device
    clip_low: float
    clip_high: float
    dual_clip: float | None
    importance_cap: float

    def select(self, index: Tensor | slice) -> Objective:
        """The same objective on some of its flat tokens."""
        old, rollout = (None if x is None else x[index] for x in (self.old_log_probs, self.rollout_log_probs))
        return replace(self, old_log_probs=old, rollout_log_probs=rollout, advantages=self.advantages[:, index],
                       mask=self.mask[index], counted=self.counted[:, index], coefficient=self.coefficient[:, index])

    def loss(self, log_probs: Tensor) -> Tensor:
        per_channel = self._channel_losses(log_probs, self._ratio(log_probs))
        return torch.stack([w * loss for w, loss in zip(self.weights, per_channel, strict=True)]).sum()

    def _old(self, log_probs: Tensor) -> Tensor:
        return log_probs.detach() if self.old_log_probs is None else self.old_log_probs

    def _log_ratio(self, log_probs: Tensor) -> Tensor:
        return log_probs - self._old(log_probs)

    def _ratio(self, log_probs: Tensor) -> Tensor:
        return self._log_ratio(log_probs).clamp(-20.0, 20.0).exp()

    def _terms(self, ratio: Tensor) -> Tensor:
        """[C, ...] the surrogate of every token in every channel."""
        clipped = ratio.clamp(1.0 - self.clip_low, 1.0 + self.clip_high)
        terms = torch.maximum(-self.advantages * ratio, -self.advantages * clipped)
        if self.dual_clip:
            bounded = torch.minimum(terms, -self.advantages * self.dual_clip)
            terms = torch.where(self.advantages < 0, bounded, terms)
        return terms

    def _channel_losses(self, log_probs: Tensor, ratio: Tensor) -> Tensor:
        terms = self.coefficient * self._terms(ratio)
        if self.rollout_log_probs is not None:
            importance = _log_importance(self._old(log_probs), self.rollout_log_probs).exp()
            terms = terms * importance.clamp(max=self.importance_cap)
        return terms.flatten(1).sum(1)

    @torch.no_grad()
    def stats(self, log_probs: Tensor) -> dict[str, Tensor]:
        """See `hdpo_loss`. log_probs must be finite where mask is 0."""
        ratio, advantages = self._ratio(log_probs), self.advantages
        counts = self.counted != 0
        clipped = counts & (-advantages * ratio.clamp(1.0 - self.clip_low, 1.0 + self.clip_high) > -advantages * ratio)
        beyond = counts & (advantages < 0) & (ratio > self.dual_clip) if self.dual_clip else torch.zeros_like(counts)
        sampled = self.mask != 0
        log_ratio = torch.where(sampled, self._log_ratio(log_probs), 0.0)
        num_tokens, tokens = sampled.sum(), counts.flatten(1).sum(1)

        def mean(x: Tensor) -> Tensor:
            return torch.where(sampled, x, 0.0).sum() / num_tokens.clamp(min=1)

        def share(x: Tensor) -> Tensor:
            return x.flatten(1).sum(1) / tokens.clamp(min=1)

        return {
            "loss": self._channel_losses(log_probs, ratio), "norm": self.counted.flatten(1).sum(1), "tokens": tokens,
            "clip_fraction": share(clipped), "dual_clip_fraction": share(beyond), "num_tokens": num_tokens,
            "ratio_mean": mean(ratio),
            "ratio_max": torch.where(sampled, ratio, 0.0).max() if ratio.numel() else ratio.sum(),
            "kl_k1": -mean(log_ratio), "kl_k3": mean(ratio - 1.0 - log_ratio),
        }


def make_objective(
    old_log_probs: Tensor | None, advantages: Tensor, mask: Tensor, member: Tensor | None, weights: Sequence[float],
    norms: Norms | None, clip_low: float, clip_high: float, dual_clip: float | None, rollout_weights: Tensor | None,
    rollout_log_probs: Tensor | None, importance_cap: float, dtype: torch.dtype,
) -> Objective:
    """Check shapes, expand scalars per row over tokens, blank what is masked, and fold the norms into one coefficient."""
    channels = advantages.shape[0] if advantages.dim() else 0
    if not channels or len(weights) != channels:
        raise ValueError(f"advantages {list(advantages.shape)} must have one leading entry per weight, {list(weights)}")
    for name, value in (("old_log_probs", old_log_probs), ("rollout_weights", rollout_weights),
                        ("rollout_log_probs", rollout_log_probs)):
        if value is not None and value.shape != mask.shape:
            raise ValueError(f"{name} must have the shape of mask, {list(mask.shape)}, not {list(value.shape)}")
    mask = mask.to(dtype)
    advantages = _over_tokens("advantages", advantages.detach().to(dtype), mask)
    if member is None:
        counted = mask.expand_as(advantages)
    else:
        counted = torch.where(_over_tokens("member", member, mask).bool(), mask, 0.0)
        if counted.shape != advantages.shape:
            raise ValueError(f"member must have the channels of advantages, {channels}, not {counted.shape[0]}")
    if norms is None:
        norms = counted.flatten(1).sum(1)
    elif len(norms) != channels:
        raise ValueError(f"norms must hold one number per channel, {channels}, not {len(norms)}")
    coefficient = counted * reciprocal(norms, mask).view(-1, *[1] * mask.dim())
    if rollout_weights is not None:
        coefficient = coefficient * torch.where(mask != 0, rollout_weights.detach().to(dtype), 0.0)
    old_log_probs, rollout_log_probs = (
        None if x is None else torch.where(mask != 0, x.detach().to(dtype), 0.0) for x in (old_log_probs, rollout_log_probs))
    advantages = torch.where(counted != 0, advantages, 0.0)
    return Objective(old_log_probs, advantages, mask, counted, coefficient, rollout_log_probs, tuple(weights), clip_low,
                     clip_high, dual_clip, importance_cap)


def _over_tokens(name: str, per_channel: Tensor, mask: Tensor) -> Tensor:
    """[C, B] -> [C, B, T]; [C, B, T] and flat [C, N] pass."""
    if per_channel.shape[1:] == mask.shape:
        return per_channel
    if mask.dim() == 2 and per_channel.shape[1:] == mask.shape[:1]:
        return per_channel.unsqueeze(-1).expand(*per_channel.shape, mask.shape[1])
    raise ValueError(f"{name} {list(per_channel.shape)} fits neither the rows nor the tokens of mask {list(mask.shape)}")


def reciprocal(norm: Norms | float, like: Tensor) -> Tensor:
    """1 / norm, and 0 where norm is 0, so that an empty channel contributes exactly nothing."""
    norm = torch.as_tensor(norm, dtype=torch.float64)
    return torch.where(norm > 0, 1.0 / norm, 0.0).to(like.device, like.dtype, non_blocking=True)


def precise_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
