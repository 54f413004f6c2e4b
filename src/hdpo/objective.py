"""The HDPO objective as an object: everything but the policy's log-probs, made once, evaluated on any part of the tokens.

What other trainers hold is brought into one shape here (`make_objective`); `hdpo.losses` and `hdpo.fused_loss` are its two
front doors. Surrogates: "ppo" (arXiv 1707.06347, dual clip of 1912.09729), "gspo" (one ratio a row, arXiv 2507.18071),
"cispo" (clipped ratio as a constant weight, arXiv 2506.13585). Each channel is clipped by its own sign, then they are summed.

Axes: C channels, B rows, T tokens, N flat tokens. Imports torch only.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

Surrogate = Literal["ppo", "gspo", "cispo"]
Norms = Tensor | Sequence[float] | float
WEIGHTS = (1.0, 0.15)
"""The paper's weights of accuracy and tool; as a default they mean (1.0,) where there is one channel (GRPO)."""


@dataclass(frozen=True, slots=True)
class Terms:
    """Which loss: the options of `hdpo.losses.hdpo_loss` that are no tensors."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = 3.0
    importance_cap: float = 2.0
    surrogate: Surrogate = "ppo"
    kl_coef: float = 0.0

    def __post_init__(self) -> None:
        if self.surrogate not in ("ppo", "gspo", "cispo"):
            raise ValueError(f"surrogate must be 'ppo', 'gspo' or 'cispo', not {self.surrogate!r}")


@dataclass(frozen=True, slots=True)
class Objective:
    """Tensors are [...] or [C, ...] where [...] is the shape of the tokens; masked tokens hold zeros everywhere."""

    old_log_probs: Tensor | None   # [...]; None: the policy's own
    advantages: Tensor             # [C, ...]
    mask: Tensor                   # [...] token weights
    counted: Tensor                # [C, ...] member * mask
    coefficient: Tensor            # [C, ...] counted * rollout weight / norm, without the channel's weight
    rollout_log_probs: Tensor | None     # [...]
    reference_log_probs: Tensor | None   # [...] of the policy that kl_coef holds on to
    per_token: Tensor              # [...] channel 0's counted / norm: the weight of KL and entropy terms
    sequence_log_ratio: Tensor | None    # [...] constant: the mean log ratio of the token's row ("gspo")
    weights: tuple[float, ...]     # [C]; Python numbers, so that using them never waits for the device
    terms: Terms

    def select(self, index: Tensor | slice) -> Objective:
        """The same objective on some of its flat tokens."""
        own = {name: value[index] for name in ("old_log_probs", "rollout_log_probs", "reference_log_probs", "mask", "per_token",
                                               "sequence_log_ratio") if (value := getattr(self, name)) is not None}
        return replace(self, **own, advantages=self.advantages[:, index], counted=self.counted[:, index],
                       coefficient=self.coefficient[:, index])

    def with_rows(self, log_probs: Tensor, row: Tensor | None, num_rows: int) -> Objective:
        """With each row's mean log ratio, which "gspo" needs before the first token; log_probs of ALL tokens, detached.

        row [N] for flat tokens; None for [B, T]. On-policy the ratio is 1 and nothing is needed.
        """
        if self.terms.surrogate != "gspo" or self.old_log_probs is None:
            return self
        sampled = (self.mask != 0).double()
        log_ratio = (log_probs.detach() - self.old_log_probs).double() * sampled
        if self.mask.dim() == 2:
            mean = log_ratio.sum(1) / sampled.sum(1).clamp(min=1.0)
            per_token = mean.unsqueeze(1).expand_as(log_ratio)
        elif row is None:
            raise ValueError("surrogate='gspo' on flat tokens needs row [N], the row index of every token")
        else:
            total, count = (x.new_zeros(num_rows).index_add_(0, row, x) for x in (log_ratio, sampled))
            per_token = (total / count.clamp(min=1.0))[row]
        return replace(self, sequence_log_ratio=per_token.to(self.mask.dtype))

    def loss(self, log_probs: Tensor) -> Tensor:
        per_channel = self._channel_losses(log_probs, self._ratio(log_probs))
        loss = torch.stack([w * loss for w, loss in zip(self.weights, per_channel, strict=True)]).sum()
        if self.reference_log_probs is not None and self.terms.kl_coef:
            loss = loss + self.terms.kl_coef * (self.per_token * self._reference_kl(log_probs)).sum()
        return loss

    def _old(self, log_probs: Tensor) -> Tensor:
        return log_probs.detach() if self.old_log_probs is None else self.old_log_probs

    def _ratio(self, log_probs: Tensor) -> Tensor:
        if self.sequence_log_ratio is not None:      # the row's value, each token's own gradient
            return (self.sequence_log_ratio + log_probs - log_probs.detach()).clamp(-20.0, 20.0).exp()
        return (log_probs - self._old(log_probs)).clamp(-20.0, 20.0).exp()

    def _reference_kl(self, log_probs: Tensor) -> Tensor:
        """[...] the k3 estimate of KL(policy || reference) at each token, nat."""
        assert self.reference_log_probs is not None
        away = (self.reference_log_probs - log_probs).clamp(-20.0, 20.0)
        return away.exp() - away - 1.0

    def _clipped(self, ratio: Tensor) -> Tensor:
        return ratio.clamp(1.0 - self.terms.clip_low, 1.0 + self.terms.clip_high)

    def _surrogate(self, log_probs: Tensor, ratio: Tensor) -> Tensor:
        """[C, ...] the surrogate of every token in every channel."""
        if self.terms.surrogate == "cispo":
            return -self.advantages * self._clipped(ratio).detach() * log_probs
        values = torch.maximum(-self.advantages * ratio, -self.advantages * self._clipped(ratio))
        if self.terms.dual_clip:
            bounded = torch.minimum(values, -self.advantages * self.terms.dual_clip)
            values = torch.where(self.advantages < 0, bounded, values)
        return values

    def _channel_losses(self, log_probs: Tensor, ratio: Tensor) -> Tensor:
        values = self.coefficient * self._surrogate(log_probs, ratio)
        if self.rollout_log_probs is not None:
            importance = log_importance(self._old(log_probs), self.rollout_log_probs).exp()
            values = values * importance.clamp(max=self.terms.importance_cap)
        return values.flatten(1).sum(1)

    def gradient_products(self, log_probs: Tensor) -> Tensor:
        """[C, C] inner products of g_c = d(weight_c * loss_c) / d log_probs over these tokens; they add up over splits."""
        with torch.enable_grad():
            at = log_probs.detach().requires_grad_()
            losses = self._channel_losses(at, self._ratio(at))
            found = [torch.autograd.grad(weight * loss, at, retain_graph=True)[0].flatten()
                     for weight, loss in zip(self.weights, losses, strict=True)]
        gradients = torch.stack(found)
        return (gradients[:, None] * gradients[None]).sum(-1)

    @torch.no_grad()
    def stats(self, log_probs: Tensor) -> dict[str, Tensor]:
        """See `hdpo.losses.hdpo_loss`. log_probs must be finite where mask is 0."""
        ratio, advantages = self._ratio(log_probs), self.advantages
        counts, sampled = self.counted != 0, self.mask != 0
        num_tokens, tokens = sampled.sum(), counts.flatten(1).sum(1)
        if self.terms.surrogate == "cispo":
            clipped, beyond = counts & (self._clipped(ratio) != ratio), torch.zeros_like(counts)
        else:
            dual = self.terms.dual_clip
            clipped = counts & (-advantages * self._clipped(ratio) > -advantages * ratio)
            beyond = counts & (advantages < 0) & (ratio > dual) if dual else torch.zeros_like(counts)
        log_ratio = torch.where(sampled, log_probs - self._old(log_probs), 0.0)
        token_ratio = log_ratio.clamp(-20.0, 20.0).exp()

        def mean(x: Tensor) -> Tensor:
            return torch.where(sampled, x, 0.0).sum() / num_tokens.clamp(min=1)

        def share(x: Tensor) -> Tensor:
            return x.flatten(1).sum(1) / tokens.clamp(min=1)

        found = {
            "loss": self._channel_losses(log_probs, ratio), "norm": self.counted.flatten(1).sum(1), "tokens": tokens,
            "clip_fraction": share(clipped), "dual_clip_fraction": share(beyond), "num_tokens": num_tokens,
            "ratio_mean": mean(ratio),
            "ratio_max": torch.where(sampled, ratio, 0.0).max() if ratio.numel() else ratio.sum(),
            "gradient_products": self.gradient_products(log_probs),
            "kl_k1": -mean(log_ratio), "kl_k3": mean(token_ratio - 1.0 - log_ratio),
        }
        if self.reference_log_probs is not None:
            found["reference_kl"] = mean(self._reference_kl(log_probs))
        return found


def make_objective(
    old_log_probs: Tensor | None, advantages: Tensor, mask: Tensor, member: Tensor | None, weights: Sequence[float],
    norms: Norms | None, rollout_weights: Tensor | None, rollout_log_probs: Tensor | None, reference_log_probs: Tensor | None,
    terms: Terms, dtype: torch.dtype, *, row: Tensor | None = None, channels_last: bool = False,
) -> Objective:
    """Check shapes, expand scalars per row over tokens, blank what is masked, and fold the norms into one coefficient."""
    tensors_only(advantages=advantages, mask=mask, member=member, old_log_probs=old_log_probs, rollout_weights=rollout_weights,
                 rollout_log_probs=rollout_log_probs, reference_log_probs=reference_log_probs)
    advantages = _channels_first(advantages, mask, channels_last, row)
    channels = len(advantages)
    weights = WEIGHTS[:1] if channels == 1 and tuple(weights) == WEIGHTS else tuple(weights)
    if not channels or len(weights) != channels:
        raise ValueError(f"advantages {list(advantages.shape)} must have one leading entry per weight, {list(weights)}")
    if reference_log_probs is None and terms.kl_coef:
        raise ValueError("kl_coef needs reference_log_probs")
    given = {"old_log_probs": old_log_probs, "rollout_weights": rollout_weights, "rollout_log_probs": rollout_log_probs,
             "reference_log_probs": reference_log_probs}
    old, rollout_weights, rollout, reference = (
        None if value is None else _at_tokens(name, value, mask) for name, value in given.items())
    mask = mask.to(dtype)
    advantages = _over_tokens("advantages", advantages.detach().to(dtype), mask, row)
    if member is None:
        counted = mask.expand_as(advantages)
    else:
        member = _over_tokens("member", _channels_first(member, mask, channels_last, row), mask, row)
        counted = torch.where(member.bool(), mask, 0.0)
        if counted.shape != advantages.shape:
            raise ValueError(f"member must have the channels of advantages, {channels}, not {counted.shape[0]}")
    inverse = _inverse_norms(norms, counted, mask)
    coefficient = counted * inverse
    if rollout_weights is not None:
        coefficient = coefficient * torch.where(mask != 0, rollout_weights.detach().to(dtype), 0.0)
    old, rollout, reference = (
        None if x is None else torch.where(mask != 0, x.detach().to(dtype), 0.0) for x in (old, rollout, reference))
    return Objective(old, torch.where(counted != 0, advantages, 0.0), mask, counted, coefficient, rollout, reference,
                     counted[0] * inverse[0], None, weights, terms)


def tensors_only(**named: Any) -> None:
    """Raises TypeError, naming the argument, for a numpy array or a list where a tensor is expected."""
    for name, value in named.items():
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, not {type(value).__module__}.{type(value).__qualname__}; "
                            f"torch.as_tensor({name}) makes one")


def _channels_first(values: Tensor, mask: Tensor, channels_last: bool, row: Tensor | None) -> Tensor:
    """[C, ...] of any layout: [..., C] with channels_last; one channel given as [B], [B, T], [N], or [1, N] when packed."""
    if channels_last:
        return values.movedim(-1, 0)
    if values.dim() == 0:
        raise ValueError("advantages must be [C, B], [C, B, T] or [C, N], not a number")
    rows = mask.shape[:1] if row is None else None
    leading = values.shape[1:] in (mask.shape, *([] if rows is None or mask.dim() != 2 else [rows]))
    if not leading and (values.shape == mask.shape or values.dim() == 1):
        return values.unsqueeze(0)
    packed = mask.dim() == 2 and mask.shape[0] == 1 and values.shape[1:] == mask.shape[1:]
    return values.unsqueeze(1) if not leading and packed else values


def _at_tokens(name: str, value: Tensor, mask: Tensor) -> Tensor:
    """In the shape of mask; one number a row, [B] or [B, 1], holds for all its tokens."""
    if value.shape != mask.shape and mask.dim() == 2 and value.shape in (mask.shape[:1], (len(mask), 1)):
        value = value.reshape(-1, 1).expand_as(mask)
    if value.shape != mask.shape:
        raise ValueError(f"{name} must have the shape of mask, {list(mask.shape)}, not {list(value.shape)}")
    return value


def _over_tokens(name: str, per_channel: Tensor, mask: Tensor, row: Tensor | None) -> Tensor:
    """[C, B] -> [C, B, T], or [C, N] by row [N]; [C, B, T] and flat [C, N] pass."""
    if row is not None:
        return per_channel[:, row]
    if per_channel.shape[1:] == mask.shape:
        return per_channel
    if mask.dim() == 2 and per_channel.shape[1:] == mask.shape[:1]:
        return per_channel.unsqueeze(-1).expand(*per_channel.shape, mask.shape[1])
    raise ValueError(f"{name} {list(per_channel.shape)} fits neither the rows nor the tokens of mask {list(mask.shape)}")


def _inverse_norms(norms: Norms | None, counted: Tensor, mask: Tensor) -> Tensor:
    """[C, 1, ...] for the shape of the tokens."""
    channels = len(counted)
    if norms is None:
        norms = counted.flatten(1).sum(1)
    elif not isinstance(norms, Tensor):
        norms = torch.tensor([norms] if isinstance(norms, (int, float)) else list(norms), dtype=torch.float64)
    norms = norms.reshape(-1)
    if len(norms) != channels:
        raise ValueError(f"norms must hold one number per channel, {channels}, not {len(norms)}")
    return reciprocal(norms, mask).view(-1, *[1] * mask.dim())


def log_importance(old_log_probs: Tensor, rollout_log_probs: Tensor) -> Tensor:
    return (old_log_probs - rollout_log_probs).nan_to_num(nan=0.0).clamp(-20.0, 20.0)


def reciprocal(norm: Norms, like: Tensor) -> Tensor:
    """1 / norm, and 0 where norm is 0, so that an empty channel contributes exactly nothing."""
    norm = torch.as_tensor(norm, dtype=torch.float64)
    return torch.where(norm > 0, 1.0 / norm, 0.0).to(like.device, like.dtype, non_blocking=True)


def precise_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
