"""Group-relative advantages in two decoupled channels: accuracy over all rollouts, tool economy over the correct ones.

Source: HDPO (arXiv 2604.08545); the unconditional estimator is GDPO (arXiv 2601.05242). Imports torch only, so any
trainer can use it. One scalar per trajectory leaves this file; expanding it over tokens is the loss's business.
"""
from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from hdpo.objective import tensors_only


class Advantages(NamedTuple):
    """Channel 0 is accuracy, channel 1 tool. Rows keep the order they came in."""

    values: Tensor   # [2, B]
    member: Tensor   # [2, B] bool: the row's tokens count in the channel's norm, also where its advantage is zero


def hdpo_advantages(
    accuracy_reward: Tensor, tool_reward: Tensor, correct: Tensor, group: Tensor, *, scored: Tensor | None = None,
    scale: Literal["std", "none"] = "std", eps: float = 1e-6, min_std: float = 1e-5,
    tool_estimator: Literal["conditional", "unconditional", "coupled"] = "conditional", tool_weight: float = 0.15,
    tool_norm: Literal["global", "effective"] = "global",
) -> Advantages:
    """Advantages of B trajectories in both channels; all inputs [B], `group` any integer id per row, in any order.

    Each channel is (reward - mean) / (std + eps) over its comparison set within the group, std with ddof=1, computed in
    two passes in float64 whatever the input's type. Accuracy compares all scored rollouts of the group. Tool compares,
    by `tool_estimator`:

    - "conditional" (HDPO): Q, the scored rollouts that are `correct`, so a fast wrong answer never looks frugal;
    - "unconditional" (GDPO): all scored rollouts;
    - "coupled": nothing. The accuracy channel then holds accuracy + tool_weight * tool normalised as one reward, the
      baseline in which a small weight vanishes in the shared variance. `tool_weight` matters only here.

    A comparison set of fewer than two rows says nothing: its rows get 0 and are no members. A set whose std is below
    `min_std` gives exactly 0, but its rows stay members: they are compared, and found equal. `scale="none"` only centres
    (Dr. GRPO). Rows with scored=False (a failed tool, no verdict) get 0, are no members, and leave every other row as if
    they had never been sampled; their rewards may be NaN.

    `tool_norm` says which rows the tool channel's norm counts: "global", all that were compared, or "effective", those whose
    tool advantage is not zero. With the same weight the two pull alike while tools are common; once they are rare most sets
    are all equal, and "effective" divides by the few rows that still differ: 2 to 4 times the pull. The reference does the
    latter within each micro-batch; here the count is of the whole step, as everywhere.

    Returns values in the dtype of `accuracy_reward` (float32 if that is an integer type). Raises ValueError when shapes
    differ, the group is not integer or an option is unknown, TypeError for anything but tensors.
    """
    _check(accuracy_reward, tool_reward, correct, group, scored, scale, tool_estimator, tool_norm)
    correct = correct.bool()
    scored = torch.ones_like(correct) if scored is None else scored.bool()
    ids, index = torch.unique(group, return_inverse=True)
    accuracy, tool = accuracy_reward.double(), tool_reward.double()
    if tool_estimator == "coupled":
        channels = [(accuracy + tool_weight * tool, scored), (tool, torch.zeros_like(scored))]
    else:
        channels = [(accuracy, scored), (tool, scored & correct if tool_estimator == "conditional" else scored)]

    values, members = [], []
    for reward, compared in channels:
        centred, std, count = _group_moments(reward, compared, index, len(ids))
        member = compared & (count >= 2)
        value = centred / (std + eps) if scale == "std" else centred
        values.append(torch.where(member & (std >= min_std), value, 0.0))
        members.append(member)
    if tool_norm == "effective":
        members[1] = members[1] & (values[1] != 0)
    dtype = accuracy_reward.dtype if accuracy_reward.is_floating_point() else torch.float32
    return Advantages(torch.stack(values).to(dtype), torch.stack(members))


def _group_moments(reward: Tensor, compared: Tensor, index: Tensor, num_groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Per row [B]: reward minus the mean, the std (ddof=1) and the size of its group's comparison set."""
    def total(x: Tensor) -> Tensor:
        return x.new_zeros(num_groups).index_add_(0, index, x)

    count = total(compared.double())
    # where, not a product: the reward of a row that is not compared may be NaN
    mean = total(torch.where(compared, reward, 0.0)) / count.clamp(min=1)
    centred = torch.where(compared, reward - mean[index], 0.0)
    variance = total(centred.square()) / (count - 1).clamp(min=1)
    return centred, variance.sqrt()[index], count[index]


def _check(accuracy_reward: Tensor, tool_reward: Tensor, correct: Tensor, group: Tensor, scored: Tensor | None,
           scale: str, tool_estimator: str, tool_norm: str) -> None:
    tensors_only(accuracy_reward=accuracy_reward, tool_reward=tool_reward, correct=correct, group=group, scored=scored)
    named = {"tool_reward": tool_reward, "correct": correct, "group": group, "scored": scored}
    if accuracy_reward.dim() != 1:
        raise ValueError(f"accuracy_reward must be [B], not {list(accuracy_reward.shape)}")
    for name, value in named.items():
        if value is not None and value.shape != accuracy_reward.shape:
            raise ValueError(f"{name} must have the shape of accuracy_reward, {list(accuracy_reward.shape)}, "
                             f"not {list(value.shape)}")
    if group.is_floating_point():
        raise ValueError("group must hold integer ids")
    if scale not in ("std", "none"):
        raise ValueError(f"scale must be 'std' or 'none', not {scale!r}")
    if tool_estimator not in ("conditional", "unconditional", "coupled"):
        raise ValueError(f"tool_estimator must be 'conditional', 'unconditional' or 'coupled', not {tool_estimator!r}")
    if tool_norm not in ("global", "effective"):
        raise ValueError(f"tool_norm must be 'global' or 'effective', not {tool_norm!r}")
