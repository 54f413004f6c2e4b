"""The head, its log-softmax and a loss in one pass over token chunks: never more than one chunk of logits exists.

A loss that depends on the logits only through each token's log-prob has one gradient number per token, and that number is
known as soon as the chunk's log-probs are. So the gradients of hidden states and head weight follow from the same chunk's
probabilities: three matrix products of 2*N*H*V FLOPs, nothing recomputed, no graph kept. Both gradients are formed in
forward and only scaled in backward.

Precision: logits' softmax and log-sum-exp in float32 (float64 for float64 input); the one-hot is subtracted and the
token's gradient folded in before the cast to the input's type; the weight's gradient accumulates in float32 over chunks.
Nothing here reads a number back from the device. Under ZeRO-3 the head's weight must be gathered around forward only.

Axes: N flat tokens, H hidden, V vocabulary, C channels. Imports torch only.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hdpo.objective import WEIGHTS, Norms, Surrogate, Terms, make_objective, precise_dtype, reciprocal

TokenLoss = Callable[[Tensor, slice], Tensor]


def fused_linear_hdpo_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, old_log_probs: Tensor | None, advantages: Tensor, mask: Tensor, *,
    temperature: float = 1.0, bias: Tensor | None = None, member: Tensor | None = None,
    weights: Sequence[float] = WEIGHTS, norms: Norms | None = None, clip_low: float = 0.2, clip_high: float = 0.2,
    dual_clip: float | None = 3.0, rollout_weights: Tensor | None = None, rollout_log_probs: Tensor | None = None,
    importance_cap: float = 2.0, surrogate: Surrogate = "ppo", reference_log_probs: Tensor | None = None, kl_coef: float = 0.0,
    entropy_coef: float = 0.0, chunk_tokens: int | None = None, row: Tensor | None = None, keep: Tensor | None = None,
    entropy: bool = True, channels_last: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Same value and gradients as `hdpo_loss` on the log-softmax of (hidden @ weight.T + bias) / temperature.

    hidden [N, H] and weight [V, H] of one floating dtype (else weight is cast); targets [N] int64. old_log_probs, mask,
    rollout_weights, rollout_log_probs [N]; advantages, member [C, N], or [C, B] together with row [N], the row index of
    every token. The rest is described at `hdpo_loss`. With old_log_probs None (on-policy) each chunk's own log-probs stand
    for them, in the ratio and in the importance weight: one pass is all the first mini-batch of a step needs.

    bias [V]: constant added to the logits, for example -inf (taken as -1e30) at ids the engine never samples; gets no
    gradient.
    chunk_tokens: tokens whose logits exist at once; None chooses by memory, see `default_chunk_tokens`.
    keep [K] int64: the tokens to compute, all those with mask != 0 among them. None: on CPU they are found here, and
    tokens whose advantages are all zero skip the gradient products; on CUDA, where finding them would wait for the
    device, all N are computed, so a caller who builds batches on the host should pass keep.
    entropy: compute stats["entropy"] too, about a tenth of the time.
    entropy_coef: subtracts so much times the policy's entropy, over channel 0's norm. The entropy is that of the softmax the
    loss sees, temperature and bias included. `surrogate="gspo"` off-policy costs one more product of the head: a row's ratio
    is known only after its last token.

    Returns (loss, stats): those of `hdpo_loss`, and stats["log_probs"], stats["entropy"] [N], detached, 0 at tokens that
    were not computed. Gradients have the inputs' dtype; a frozen or no_grad input costs no product. Raises ValueError
    when shapes do not fit.
    """
    _check(hidden, weight, targets, mask, bias, chunk_tokens)
    objective = make_objective(
        old_log_probs, advantages, mask, member, weights, norms, rollout_weights, rollout_log_probs, reference_log_probs,
        Terms(clip_low, clip_high, dual_clip, importance_cap, surrogate, kl_coef), precise_dtype(hidden.dtype), row=row,
        channels_last=channels_last)
    if surrogate == "gspo" and old_log_probs is not None:
        seen = fused_linear_log_probs(hidden, weight, torch.where(mask != 0, targets, 0), temperature=temperature, bias=bias,
                                      chunk_tokens=chunk_tokens, entropy=False)[0]
        objective = objective.with_rows(torch.where(mask != 0, seen, 0.0), row, advantages.shape[0 if channels_last else -1])
    active = (objective.coefficient * objective.advantages != 0).any(0)
    if kl_coef or entropy_coef:
        active = active | (objective.per_token != 0)
    order = _order(mask, active, keep)
    chosen = objective if order.tokens is None else objective.select(order.tokens)

    def token_loss(log_probs: Tensor, rows: slice) -> Tensor:
        return chosen.select(rows).loss(log_probs)

    bonus = entropy_coef * chosen.per_token if entropy_coef else None
    head = _Head(weight, bias, temperature, chunk_tokens, entropy or bonus is not None)
    loss, log_probs, entropies = _run(hidden, targets, mask, head, order, token_loss, bonus)
    return loss, {**objective.stats(log_probs), "log_probs": log_probs, "entropy": entropies}


