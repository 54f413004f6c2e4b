"""HDPO: teach a multimodal agent when not to call a tool.

The public names below are loaded on first use (PEP 562). They need torch and nothing else, so that another trainer can
use the algorithm alone: `from hdpo import hdpo_advantages, hdpo_loss, fused_linear_hdpo_loss`.
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
