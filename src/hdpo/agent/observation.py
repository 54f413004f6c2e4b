"""How an observation that is too long is shortened: whole images first, then the middle of the text. Plain lists."""
from __future__ import annotations

from collections.abc import Callable, Sequence


def images_room(text_tokens: int, max_tokens: int) -> int:
    """Tokens that images may take beside the text's share (a quarter if it needs it)."""
    return max_tokens - min(text_tokens, max_tokens // 4)


def images_that_fit(costs: Sequence[int], room: int, max_images: int) -> list[bool]:
    """Which images are kept: in order, each whole, while they fit."""
    kept: list[bool] = []
    for cost in costs:
        keep = sum(kept) < max_images and cost <= room
        room -= cost if keep else 0
        kept.append(keep)
    return kept


def cut_middle(pieces: list[list[int]], room: int, marker: Callable[[int], list[int]]) -> list[list[int]]:
    """Shorten token lists that follow one another to `room` tokens in all: head and tail stay, marker(n) says that n were
    cut between them. The number of pieces stays, so what stands between them keeps its place."""
    total = sum(map(len, pieces))
    if total <= room:
        return pieces
    text = max(0, room - len(marker(total)))    # no later count has more digits than this one
    tail = text // 2
    head = text - tail
    sign = marker(total - text)[:max(0, room)]
    shortened, start = [], 0
    for piece in pieces:
        end = start + len(piece)
        kept = piece[:max(0, head - start)]
        if start <= head < end:
            kept = kept + sign
        shortened.append(kept + piece[max(0, total - tail - start):])
        start = end
    return shortened
