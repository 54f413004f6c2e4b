"""HDPO: teach a multimodal agent when not to call a tool.

The public names below are loaded on first use (PEP 562). They need torch and nothing else, so that another trainer can
use the algorithm alone: `from hdpo import hdpo_advantages, hdpo_loss, fused_linear_hdpo_loss`.
"""
from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hdpo.advantages import Advantages as Advantages, hdpo_advantages as hdpo_advantages
    from hdpo.fused_loss import (fused_linear_hdpo_loss as fused_linear_hdpo_loss,
                                 fused_linear_log_probs as fused_linear_log_probs,
                                 fused_linear_nll_loss as fused_linear_nll_loss)
    from hdpo.losses import (aggregation_norms as aggregation_norms,
                             aggregation_token_weights as aggregation_token_weights, hdpo_loss as hdpo_loss,
                             nll_loss as nll_loss)

_HOME = {
    "Advantages": "advantages", "hdpo_advantages": "advantages",
    "hdpo_loss": "losses", "nll_loss": "losses",
    "aggregation_norms": "losses", "aggregation_token_weights": "losses",
    "fused_linear_hdpo_loss": "fused_loss", "fused_linear_nll_loss": "fused_loss", "fused_linear_log_probs": "fused_loss",
}

__all__ = sorted(_HOME)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'hdpo' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"hdpo.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
