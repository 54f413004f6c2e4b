"""The HDPO objective on log-probabilities: one clipped surrogate per channel, clipped first and summed afterwards.

    loss = sum_c weight_c / norm_c * sum_{tokens of members of c} mask * surrogate(ratio, advantage_c)

Source: HDPO (arXiv 2604.08545); the surrogate is PPO's with the dual clip of arXiv 1912.09729. Channels are an axis:
C = 1 is GRPO. Adding the advantages up before clipping is another objective as soon as a batch takes more than one
optimizer step, because each channel must be clipped by its own sign. With `norms` counted over all micro-batches and
ranks, the losses of any split of a batch ADD UP to the loss of the whole. A trainer that averages gradients over ranks (DDP,
TRL, accelerate) must therefore multiply the loss by the number of ranks, and by its gradient accumulation steps if it
divides by them.

What other trainers call their loss, as `aggregation_token_weights` (multiplied onto mask) and norms:

    dapo, verl token-mean      token_mean       norms = tokens of the whole step
    bnpo                       token_mean       norms = tokens of the micro-batch x accumulation steps
    grpo, seq-mean-token-mean  sequence_mean    norms = rows
    dr_grpo                    dr_grpo          norms = rows x longest completion
    seq-mean-token-sum         token_mean       norms = rows

Axes: C channels, B rows, T tokens, N flat tokens. Imports torch only. `hdpo.fused_loss` computes the same from hidden
states without ever holding all logits; `hdpo.objective` is what both evaluate.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from hdpo.objective import (
    WEIGHTS,
    Norms,
    Surrogate,
    Terms,
    log_importance,
    make_objective,
    precise_dtype,
    reciprocal,
    tensors_only,
)

Aggregation = Literal["token_mean", "sequence_mean", "dr_grpo"]


def hdpo_loss(
    log_probs: Tensor, old_log_probs: Tensor | None, advantages: Tensor, mask: Tensor, *, member: Tensor | None = None,
    weights: Sequence[float] = WEIGHTS, norms: Norms | None = None, clip_low: float = 0.2, clip_high: float = 0.2,
    dual_clip: float | None = 3.0, rollout_weights: Tensor | None = None, rollout_log_probs: Tensor | None = None,
    importance_cap: float = 2.0, surrogate: Surrogate = "ppo", reference_log_probs: Tensor | None = None, kl_coef: float = 0.0,
    row: Tensor | None = None, channels_last: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and its detached statistics.

    log_probs, old_log_probs: [B, T], or flat [N]; natural log. old_log_probs None: on-policy, the ratio is exactly 1.
    advantages: [C, B] (one scalar per row) or [C, B, T]; for flat tokens [C, N], or [C, B] with row [N], each token's row.
        One channel may come without its axis: [B], [B, T], [N]. channels_last: [B, C], [B, T, C] or [N, C] instead. A packed
        batch [1, N] takes [C, N]. A tensor that could be either is read as channels first.
    mask: shape of log_probs; nonzero where the policy sampled the token. May hold fractional token weights (see
        `aggregation_token_weights`). Whatever stands at masked tokens, NaN included, reaches neither loss nor gradient.
    member: bool, shape of advantages: the row counts in channel c's norm. None: every row in every channel.
    weights: one per channel; with one channel the default means (1.0,). norms: [C], or a number for one channel: the channels'
        denominators over ALL micro-batches and ranks of the optimizer step; None: this batch's own sum of mask over members.
        A norm of 0 makes the channel contribute exactly 0.
    clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high]. dual_clip: bound on the ratio where the
        advantage is negative; 0 or None turns it off.
    rollout_weights: shape of log_probs, or [B], [B, 1] for whole rows; constants (such as the 0 and 1 of `rows_within`)
        multiplied onto each token's loss.
    rollout_log_probs: shape of log_probs; what the engine stated when it sampled. Multiplies each token's loss by the
        constant min(exp(old - rollout), importance_cap), which corrects for engine and trainer being two programs
        (truncated importance sampling); old is log_probs itself when old_log_probs is None. NaN counts as weight 1.
        Neither these weights nor rollout_weights enter the norms: norms are global and fixed before any forward, so a
        token that is weighed down or dropped makes the step smaller instead of the others' weight larger. When rows were
        sampled by several versions of the policy, old_log_probs being the trainer's at the start of the update makes this
        decoupled PPO (arXiv 2110.00641): the clip is around old, the importance weight corrects for who sampled.
    surrogate: "ppo"; "gspo", one ratio a row, the geometric mean over its tokens (arXiv 2507.18071; with sequence_mean it is
        that paper's objective, else its per-token variant; flat tokens need row); "cispo", the clipped ratio as a constant
        weight of the token's log-prob (arXiv 2506.13585; no dual clip; clip_low=1 leaves the lower side open).
    reference_log_probs, kl_coef: adds kl_coef times the k3 estimate of KL(policy || reference), over channel 0's norm.

    The loss is float32 (float64 for float64 input) and attached to the graph of log_probs even if no token counts.
    Statistics: per channel [C] `loss` (unweighted, additive over splits when norms are given), `norm` (this batch's own),
    `tokens` (members' tokens), `clip_fraction`, `dual_clip_fraction` (shares of `tokens`); `gradient_products` [C, C], of the
    channels' weighted gradients with respect to log_probs; scalars `num_tokens`,
    `ratio_mean`, `ratio_max`, `kl_k1`, `kl_k3` (estimates of KL(old || new), nat, over masked-in tokens), `reference_kl`.
    Raises ValueError when shapes do not fit, TypeError for anything but tensors.
    """
    tensors_only(log_probs=log_probs, mask=mask)
    if log_probs.shape != mask.shape:
        raise ValueError(f"mask must have the shape of log_probs, {list(log_probs.shape)}, not {list(mask.shape)}")
    objective = make_objective(
        old_log_probs, advantages, mask, member, weights, norms, rollout_weights, rollout_log_probs, reference_log_probs,
        Terms(clip_low, clip_high, dual_clip, importance_cap, surrogate, kl_coef), precise_dtype(log_probs.dtype), row=row,
        channels_last=channels_last)
    log_probs = torch.where(objective.mask != 0, log_probs.to(objective.mask.dtype), 0.0)
    if surrogate == "gspo":
        objective = objective.with_rows(log_probs, row, _num_rows(row))
    return objective.loss(log_probs), objective.stats(log_probs.detach())


def _num_rows(row: Tensor | None) -> int:
    return 0 if row is None or not len(row) else int(row.max()) + 1


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
    log_ratio = torch.where(mask != 0, log_importance(old_log_probs.detach(), rollout_log_probs), 0.0).double()
    total, count = (x.new_zeros(num_rows).index_add_(0, row, x) for x in (log_ratio, sampled))
    mean = total / count.clamp(min=1.0)
    return (mean >= math.log(low)) & (mean <= math.log(high))


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