def fused_linear_nll_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor, *, norm: Tensor | float | None = None,
    temperature: float = 1.0, bias: Tensor | None = None, chunk_tokens: int | None = None, keep: Tensor | None = None,
    entropy: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The SFT loss, `nll_loss` on the same log-probs, with the arguments of `fused_linear_hdpo_loss`.

    norm: trained tokens over all micro-batches and ranks; None: this batch's sum of mask.
    Returns (loss, {"log_probs": [N], "entropy": [N], "num_tokens": []}), all statistics detached.
    """
    _check(hidden, weight, targets, mask, bias, chunk_tokens)
    token_weight = mask.to(precise_dtype(hidden.dtype))
    token_weight = token_weight * reciprocal(token_weight.sum() if norm is None else norm, token_weight)
    order = _order(mask, token_weight != 0, keep)
    chosen = token_weight if order.tokens is None else token_weight[order.tokens]

    def token_loss(log_probs: Tensor, rows: slice) -> Tensor:
        return -(log_probs * chosen[rows]).sum()

    head = _Head(weight, bias, temperature, chunk_tokens, entropy)
    loss, log_probs, entropies = _run(hidden, targets, mask, head, order, token_loss)
    return loss, {"log_probs": log_probs, "entropy": entropies, "num_tokens": (mask != 0).sum()}


@torch.no_grad()
def fused_linear_log_probs(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0, bias: Tensor | None = None,
    chunk_tokens: int | None = None, entropy: bool = True,
) -> tuple[Tensor, Tensor]:
    """(log_probs [N], entropy [N]) in nat, without a graph: one matrix product. float32, or float64 for float64 input.

    entropy=False leaves the second one zero and saves about a tenth of the time.
    """
    mask = torch.ones_like(targets)
    _check(hidden, weight, targets, mask, bias, chunk_tokens)
    head = _Head(weight, bias, temperature, chunk_tokens, entropy)
    _, log_probs, entropies = _run(hidden, targets, mask, head, _Order(None, 0), None)
    return log_probs, entropies


def default_chunk_tokens(vocabulary: int, itemsize: int = 4, on_cuda: bool = False) -> int:
    """Tokens per chunk: as many as fit 256 MiB of logits, 128 to 512; on CUDA 1 GiB, 128 to 2048.

    A chunk only has to be large enough for the matrix products to run at full speed; beyond that it costs memory.
    """
    target, most = (2**30, 2048) if on_cuda else (2**28, 512)
    return min(max(target // (vocabulary * itemsize), 128), most)


class _Head(NamedTuple):
    """How log-probs come about."""

    weight: Tensor             # [V, H]
    bias: Tensor | None        # [V]
    temperature: float
    chunk_tokens: int | None
    entropy: bool


class _Order(NamedTuple):
    """Which tokens are computed, in which order. The first `num_active` (None: all) take part in the gradient."""

    tokens: Tensor | None      # [K] int64; None: all, in place
    num_active: int | None


def _order(mask: Tensor, active: Tensor, keep: Tensor | None) -> _Order:
    if keep is not None:
        return _Order(keep, None)
    if mask.is_cuda:   # nonzero has a data-dependent size: it would wait for the device
        return _Order(None, None)
    sampled = mask != 0
    active = (active & sampled).nonzero().squeeze(1)
    rest = sampled.index_fill(0, active, False).nonzero().squeeze(1)
    if len(active) == len(mask):
        return _Order(None, None)
    return _Order(torch.cat([active, rest]), len(active))


def _run(hidden: Tensor, targets: Tensor, mask: Tensor, head: _Head, order: _Order, token_loss: TokenLoss | None,
         bonus: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, log_probs [N], entropy [N]); tokens outside the order hold 0. bonus [K]: weights of an entropy bonus."""
    num_tokens, tokens = len(targets), order.tokens
    if tokens is not None:
        hidden, targets = hidden.index_select(0, tokens), targets[tokens]
    elif token_loss is not None:   # masked tokens are computed along: keep a NaN or an ignore-index of theirs out
        hidden = torch.where((mask != 0).unsqueeze(1), hidden, 0.0) if mask.is_cuda else hidden
        targets = torch.where(mask != 0, targets, 0)
    head = head._replace(weight=head.weight.to(hidden.dtype))
    grad = torch.is_grad_enabled() and token_loss is not None
    num_active = len(targets) if order.num_active is None else order.num_active
    loss, log_probs, entropy = _FusedLinearLoss.apply(
        hidden, head.weight, targets, head._replace(weight=head.weight.detach()), token_loss, num_active, grad, bonus)
    if tokens is not None:
        log_probs, entropy = (x.new_zeros(num_tokens).index_copy_(0, tokens, x) for x in (log_probs, entropy))
    return loss, log_probs, entropy


