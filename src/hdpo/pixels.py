"""Pictures as uint8 patches of one frame, and what the model takes of them, bit for bit as its image processor makes it.

The processor's tensor holds every channel as float32, and a picture's single frame twice (Qwen's vision tower sees frames in
pairs): 24 bytes a pixel. The patches kept here take 3; `expand` scales and repeats them on the device, per micro-batch.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CHUNK_PATCHES = 16384
"""Patches that are scaled at once in float32, so that expanding holds little besides its result."""


class PixelScale(NamedTuple):
    """From a pixel's value v, 0 to 255, to the model's: (v - mean[c]) / std[c], all in float32."""

    mean: tuple[float, ...]    # [channels]
    std: tuple[float, ...]     # [channels]
    frames: int                # how often a patch repeats the picture's only frame


def frame_patches(image: Tensor, side: int, merge: int) -> Tensor:
    """[height, width, channels] -> [patches, channels * side * side], the merge x merge patches of one image token together."""
    height, width, channels = image.shape
    block = side * merge
    blocks = image.reshape(height // block, merge, side, width // block, merge, side, channels)
    return blocks.permute(0, 3, 1, 4, 6, 2, 5).reshape(-1, channels * side * side)


def expand(frames: Tensor, scale: PixelScale, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 [patches, channels * side * side] -> [patches, channels * frames * side * side] of `dtype`, on the same device."""
    channels = len(scale.mean)
    held = frames.view(len(frames), channels, 1, -1)
    mean, std = (torch.tensor(part, dtype=torch.float32, device=held.device).view(1, channels, 1, 1)
                 for part in (scale.mean, scale.std))
    result = torch.empty(len(frames), channels, scale.frames, held.shape[-1], dtype=dtype, device=held.device)
    for first in range(0, len(frames), CHUNK_PATCHES):
        part = slice(first, first + CHUNK_PATCHES)
        result[part] = held[part].to(torch.float32).sub_(mean).div_(std)
    return result.flatten(1)
