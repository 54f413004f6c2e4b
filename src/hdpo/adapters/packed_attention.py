"""Attention of packed rows with torch's SDPA, one causal call per row.

transformers' own SDPA path turns the row boundaries of a pack into an N x N mask: at 40,960 tokens 1.7 GB, no flash kernel,
and attention that costs N**2. Row by row there is no mask, the fast causal kernels apply, and it costs the sum of the rows'
squares, as FlashAttention's varlen kernel does.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "sdpa_per_row"
"""As `attn_implementation`; transformers builds no mask for an implementation that has registered none."""


def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, *,
           row_lengths: Sequence[int] | None = None, **kwargs: Any) -> tuple[Tensor, None]:
    """[1, heads, N, D] each -> [1, N, heads, D]. `row_lengths` add up to N; it is absent in the vision tower, whose images
    come one by one."""
    if row_lengths is None or kwargs.get("is_causal") is False:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    rows = zip(*(states.split(list(row_lengths), dim=2) for states in (query, key, value)))
    return torch.cat([sdpa_attention_forward(module, q, k, v, None, **kwargs)[0] for q, k, v in rows], dim=1), None


def applies(config: PreTrainedConfig) -> bool:
    """Whether every layer of the language model attends to all of the row before a token."""
    kinds = getattr(config.get_text_config(), "layer_types", None) or ()
    return all(kind == "full_attention" for kind in kinds)


AttentionInterface.register(NAME, attend)
