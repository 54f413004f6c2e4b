"""Which rows of a group begin with the very same prompt, so that a micro-batch can hold it once.

The rollouts of a group are told apart by what follows their prompt; until then they are the same tokens at the same
positions with the same images, and whatever the model computes there is the same for all (Prefix Grouper, arXiv 2506.05433,
shows it for text). Nothing is guessed: rows share when they are of one group, the ids of their prompts are equal, and so
are the images, which rows of a group hold as the very same tensors (see samples.PixelPool).
"""
from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence

from hdpo.types import Sample

SHORT = 8
"""A prompt so many times shorter than what follows it is computed with it: there is next to nothing to save."""


def sharing_rows(samples: Sequence[Sample], image_token_id: int | None, merge_size: int) -> list[int]:
    """For each row the first one with the same prompt, by index; -1 where no other row has it, or where it does not pay."""
    distinct: dict[int, list[int]] = {}      # group -> a row for each of its prompts, of which there should be one
    first = []
    for index, sample in enumerate(samples):
        following = len(sample.token_ids) - sample.prompt_length
        if sample.group < 0 or not 0 < following <= SHORT * sample.prompt_length:
            first.append(index)
            continue
        known = distinct.setdefault(sample.group, [])
        same = next((other for other in known if _same_prompt(samples[other], sample, image_token_id, merge_size)), None)
        if same is None:
            known.append(index)
        first.append(index if same is None else same)
    rows = Counter(first)
    return [index if rows[index] > 1 else -1 for index in first]


def _same_prompt(one: Sample, other: Sample, image_token_id: int | None, merge_size: int) -> bool:
    length = one.prompt_length
    if other.prompt_length != length or one.token_ids[:length] != other.token_ids[:length]:
        return False
    if one.vision is None or other.vision is None:
        return one.vision is other.vision or image_token_id not in one.token_ids[:length]
    images = prompt_images(one, image_token_id, merge_size)
    return (all(a is b for a, b in zip(one.vision.pixels[:images], other.vision.pixels[:images], strict=True))
            and one.vision.grid_thw[:images].equal(other.vision.grid_thw[:images]))


def prompt_images(sample: Sample, image_token_id: int | None, merge_size: int) -> int:
    """How many of the row's images its prompt shows."""
    if sample.vision is None:
        return 0
    ends = (sample.vision.grid_thw.prod(dim=1) // merge_size**2).cumsum(dim=0).tolist()
    return bisect_right(ends, sample.token_ids[:sample.prompt_length].count(image_token_id))   # type: ignore[arg-type]
