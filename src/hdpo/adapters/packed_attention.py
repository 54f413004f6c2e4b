"""Attention in a pack of rows, some of which share their prompt: each row causally to itself, to no other row.

A row of a shared prompt is two spans of the pack (see types.Span): keys and values of the prompt are computed once and
stand before those of each row that has it. Autograd adds up what the rows ask of them, in fp32 where the model is bf16.

torch's SDPA goes span by span. transformers' own SDPA path turns the row boundaries of a pack into an N x N mask: at 40,960
tokens 1.7 GB, no flash kernel, and attention that costs N**2. Span by span there is no such mask, the fast causal kernels
apply, and it costs the sum of the rows' squares, as FlashAttention's varlen kernel does. That one is told the spans too:
left to itself, transformers looks for row boundaries in the positions, in every layer, and waits for the device.
"""
from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, PreTrainedConfig
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hdpo.types import Span

IMPLEMENTATIONS = SDPA, FLASH = "sdpa_per_row", "flash_attention_2"
"""As `attn_implementation`; transformers builds no mask for an implementation that has registered none."""
QUERY_BLOCK = 256
"""Queries whose mask is written out at once on a CPU, where no kernel knows a causal mask that isn't square."""


class PackLayout:
    """Where rows begin and end in a pack, on the device as the kernels want it."""

    def __init__(self, spans: Sequence[Span], device: torch.device) -> None:
        self.lengths = [span.length for span in spans]
        self.prompts = [span.prompt for span in spans]
        self.shared = sorted({prompt for prompt in self.prompts if prompt >= 0})
        keys = [length + (self.lengths[prompt] if prompt >= 0 else 0) for length, prompt in spans]
        self.varlen: dict[str, Any] = {
            "cu_seq_lens_q": _bounds(self.lengths, device), "max_length_q": max(self.lengths),
            "cu_seq_lens_k": _bounds(keys, device), "max_length_k": max(keys)}

    def rows(self, states: Tensor) -> list[Tensor]:
        """Keys or values [1, heads, N, D] -> for each span those of its row up to its end, [1, heads, K, D] each."""
        parts = states.split(self.lengths, dim=2)
        exact = torch.promote_types(states.dtype, torch.float32)
        shared = {prompt: parts[prompt].to(exact) for prompt in self.shared}   # so its gradients add up exactly
        return [torch.cat([shared[prompt].to(states.dtype), part], dim=2) if prompt >= 0 else part
                for part, prompt in zip(parts, self.prompts)]


def _bounds(lengths: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)


def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, *,
           layout: PackLayout | None = None, **kwargs: Any) -> tuple[Tensor, None]:
    """With SDPA: [1, heads, N, D] each -> [1, N, heads, D]. The vision tower is not causal: its images come one by one."""
    if layout is None or kwargs.get("is_causal") is False:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    rows = zip(query.split(layout.lengths, dim=2), layout.rows(key), layout.rows(value))
    return torch.cat([attend_row(module, q, k, v, kwargs) for q, k, v in rows], dim=1), None


def attend_row(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """The last tokens of a row [1, heads, Q, D] causally to all of it [1, heads, K, D] -> [1, Q, heads, D]."""
    length, before = query.shape[2], key.shape[2] - query.shape[2]
    if not before:
        return sdpa_attention_forward(module, query, key, value, None, **kwargs)[0]
    if query.is_cuda:
        return sdpa_attention_forward(module, query, key, value, causal_lower_right(length, before + length), **kwargs)[0]
    found = []
    for start in range(0, length, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, length)
        mask = torch.ones(end - start, before + end, dtype=torch.bool).tril(before + start)
        found.append(sdpa_attention_forward(
            module, query[:, :, start:end], key[:, :, :before + end], value[:, :, :before + end], mask, **kwargs)[0])
    return torch.cat(found, dim=1)


def attend_flash(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, *,
                 layout: PackLayout | None = None, **kwargs: Any) -> tuple[Tensor, None]:
    """With FlashAttention's varlen kernel, whose causal mask is aligned at the last query and key of each row."""
    if layout is None or kwargs.get("is_causal") is False:
        return flash_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if layout.shared:
        key, value = (torch.cat(layout.rows(states), dim=2) for states in (key, value))
    return flash_attention_forward(module, query, key, value, None, **layout.varlen, **kwargs)


def applies(config: PreTrainedConfig) -> bool:
    """Whether every layer of the language model attends to all of the row before a token."""
    kinds = getattr(config.get_text_config(), "layer_types", None) or ()
    return all(kind == "full_attention" for kind in kinds)


AttentionInterface.register(SDPA, attend)
AttentionInterface.register(FLASH, attend_flash)
