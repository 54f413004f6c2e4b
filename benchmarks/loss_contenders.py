"""The two-channel objective as each contender of bench_loss.py computes it: inputs in, both gradients out."""
from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hdpo import fused_linear_hdpo_loss, hdpo_loss
from hdpo.fused_loss import default_chunk_tokens, fused_linear_log_probs

ROWS = 8
WEIGHTS = (1.0, 0.15)


@dataclass(frozen=True)
class Inputs:
    hidden: Tensor      # [N, H]
    weight: Tensor      # [V, H]
    targets: Tensor     # [N]
    old: Tensor         # [N]
    advantages: Tensor  # [C, B]
    row: Tensor         # [N]
    mask: Tensor        # [N]
    keep: Tensor | None  # [K] the trained tokens; on CUDA known to whoever builds the batch, so finding them is not timed

    @property
    def chunk(self) -> int:
        return default_chunk_tokens(len(self.weight), 4, self.hidden.is_cuda)


def make_inputs(tokens: int, hidden: int, vocabulary: int, device: str, dtype: torch.dtype, density: float = 1.0,
                scale: float = 1.0) -> Inputs:
    """Strongly off-policy tokens. The logits' spread is `scale`, so log-probs lie near -log(vocabulary) at scale 1."""
    torch.manual_seed(0)
    h = torch.randn(tokens, hidden, device=device, dtype=dtype) * (scale * hidden ** -0.5)
    w = torch.randn(vocabulary, hidden, device=device, dtype=dtype)
    old = -torch.full((tokens,), float(vocabulary), device=device).log() - 0.5 + torch.randn(tokens, device=device)
    mask = (torch.rand(tokens, device=device) < density).float()
    keep = mask.nonzero().squeeze(1) if device == "cuda" and density < 1 else None
    return Inputs(h.requires_grad_(), w.requires_grad_(), torch.randint(0, vocabulary, (tokens,), device=device), old,
                  torch.randn(2, ROWS, device=device), torch.arange(tokens, device=device) * ROWS // tokens, mask, keep)


def gradients(loss: Tensor, x: Inputs) -> tuple[Tensor, Tensor]:
    return torch.autograd.grad(loss, (x.hidden, x.weight))


def run_floor(x: Inputs) -> object:
    """Three bare products of the inputs' type, nothing else."""
    with torch.no_grad():
        h, w = x.hidden.detach(), x.weight.detach()
        d_hidden, d_weight = torch.empty_like(h), torch.zeros_like(w)
        buffer = h.new_empty(x.chunk, len(w))
        for part, d_part in zip(h.split(x.chunk), d_hidden.split(x.chunk)):
            logits = torch.mm(part, w.t(), out=buffer[:len(part)])
            torch.mm(logits, w, out=d_part)
            d_weight.addmm_(logits.t(), part)
    return d_hidden, d_weight


def run_fused(x: Inputs, entropy: bool = True) -> object:
    loss, _ = fused_linear_hdpo_loss(x.hidden, x.weight, x.targets, x.old, x.advantages, x.mask, row=x.row, keep=x.keep,
                                     weights=WEIGHTS, entropy=entropy)
    return gradients(loss, x)


def run_on_policy(x: Inputs, apart: bool = False) -> object:
    """The first mini-batch of a step: x.old are the engine's log-probs. apart: the trainer's are computed beforehand."""
    old = fused_linear_log_probs(x.hidden, x.weight, x.targets, entropy=False)[0] if apart else None
    loss, _ = fused_linear_hdpo_loss(x.hidden, x.weight, x.targets, old, x.advantages, x.mask, row=x.row, keep=x.keep,
                                     weights=WEIGHTS, rollout_log_probs=x.old, entropy=False)
    return gradients(loss, x)


def log_probs_of(x: Inputs, coarse: bool = False) -> Tensor:
    """coarse: softmax in the logits' own type, instead of at least float32."""
    logits = x.hidden @ x.weight.t()
    dtype = logits.dtype if coarse else torch.promote_types(logits.dtype, torch.float32)
    return torch.log_softmax(logits.to(dtype), -1).gather(1, x.targets.unsqueeze(1)).squeeze(1)


def run_naive(x: Inputs, coarse: bool = False) -> object:
    return gradients(hdpo_loss(log_probs_of(x, coarse), x.old, x.advantages[:, x.row], x.mask, weights=WEIGHTS)[0], x)


def run_naive_held(x: Inputs) -> object:
    """As trainers write it: the model's output holds the logits until after backward."""
    logits = x.hidden @ x.weight.t()
    log_probs = torch.log_softmax(logits.float(), -1).gather(1, x.targets.unsqueeze(1)).squeeze(1)
    return gradients(hdpo_loss(log_probs, x.old, x.advantages[:, x.row], x.mask, weights=WEIGHTS)[0], x)


def run_two_graphs(x: Inputs) -> object:
    parts = [gradients(hdpo_loss(log_probs_of(x), x.old, x.advantages[c:c + 1, x.row], x.mask, weights=(w,))[0], x)
             for c, w in enumerate(WEIGHTS)]
    return parts[0][0].add_(parts[1][0]), parts[0][1].add_(parts[1][1])


def run_liger(x: Inputs, channels: int = 2) -> object:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    rule = LigerFusedLinearGRPOLoss(beta=0.0, compiled=False, use_ref_model=False, loss_type="bnpo", delta=3.0)
    h, targets, mask, old = (t.view(ROWS, -1, *t.shape[1:]) for t in (x.hidden, x.targets, x.mask, x.old))
    loss = sum(w * rule(h, x.weight, targets, mask, x.advantages[c], old_per_token_logps=old)[0]
               for c, w in list(enumerate(WEIGHTS))[:channels])
    return gradients(loss, x)


def run_trl(x: Inputs) -> object:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    log_probs = ChunkedLogProbFunction.apply(x.hidden, x.weight, None, x.targets, 1.0, 8192, None, 1.0, ())[0]
    return gradients(hdpo_loss(log_probs, x.old, x.advantages[:, x.row], x.mask, weights=WEIGHTS)[0], x)


CONTENDERS: dict[str, Callable[[Inputs], object]] = {
    "floor": run_floor, "fused": run_fused, "fused_no_entropy": functools.partial(run_fused, entropy=False),
    "naive": run_naive, "two_graphs": run_two_graphs, "liger": run_liger, "trl": run_trl,
}
EXTRA: dict[str, Callable[[Inputs], object]] = {   # variants for single figures
    "on_policy": run_on_policy, "on_policy_apart": functools.partial(run_on_policy, apart=True),
    "liger_one": functools.partial(run_liger, channels=1), "naive_held": run_naive_held,
}
