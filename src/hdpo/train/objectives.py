"""What the policy's head computes for one micro-batch: the HDPO loss, the SFT loss, or log-probs alone. Maths only.

An objective is bound to a run; calling it with a micro-batch gives a *job*, which the policy runs on (hidden [M, H],
weight [V, H]) inside its head (see adapters/policy_model.py). A loss job returns (loss,) and records its statistics, all
detached and left on the device, in a `Metrics`.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from hdpo.config import HdpoConfig
from hdpo.fused_loss import fused_linear_hdpo_loss, fused_linear_log_probs, fused_linear_nll_loss
from hdpo.losses import rows_within
from hdpo.train.metrics import Metrics
from hdpo.train.seen import Seen
from hdpo.types import MicroBatch

Job = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
CHANNEL_NAMES = ("acc", "tool")


@lru_cache(maxsize=4)
def ban_bias(banned_ids: tuple[int, ...], vocabulary: int, device: torch.device) -> Tensor | None:
    """[V] float32: -inf at ids the engine never samples, so that both normalise over the same set."""
    if not banned_ids:
        return None
    bias = torch.zeros(vocabulary)
    bias[list(banned_ids)] = float("-inf")
    return bias.to(device, non_blocking=True)


class LogProbs:
    """Job: (log_probs [M],) at the sampling temperature, without a graph."""

    def __init__(self, banned_ids: Sequence[int], temperature: float = 1.0, chunk_tokens: int | None = None) -> None:
        self.banned_ids, self.temperature, self.chunk_tokens = tuple(banned_ids), temperature, chunk_tokens or None

    def __call__(self, micro: MicroBatch) -> Job:
        def job(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
            bias = ban_bias(self.banned_ids, weight.shape[0], weight.device)
            (targets,) = _moved(hidden.device, micro.targets)
            return fused_linear_log_probs(hidden, weight, targets, temperature=self.temperature, bias=bias,
                                          chunk_tokens=self.chunk_tokens, entropy=False)[:1]
        return job


MOST_SOURCES = 32
"""Whose loss is logged one by one; rarer ones together."""


class SftObjective:
    """Negative log-likelihood of the trained tokens over their global count; that of each source over its own, in the log.

    `sources`: names by the number that a row has as its group.
    """

    def __init__(self, metrics: Metrics, chunk_tokens: int | None = None, sources: Sequence[str] = ()) -> None:
        self.metrics, self.chunk_tokens, self.sources = metrics, chunk_tokens or None, sources

    def __call__(self, micro: MicroBatch, norms: Tensor, old_log_probs: Tensor | None = None) -> Job:
        def job(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
            device = hidden.device
            targets, token_weight, norm = _moved(device, micro.targets, micro.weight, norms[0])
            loss, stats = fused_linear_nll_loss(
                hidden, weight, targets, token_weight, norm=norm, chunk_tokens=self.chunk_tokens,
                keep=torch.arange(len(targets), device=device), entropy=False)
            self.metrics.total("sft/loss", loss)
            self._by_source(micro, stats["log_probs"])
            self.metrics.add("sft/token_accuracy_proxy", stats["log_probs"].exp().mean() if len(micro.targets) else 0.0,
                             len(micro.targets))
            return (loss,)
        return job

    def _by_source(self, micro: MicroBatch, log_probs: Tensor) -> None:
        """The mean over a source's trained tokens, exact over micro-batches and ranks. Whose a token is, is known on the CPU."""
        if len(self.sources) < 2 or not len(micro.targets):
            return
        source_of = torch.tensor(micro.groups)[micro.row]
        for number in sorted(set(source_of.tolist())):
            if number >= 0:
                places = (source_of == number).nonzero()[:, 0]
                name = self.sources[number] if number < MOST_SOURCES else "other"
                (there,) = _moved(log_probs.device, places)
                self.metrics.add(f"sft/loss/{name}", -log_probs[there].mean(), len(places))