class _FusedLinearLoss(torch.autograd.Function):
    """Forward computes loss, log-probs, entropy and both gradients; backward scales the gradients once."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, head: _Head, token_loss: TokenLoss | None,
                num_active: int, grad: bool, bonus: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        dtype = precise_dtype(hidden.dtype)
        num_tokens, vocabulary = len(targets), len(weight)
        chunk = head.chunk_tokens or default_chunk_tokens(vocabulary, dtype.itemsize, hidden.is_cuda)
        loss = hidden.new_zeros((), dtype=dtype)
        log_probs, entropy = hidden.new_zeros((2, num_tokens), dtype=dtype).unbind()
        d_hidden = torch.zeros_like(hidden) if grad and ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight, dtype=dtype) if grad and ctx.needs_input_grad[1] else None
        needs_slope = d_hidden is not None or d_weight is not None
        buffer = hidden.new_empty((min(chunk, num_tokens), vocabulary), dtype=dtype)

        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _chunks(num_tokens, num_active, chunk):
                logits = _project(hidden[rows], head, buffer)
                total = _exp_in_place(logits, targets[rows], log_probs[rows], entropy[rows] if head.entropy else None)
                if token_loss is None or rows.start >= num_active:
                    continue
                value, slope = _value_and_slope(token_loss, log_probs[rows], rows, needs_slope)
                loss += value
                if bonus is not None:
                    loss -= (bonus[rows] * entropy[rows]).sum()
                if slope is not None:
                    spread = None if bonus is None else _entropy_gradient(
                        logits, total, entropy[rows], bonus[rows] / head.temperature)
                    d_logits = _logit_gradient(logits, total, targets[rows], slope / head.temperature,
                                               weight.dtype if hidden.is_cuda else dtype)
                    d_logits = d_logits if spread is None else d_logits + spread.to(d_logits.dtype)
                    _accumulate(d_logits, hidden[rows], weight, None if d_hidden is None else d_hidden[rows], d_weight)
        del buffer
        ctx.gradients = (d_hidden, None if d_weight is None else d_weight.to(weight.dtype))
        ctx.mark_non_differentiable(log_probs, entropy)
        ctx.set_materialize_grads(False)
        return loss, log_probs, entropy

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the fused loss gives its gradients away in backward and can't be differentiated twice; "
                               "call it again instead of using retain_graph")
        gradients, ctx.gradients = ctx.gradients, None
        if grad_loss is None:
            return (None,) * 8
        # in place and by a 0-dim tensor: no second copy of the gradients, and no waiting for the device
        return *(g if g is None else g.mul_(grad_loss.to(g.dtype)) for g in gradients), None, None, None, None, None, None


def _chunks(num_tokens: int, num_active: int, chunk: int) -> Iterator[slice]:
    """Slices of at most `chunk` tokens that cover all tokens and never cross num_active."""
    for begin, end in ((0, num_active), (num_active, num_tokens)):
        for start in range(begin, end, chunk):
            yield slice(start, min(start + chunk, end))


def _project(hidden: Tensor, head: _Head, buffer: Tensor) -> Tensor:
    """Logits of one chunk [n, V], written into the float32 (float64) buffer."""
    logits = buffer[:len(hidden)]
    if hidden.dtype == buffer.dtype:
        torch.mm(hidden, head.weight.t(), out=logits)
    elif hidden.is_cuda:
        torch.mm(hidden, head.weight.t(), out_dtype=buffer.dtype, out=logits)
    else:
        logits.copy_(torch.mm(hidden, head.weight.t()))
    if head.bias is not None:
        logits += head.bias.clamp(min=-1e30)   # -inf would make 0 * -inf, a NaN, of the entropy's terms
    if head.temperature != 1.0:
        logits /= head.temperature
    return logits


def _exp_in_place(logits: Tensor, targets: Tensor, log_probs: Tensor, entropy: Tensor | None) -> Tensor:
    """Turn logits [n, V] into exp(logits - max), fill log_probs [n] and entropy [n], return the sums [n, 1].

    Goes by blocks of rows: entropy needs a logit and its exponential at once, and a block's second copy stays small (in
    the cache, on CPU).
    """
    target_logits = logits.gather(1, targets.unsqueeze(1)).squeeze(1)
    top = logits.amax(1, keepdim=True)
    total = torch.empty_like(top)
    if entropy is None:
        torch.sum(logits.sub_(top).exp_(), 1, keepdim=True, out=total)
    else:
        block = max(1, (2**26 if logits.is_cuda else 2**18) // logits.shape[1])
        for rows in _chunks(len(logits), 0, block):
            shifted = logits[rows].sub_(top[rows])
            exp = torch.exp(shifted)
            torch.sum(exp, 1, keepdim=True, out=total[rows])
            entropy[rows] = -torch.linalg.vecdot(shifted, exp)
            shifted.copy_(exp)
        entropy.div_(total.squeeze(1)).add_(total.squeeze(1).log())
    log_probs.copy_(target_logits - top.squeeze(1) - total.squeeze(1).log())   # max first: it cancels exactly
    return total


def _value_and_slope(token_loss: TokenLoss, log_probs: Tensor, rows: slice, slope: bool) -> tuple[Tensor, Tensor | None]:
    """The chunk's loss and its derivative by every log-prob [n], from the loss's own definition."""
    if not slope:
        return token_loss(log_probs, rows), None
    with torch.enable_grad():
        log_probs = log_probs.detach().requires_grad_()
        value = token_loss(log_probs, rows)
        return value.detach(), torch.autograd.grad(value, log_probs)[0]


def _logit_gradient(exp: Tensor, total: Tensor, targets: Tensor, slope: Tensor, dtype: torch.dtype) -> Tensor:
    """exp [n, V] -> slope * (onehot - softmax), the gradient by hidden @ weight.T, rounded to `dtype` at the very end.

    In place, unless dtype is another: then the product and the cast are one pass.
    """
    exp.scatter_add_(1, targets.unsqueeze(1), -total)
    return torch.mul(exp, -slope.unsqueeze(1) / total, out=exp if dtype == exp.dtype else torch.empty_like(exp, dtype=dtype))


def _entropy_gradient(exp: Tensor, total: Tensor, entropy: Tensor, bonus: Tensor) -> Tensor:
    """[n, V]: the gradient of -bonus * entropy by the logits, bonus * p * (log p + entropy)."""
    p = exp / total
    return p * bonus.unsqueeze(1) * (p.clamp(min=torch.finfo(p.dtype).tiny).log() + entropy.unsqueeze(1))


def _accumulate(d_logits: Tensor, hidden: Tensor, weight: Tensor, d_hidden: Tensor | None, d_weight: Tensor | None) -> None:
    """d_hidden = d_logits @ weight, d_weight += d_logits.T @ hidden."""
    if d_hidden is not None:
        torch.mm(d_logits.to(weight.dtype), weight, out=d_hidden)
    if d_weight is not None and d_logits.dtype != d_weight.dtype:
        torch.addmm(d_weight, d_logits.t(), hidden, out_dtype=d_weight.dtype, out=d_weight)
    elif d_weight is not None:   # CPUs take no mixed product: the float32 one needs no copy of [V, H], and rounds nothing
        d_weight.addmm_(d_logits.t(), hidden.to(d_weight.dtype))


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor, bias: Tensor | None,
           chunk_tokens: int | None) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden must be [N, H] and weight [V, H], not {list(hidden.shape)} and {list(weight.shape)}")
    for name, value in (("targets", targets), ("mask", mask)):
        if value.shape != hidden.shape[:1]:
            raise ValueError(f"{name} must be [N] = [{len(hidden)}], not {list(value.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [V] = [{len(weight)}], not {list(bias.shape)}")
    if chunk_tokens is not None and chunk_tokens < 0:
        raise ValueError(f"chunk_tokens must be positive, or 0 or None to choose by memory, not {chunk_tokens}")
