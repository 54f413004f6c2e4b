"""Lessons as tensors: pictures drawn in batches at the model's own resolution, token ids, labels and M-RoPE positions."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from hdpo.toyworld.glyphs import Glyphs
from hdpo.toyworld.primitives import HALF, Lesson, Picture
from hdpo.toyworld.tokenizer import IMAGE_TOKENS, MERGE, PATCH, TEMPORAL, VIEW

IMAGE = "<|vision_start|>" + "<|image_pad|>" * IMAGE_TOKENS + "<|vision_end|>"


def _paste(canvas: torch.Tensor, pictures: list[Picture], glyphs: Glyphs, side: int, tiny: bool) -> None:
    """Blend all stamps whose cell is `side` wide into canvas [pictures, 3, VIEW, VIEW]."""
    found = [(i, s) for i, p in enumerate(pictures) for s in p.stamps if s.cell[2] == side and (s.size < 6) == tiny]
    if not found:
        return
    ink = torch.from_numpy(glyphs.ink[[s.glyph for _, s in found]])[:, None]
    if tiny:   # two pixels: average instead of sampling between pixels
        ink = F.avg_pool2d(ink, 4)
    local = torch.tensor([[s.centre[0] - s.cell[0], s.centre[1] - s.cell[1], s.size, s.angle] for _, s in found])
    step = torch.arange(side) + 0.5
    y, x = torch.meshgrid(step, step, indexing="ij")
    dx, dy = x - local[:, 0, None, None], y - local[:, 1, None, None]
    cos, sin = torch.cos(local[:, 3])[:, None, None], torch.sin(local[:, 3])[:, None, None]
    half = local[:, 2, None, None] / 2
    grid = torch.stack([(dx * cos + dy * sin) / half, (dy * cos - dx * sin) / half], -1)
    mask = F.grid_sample(ink, grid, "bilinear" if tiny else "bicubic", "zeros", False).clamp(0, 1)
    for (i, s), m in zip(found, mask, strict=True):
        area = canvas[i, :, s.cell[1]:s.cell[1] + side, s.cell[0]:s.cell[0] + side]
        area += (torch.tensor(pictures[i].ink)[:, None, None] - area) * m


def draw_batch(pictures: list[Picture], glyphs: Glyphs) -> torch.Tensor:
    """Pictures as uint8 [pictures, 3, VIEW, VIEW]."""
    canvas = torch.tensor([p.paper for p in pictures])[:, :, None, None].repeat(1, 1, VIEW, VIEW)
    for i, p in enumerate(pictures):
        if p.blocks is not None:
            blocks = torch.from_numpy(p.blocks).float().permute(2, 0, 1)
            rows = blocks.repeat_interleave(VIEW // 4, 1).repeat_interleave(VIEW // 4, 2)
            canvas[i] = rows
            if p.plate:
                canvas[i, :, HALF:] = 1.0
    for side, tiny in ((HALF, False), (HALF, True), (VIEW, False)):
        _paste(canvas, pictures, glyphs, side, tiny)
    return (canvas * 255).round().to(torch.uint8)


def patchify(images: torch.Tensor) -> torch.Tensor:
    """uint8 [N, 3, VIEW, VIEW] -> the processor's pixel_values [N * patches, 3 * TEMPORAL * PATCH * PATCH]."""
    n, cells = len(images), VIEW // PATCH // MERGE
    x = (images.float() / 255 - 0.5) / 0.5
    x = x.reshape(n, 3, cells, MERGE, PATCH, cells, MERGE, PATCH).permute(0, 2, 5, 3, 6, 1, 4, 7)
    x = x.unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, TEMPORAL, -1, -1)
    return x.reshape(n * (VIEW // PATCH) ** 2, 3 * TEMPORAL * PATCH * PATCH)


def positions(ids: list[int], vision_start: int) -> np.ndarray:
    """M-RoPE positions [3, L]: text counts up, an image spans time x rows x columns and advances by its side."""
    side = VIEW // PATCH // MERGE
    row, column = np.repeat(np.arange(side), side), np.tile(np.arange(side), side)
    parts, start, at = [], 0, 0
    array = np.asarray(ids)
    for where in np.flatnonzero(array == vision_start):
        text = where + 1 - start
        parts.append(np.tile(np.arange(at, at + text), (3, 1)))
        at += text
        parts.append(at + np.stack([np.zeros_like(row), row, column]))
        at += side
        start = where + 1 + IMAGE_TOKENS
    parts.append(np.tile(np.arange(at, at + len(array) - start), (3, 1)))
    return np.concatenate(parts, 1)


@dataclass
class LessonBatch:
    """Right-padded rows: input_ids, labels [B, L] (labels -100 where not trained), position_ids [3, B, L], pixels."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    pixel_values: torch.Tensor
    num_images: int


def collate(lessons: list[Lesson], tokenizer: Any, glyphs: Glyphs) -> LessonBatch:
    texts = ["".join(f"<|im_start|>user\n{u.replace('{image}', IMAGE)}<|im_end|>\n<|im_start|>assistant\n{a}<|im_end|>\n"
                     for u, a in lesson.turns) for lesson in lessons]
    pictures = [p for lesson in lessons for p in lesson.pictures]
    rows = [e.ids for e in tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)]
    start, end, vision = (tokenizer.convert_tokens_to_ids(t) for t in ("<|im_start|>", "<|im_end|>", "<|vision_start|>"))
    assistant = tokenizer.encode("assistant")[0]
    length = max(map(len, rows))
    ids = np.full((len(rows), length), tokenizer.pad_token_id)
    labels = np.full((len(rows), length), -100)
    where = np.zeros((3, len(rows), length), dtype=np.int64)
    for b, row in enumerate(rows):
        ids[b, :len(row)] = row
        where[:, b, :len(row)] = positions(row, vision)
        trained = False
        for t, token in enumerate(row):
            if trained:
                labels[b, t] = token
                trained = token != end
            elif t >= 2 and row[t - 1] == assistant and row[t - 2] == start:
                trained = True   # this token is the newline after the role
    return LessonBatch(torch.from_numpy(ids), torch.from_numpy(labels), torch.from_numpy(where),
                       patchify(draw_batch(pictures, glyphs)) if pictures else torch.empty(0), len(pictures))