class HdpoObjective:
    """The two clipped surrogates (paper, section 3), corrected for engine and trainer being two programs.

    `hdpo.importance`: "token" multiplies each token's loss by its truncated importance weight. "sequence" does so too, and
    drops the rows whose geometric mean ratio leaves `importance_range` (the whole row came from another model: a token's
    weight cannot mend that). Dropped rows stay in the norms, see `hdpo_loss`. Whether a row is dropped is known only after
    its last token, so on-policy this costs a pass of the head for the log-probs first: four products instead of three.
    """

    def __init__(self, config: HdpoConfig, banned_ids: Sequence[int], temperature: float, metrics: Metrics,
                 chunk_tokens: int | None = None, seen: Seen | None = None) -> None:
        """`seen` keeps every token's log-prob for the dump."""
        self.config, self.metrics, self.seen = config, metrics, seen
        self.log_probs = LogProbs(banned_ids, temperature, chunk_tokens)

    def __call__(self, micro: MicroBatch, norms: Tensor, old_log_probs: Tensor | None) -> Job:
        """`old_log_probs` [M] of the weights that sampled, or None in the first mini-batch, where they are the policy's own."""
        def job(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
            device, c = hidden.device, self.config
            old = None if old_log_probs is None else _moved(device, old_log_probs)[0]
            targets, token_weight, row, rollout, advantages, member, norms_there = _moved(
                device, micro.targets, micro.weight, micro.row, micro.rollout_log_probs, micro.advantages, micro.member, norms)
            reference = None if micro.reference_log_probs is None else _moved(device, micro.reference_log_probs)[0]
            kept = None
            if c.importance == "sequence":
                seen = self.log_probs(micro)(hidden, weight)[0] if old is None else old
                kept = rows_within(seen, rollout, token_weight, row, advantages.shape[1], *c.importance_range)
            loss, stats = fused_linear_hdpo_loss(
                hidden, weight, targets, old, advantages, token_weight, temperature=self.log_probs.temperature,
                bias=ban_bias(self.log_probs.banned_ids, weight.shape[0], device), member=member,
                weights=(c.w_acc, c.w_tool), norms=norms_there, clip_low=c.clip_low, clip_high=c.clip_high,
                dual_clip=c.dual_clip, rollout_weights=None if kept is None else kept[row].to(token_weight.dtype),
                rollout_log_probs=None if c.importance == "none" else rollout, importance_cap=c.importance_cap, row=row,
                surrogate=c.surrogate, entropy_coef=c.entropy_coef, reference_log_probs=reference, kl_coef=c.kl_coef,
                chunk_tokens=self.log_probs.chunk_tokens, keep=torch.arange(len(targets), device=device))
            self._record(loss, stats)
            if self.seen is not None:
                self.seen.note(micro, stats["log_probs"], old)
            self._record_mismatch(stats["log_probs"] if old is None else old, rollout, kept, micro.num_rows)
            return (loss,)
        return job

    def _record(self, loss: Tensor, stats: dict[str, Tensor]) -> None:
        m, count = self.metrics, stats["num_tokens"]
        m.total("actor/pg_loss", loss)
        for index, name in enumerate(CHANNEL_NAMES):
            m.total(f"actor/pg_loss/{name}", stats["loss"][index])
            m.add(f"actor/pg_clipfrac/{name}", stats["clip_fraction"][index], stats["tokens"][index])
            m.add(f"actor/pg_clipfrac_lower/{name}", stats["dual_clip_fraction"][index], stats["tokens"][index])
        products = stats["gradient_products"]
        for name, value in (("acc", products[0, 0]), ("tool", products[1, 1]), ("both", products[0, 1])):
            m.total(f"gradient/{name}", value)
        m.add("actor/ppo_kl", stats["kl_k1"], count)
        m.add("actor/ratio_mean", stats["ratio_mean"], count)
        m.maximum("actor/ratio_max", stats["ratio_max"])
        m.add("actor/entropy", stats["entropy"].sum() / count.clamp(min=1), count)
        if "reference_kl" in stats:
            m.add("hdpo/kl", stats["reference_kl"], count)

    def _record_mismatch(self, old: Tensor, rollout: Tensor, kept: Tensor | None, num_rows: int) -> None:
        m = self.metrics
        m.add_mismatch(old, rollout, torch.ones_like(old))
        if self.config.importance != "none" and len(old):
            capped = (old - rollout).exp() >= self.config.importance_cap
            m.add("mismatch/importance_capped", capped.float().mean(), len(old))
        if kept is not None and num_rows:
            m.add("mismatch/rows_dropped", (~kept).sum() / num_rows, num_rows)


def gradient_scalars(scalars: Mapping[str, float]) -> dict[str, float]:
    """Of a step's sums `gradient/*`: with g_c the gradient of channel c's weighted loss with respect to the log-probs of all the
    step's trained tokens, `hdpo/tool_gradient_share` = |g_tool| / (|g_acc| + |g_tool|) in L2 norms, and `hdpo/gradient_cosine`
    of the angle between the two: below 0 the channels pull against each other. Absent where there is no gradient."""
    if "gradient/both" not in scalars:
        return {}
    acc, tool = (math.sqrt(max(0.0, scalars[f"gradient/{name}"])) for name in CHANNEL_NAMES)
    found = {"hdpo/tool_gradient_share": tool / (acc + tool)} if acc + tool else {}
    return found | ({"hdpo/gradient_cosine": scalars["gradient/both"] / (acc * tool)} if acc * tool else {})


def _moved(device: torch.device, *tensors: Tensor) -> tuple[Tensor, ...]:
    """A micro-batch's tensors there, without waiting for the device's queue."""
    return tuple(tensor.to(device, non_blocking=True) for tensor in tensors)
