"""What differs between model families, in one place: their control words, their positions, how folders store weights.

Everything else (chat, packing, ZeRO-3, weight sync, engines) is written once and asks here. A new family is one entry in
`FAMILIES`, under the `model_type` of its config.json, and one line in tests/support/tiny_models.py, which puts a tiny model of it
through the tests all families pass: rendering, packing, positions, sync and parity (tests/agent/test_families.py). It must be

- loadable by transformers as `model.model` (the backbone) and `model.lm_head`, and by vLLM from the same folder;
- trained with a chat format whose turns end with one token, and with `</tool_call>` as one token that is not special;
- if it sees: fed one run of placeholder tokens per image, of grid.prod() / merge_size**2 tokens, by an image processor
  that resizes as Qwen's does (multiples of patch_size * merge_size, within a range of pixels).
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Positions = Callable[[Tensor, Tensor | None, int | None, int], Tensor]
"""(token_ids [L], grid_thw [images, 3], image_token_id, merge_size) -> [4, L]: text positions, then the model's own."""


def multimodal_positions(token_ids: Tensor, grid_thw: Tensor | None, image_token_id: int | None, merge_size: int) -> Tensor:
    """Positions [4, L] of one row: its text positions, then (temporal, height, width) as Qwen2-VL to Qwen3-VL count them.

    Text advances all three together; an image spans its own grid and advances by its longer side in merged patches.
    Images only. Equal to the model's `get_rope_index` (tested).
    """
    length = len(token_ids)
    text = torch.arange(length)
    if image_token_id is None or grid_thw is None or not len(grid_thw):
        return text.expand(4, length).clone()
    positions = torch.empty(3, length, dtype=torch.int64)
    is_image = token_ids.eq(image_token_id)
    cursor = start = 0
    for t, h, w in grid_thw.tolist():
        first = start + int(is_image[start:].to(torch.int8).argmax())
        positions[:, start:first] = torch.arange(first - start) + cursor
        cursor += first - start
        h, w = h // merge_size, w // merge_size
        grid = torch.meshgrid(torch.arange(t), torch.arange(h), torch.arange(w), indexing="ij")
        end = first + t * h * w
        if not bool(is_image[first:end].all()) or end > length:
            raise ValueError(f"image tokens and grid disagree: {t}x{h}x{w} tokens expected at position {first}")
        positions[:, first:end] = torch.stack(grid).reshape(3, -1) + cursor
        cursor += max(h, w)
        start = end
    positions[:, start:] = torch.arange(length - start) + cursor
    return torch.cat([text[None], positions])


@dataclass(frozen=True, slots=True)
class Family:
    """One family; the defaults are those of the Qwen models since Qwen2-VL (ChatML).

    image_words        what surrounds and holds an image's place: (start, placeholder, end); None for text-only models
    end_of_turn        the token that ends every turn
    observation_words  what stands before and after an observation: the next user turn
    positions          of a row with images
    stored_transposed  endings of parameter names whose last two axes a folder holds swapped against transformers' modules
    """

    name: str
    image_words: tuple[str, str, str] | None = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
    end_of_turn: str = "<|im_end|>"
    observation_words: tuple[str, str] = ("<|im_end|>\n<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n")
    positions: Positions = multimodal_positions
    stored_transposed: tuple[str, ...] = ()

    def as_stored(self, name: str, tensor: Tensor) -> Tensor:
        """The parameter as a Hugging Face folder holds it, which is what vLLM's loaders read."""
        return tensor.transpose(-1, -2) if name.endswith(self.stored_transposed) else tensor


FAMILIES = {
    "qwen2_5_vl": Family("Qwen2.5-VL"),
    "qwen3_vl": Family("Qwen3-VL"),
    # transformers 5 keeps all experts of a layer in two parameters [E, out, in]; the published folders hold [E, in, out]
    "qwen3_vl_moe": Family("Qwen3-VL MoE", stored_transposed=(".experts.gate_up_proj", ".experts.down_proj")),
    "qwen3": Family("Qwen3", image_words=None),
}
"""By `model_type` of config.json."""
