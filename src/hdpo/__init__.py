"""HDPO: teach a multimodal agent when not to call a tool.

The public names below are loaded on first use (PEP 562). They need torch and nothing else, so that another trainer can
use the algorithm alone: `from hdpo import hdpo_advantages, hdpo_loss, fused_linear_hdpo_loss`.

The map. A room imports rooms above it in this list, never below; tests/test_architecture.py holds both to the tree.

losses advantages fused_loss objective checksums pixels   the algorithm, exact sums, pixels on the device; torch alone
types errors protocols background keys text descriptors oddities gauges pictures progress own config   records, failures, settings
ranks         collectives, the watchdog, nodes: who is there, who is alive
agent         one trajectory, thousands at once: chat, images, calls, turns
reward        trajectories -> three-valued verdicts -> rewards
packing       rows of all ranks -> micro-batches of equal work with global norms
data          rows of users' files: tasks, demonstrations
state         checkpoints, exported weights, spooled and dumped rollouts
toolserver    `hdpo tool-server` and its client; backends/ run the model's code
adapters      one vendor, one file
train         the two loops and their verbs
evaluation    held-out rows, and what they say
curation      public tool trajectories -> demonstrations, in three stages
report        a run's folder -> a page
doctor        what is missing before a device is touched
integrations  the algorithm inside TRL, verl, prime-rl and DDP
assistant     the trained agent at a terminal, and behind an OpenAI-compatible address
compose       the composition root: configuration -> parts, in order
toyworld      the embedded world, its base model, the demo
cli           one entry a command
"""
from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hdpo.advantages import Advantages, hdpo_advantages
    from hdpo.fused_loss import fused_linear_hdpo_loss, fused_linear_log_probs, fused_linear_nll_loss
    from hdpo.losses import aggregation_norms, aggregation_token_weights, hdpo_loss, nll_loss

__all__ = [
    "Advantages", "aggregation_norms", "aggregation_token_weights", "fused_linear_hdpo_loss", "fused_linear_log_probs",
    "fused_linear_nll_loss", "hdpo_advantages", "hdpo_loss", "nll_loss",
]
_HOMES = {
    "Advantages": "hdpo.advantages", "hdpo_advantages": "hdpo.advantages",
    "fused_linear_hdpo_loss": "hdpo.fused_loss", "fused_linear_log_probs": "hdpo.fused_loss",
    "fused_linear_nll_loss": "hdpo.fused_loss",
    "aggregation_norms": "hdpo.losses", "aggregation_token_weights": "hdpo.losses", "hdpo_loss": "hdpo.losses",
    "nll_loss": "hdpo.losses",
}
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'hdpo' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
