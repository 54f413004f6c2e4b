"""HDPO in verl's hooks: call `register()` before training, then set

    algorithm.adv_estimator=gdpo  actor_rollout_ref.actor.policy_loss.loss_mode=hdpo

The reward function must return, beside "score", the numbers "accuracy_reward", "tool_reward" (1 / (calls + 1)) and "correct";
"scored" = 0 takes a row out. verl hands these to the estimator called "gdpo" alone, so that name is taken, and it carries one
advantage to the loss: the channels meet in `one_stream`, which is HDPO with one optimizer step per rollout batch
(ppo_mini_batch_size = train_batch_size, ppo_epochs = 1) and an approximation with more. hdpo's own trainer has no such limit.
"""
from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hdpo.advantages import hdpo_advantages
from hdpo.integrations.one_stream import one_stream
from hdpo.losses import aggregation_token_weights, hdpo_loss

REWARDS = ("accuracy_reward", "tool_reward", "correct")


def register() -> None:
    """Put both functions into verl's registries."""
    algorithms = importlib.import_module("verl.trainer.ppo.core_algos")     # the host's; hdpo itself needs no verl
    algorithms.ADV_ESTIMATOR_REGISTRY["gdpo"] = advantage_estimator
    algorithms.register_policy_loss("hdpo")(policy_loss)


def advantage_estimator(token_level_rewards: Tensor, response_mask: Tensor, index: np.ndarray, config: Any = None,
                        non_tensor_batch: dict[str, np.ndarray] | None = None, **others: Any) -> tuple[Tensor, Tensor]:
    """(advantages, returns), both [B, L]. index: the group's uid of every row, as strings. Raises ValueError."""
    found = non_tensor_batch or {}
    if missing := [name for name in REWARDS if name not in found]:
        raise ValueError(f"the reward function must return {', '.join(missing)} beside score, and adv_estimator must be gdpo: "
                         "verl gives rewards by name to that estimator alone")
    accuracy, tool, correct = (torch.as_tensor(np.asarray(found[name], dtype=np.float64)) for name in REWARDS)
    scored = torch.as_tensor(np.asarray(found.get("scored", np.ones(len(accuracy))), dtype=np.float64)) > 0
    _, group = np.unique(np.asarray(index).astype(str), return_inverse=True)
    channels = hdpo_advantages(accuracy, tool, correct > 0.5, torch.as_tensor(group), scored=scored & ~accuracy.isnan())
    stream = one_stream(channels, response_mask.sum(1).cpu()).to(token_level_rewards)
    advantages = stream.unsqueeze(1) * response_mask
    return advantages, advantages


def policy_loss(old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, response_mask: Tensor,
                loss_agg_mode: str = "token-mean", config: Any = None, rollout_is_weights: Tensor | None = None,
                ) -> tuple[Tensor, dict[str, Any]]:
    """verl's policy loss by `hdpo_loss` with one channel; its global counts become the norm. Raises ValueError."""
    counts, mask = dict(getattr(config, "global_batch_info", None) or {}), response_mask.float()
    ranks = counts.get("dp_size") or 1
    if loss_agg_mode == "token-mean":
        norm = (counts.get("batch_num_tokens") or mask.sum()) / ranks
    elif loss_agg_mode in ("seq-mean-token-mean", "seq-mean-token-sum"):
        norm = (counts.get("global_batch_size") or (mask.sum(1) > 0).sum()) / ranks
        if loss_agg_mode == "seq-mean-token-mean":
            mask = mask * aggregation_token_weights(mask.sum(1), "sequence_mean").unsqueeze(1)
    else:
        raise ValueError(f"loss_agg_mode {loss_agg_mode!r}: use token-mean, seq-mean-token-mean or seq-mean-token-sum")
    clip = getattr(config, "clip_ratio", 0.2)
    loss, stats = hdpo_loss(
        log_prob, old_log_prob, advantages.unsqueeze(0), mask, norms=torch.as_tensor(norm, dtype=torch.float64).reshape(1),
        clip_low=_or(config, "clip_ratio_low", clip), clip_high=_or(config, "clip_ratio_high", clip),
        dual_clip=getattr(config, "clip_ratio_c", 3.0), rollout_weights=rollout_is_weights)
    return loss, {"actor/pg_clipfrac": stats["clip_fraction"][0].item(), "actor/ppo_kl": stats["kl_k1"].item(),
                  "actor/pg_clipfrac_lower": stats["dual_clip_fraction"][0].item()}


def _or(config: Any, name: str, default: float) -> float:
    value = getattr(config, name, None)
    return default if value is None else value
