"""Random off-policy token batches for the loss tests, the objective written out once more from the paper, and both losses
called on a batch."""
from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch

from hdpo.fused_loss import fused_linear_hdpo_loss
from hdpo.losses import hdpo_loss

CLIPS = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 1.5}
CAP = 1.4


@dataclass(frozen=True)
class Case:
    hidden: torch.Tensor           # [N, H]
    weight: torch.Tensor           # [V, H]
    targets: torch.Tensor          # [N]
    old_log_probs: torch.Tensor    # [N]
    advantages: torch.Tensor       # [C, N] of both signs, some zero
    member: torch.Tensor           # [C, N]
    mask: torch.Tensor             # [N]
    rollout_weights: torch.Tensor  # [N]
    rollout_log_probs: torch.Tensor  # [N], about one in three far enough from old for the cap
    bias: torch.Tensor             # [V], -inf at two ids that are no target
    temperature: float

    def part(self, index) -> Case:
        cut = {f.name: getattr(self, f.name)[..., index] for f in fields(self)
               if f.name in ("old_log_probs", "advantages", "member", "mask", "rollout_weights",
                             "rollout_log_probs", "targets") and getattr(self, f.name) is not None}
        return replace(self, hidden=self.hidden[index], **cut)

    def leaves(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.hidden.clone().requires_grad_(), self.weight.clone().requires_grad_()

    def kwargs(self) -> dict:
        return {"member": self.member, "rollout_weights": self.rollout_weights, "rollout_log_probs": self.rollout_log_probs,
                "importance_cap": CAP, **CLIPS}


def make_case(seed=0, tokens=97, hidden=12, vocabulary=53, channels=2, dtype=torch.float64, temperature=0.7, scale=1.0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def chance(p, *shape):
        return torch.rand(*shape, generator=g) < p

    h, w = (normal(tokens, hidden) * scale).to(dtype), normal(vocabulary, hidden).to(dtype)
    bias = torch.zeros(vocabulary, dtype=torch.float64)
    bias[-2:] = -torch.inf
    targets = torch.randint(0, vocabulary - 2, (tokens,), generator=g)
    log_probs = naive_log_probs(h.double(), w.double(), targets, temperature, bias)
    old = (log_probs + 0.5 * normal(tokens)).to(torch.float64 if dtype == torch.float64 else torch.float32)
    advantages = normal(channels, tokens) * chance(0.9, channels, tokens)
    member, mask = chance(0.8, channels, tokens), chance(0.7, tokens).double()
    rollout_weights = torch.rand(tokens, generator=g, dtype=torch.float64) * 2
    rollout = (log_probs + 0.7 * normal(tokens)).to(old.dtype)
    return Case(h, w, targets, old, advantages, member, mask, rollout_weights, rollout, bias, temperature)


def on_every_branch(case: Case, seed=0) -> Case:
    """The case with ratios far from all kinks, whose first eight tokens lie on every piece of the surrogate in all channels."""
    g = torch.Generator().manual_seed(seed)
    tokens = len(case.targets)
    ratio = torch.tensor([0.5, 0.9, 1.0, 1.1, 1.4, 4.0])[torch.randint(0, 6, (tokens,), generator=g)]
    ratio[:8] = torch.tensor([0.5, 1.0, 1.4, 4.0] * 2)
    log_probs = naive_log_probs(case.hidden.double(), case.weight.double(), case.targets, case.temperature, case.bias)
    sign = torch.tensor([1.0] * 4 + [-1.0] * 4) * torch.tensor([1.0, -1.0, 1.0])[:len(case.advantages), None]
    advantages, member, mask = case.advantages.clone(), case.member.clone(), case.mask.clone()
    advantages[:, :8], member[:, :8], mask[:8] = sign * (0.5 + advantages[:, :8].abs()), True, 1.0
    return replace(case, old_log_probs=(log_probs - ratio.double().log()).to(case.old_log_probs.dtype), mask=mask,
                   advantages=advantages, member=member)


def naive_log_probs(hidden, weight, targets, temperature=1.0, bias=None):
    logits = (hidden @ weight.T).to(torch.float64 if hidden.dtype == torch.float64 else torch.float32)
    logits = (logits + (0.0 if bias is None else bias.to(logits.dtype))) / temperature
    return torch.log_softmax(logits, -1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def defined_loss(log_probs, case: Case, weights=(1.0, 0.15), norms=None, clip_low=0.2, clip_high=0.28, dual_clip=1.5):
    """sum_c w_c / norm_c * sum_t ..., by cases on the sign of the advantage instead of by maxima and minima."""
    total = log_probs.new_zeros(())
    for c, w in enumerate(weights):
        counted = case.mask * case.member[c]
        norm = counted.sum() if norms is None else norms[c]
        for t in counted.nonzero().squeeze(1).tolist():
            ratio, advantage = torch.exp(log_probs[t] - case.old_log_probs[t]), case.advantages[c, t]
            if advantage >= 0:   # gain is bounded: a ratio above 1 + clip_high earns nothing more
                surrogate = advantage * (ratio if ratio < 1 + clip_high else 1 + clip_high)
            elif ratio < 1 - clip_low:
                surrogate = advantage * (1 - clip_low)
            else:                # and so is loss, by the dual clip
                surrogate = advantage * (ratio if ratio < dual_clip else dual_clip)
            importance = torch.exp(case.old_log_probs[t] - case.rollout_log_probs[t]).clamp(max=CAP)
            total = total - w * case.rollout_weights[t] * importance * counted[t] * surrogate / norm
    return total


def branches(log_probs, case: Case, clip_low=0.2, clip_high=0.28, dual_clip=1.5):
    """How many counted tokens of each channel lie on each piece of the surrogate: [C, 5]."""
    ratio = torch.exp(log_probs.detach().double() - case.old_log_probs)
    a, counted = case.advantages, (case.member & (case.mask != 0))
    pieces = [(a > 0) & (ratio > 1 + clip_high), (a > 0) & (ratio <= 1 + clip_high), (a < 0) & (ratio < 1 - clip_low),
              (a < 0) & (ratio >= 1 - clip_low) & (ratio <= dual_clip), (a < 0) & (ratio > dual_clip)]
    return torch.stack([(piece & counted).sum(1) for piece in pieces], 1)


def relative(a, b):
    return float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm().clamp(min=1e-300))


def fused(case, hidden, weight, **options):
    options = {"bias": case.bias, "temperature": case.temperature, **case.kwargs(), **options}
    return fused_linear_hdpo_loss(hidden, weight, case.targets, case.old_log_probs, case.advantages, case.mask, **options)


def readable(case, hidden, weight, **options):
    log_probs = naive_log_probs(hidden, weight, case.targets, case.temperature, case.bias)
    return hdpo_loss(log_probs, case.old_log_probs, case.advantages, case.mask, **{**case.kwargs(), **options})


def run(function, case, **options):
    """(loss, d_hidden, d_weight, stats)"""
    hidden, weight = case.leaves()
    loss, stats = function(case, hidden, weight, **options)
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight)), stats


def on(device, case):
    return replace(case, **{name: value.to(device) for name, value in vars(case).items() if isinstance(value, torch.Tensor)})


def sampled_everywhere(case):
    ones = torch.ones_like(case.mask)
    return replace(case, mask=ones, advantages=torch.ones_like(case.advantages), member=torch.ones_like(case.member))
