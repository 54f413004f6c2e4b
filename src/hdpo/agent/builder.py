"""The append-only token record of one trajectory, in two streams that grow together.

compact   one placeholder per image: what the engine is given, it expands images itself
expanded  one placeholder per image token: what is trained

Nothing is ever decoded and encoded again: the compact ids of a turn's prompt begin with those of the turn before.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hdpo.types import Completion

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, slots=True)
class Segment:
    """Given tokens (a prompt or an observation) and the bounded images among them, in order.

    `image_keys[i]` names the content of `images[i]`, so that engines need not hash pixels again; `files[i]` is the encoded file
    that it came as.
    """

    compact_ids: list[int]
    expanded_ids: list[int]
    images: tuple[Image, ...] = ()
    image_keys: tuple[str, ...] = ()
    files: tuple[bytes, ...] = ()


@dataclass(slots=True)
class TrajectoryBuilder:
    """token_ids, mask, log_probs and versions (all [L], expanded) have equal length after every append."""

    compact_ids: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    images: list[Image] = field(default_factory=list)
    image_keys: list[str] = field(default_factory=list)
    files: list[bytes] = field(default_factory=list)

    def append_given(self, segment: Segment) -> None:
        """Tokens the policy is shown: mask 0, log-prob 0, version -1."""
        count = len(segment.expanded_ids)
        self.compact_ids += segment.compact_ids
        self.token_ids += segment.expanded_ids
        self.mask += [0] * count
        self.log_probs += [0.0] * count
        self.versions += [-1] * count
        self.images += segment.images
        self.image_keys += segment.image_keys
        self.files += segment.files

    def append_sampled(self, completion: Completion) -> None:
        """Tokens the policy chose, stop token included: mask 1. Raises ValueError if a log-prob is missing."""
        count = len(completion.token_ids)
        if len(completion.log_probs) != count:
            raise ValueError(f"the engine returned {count} tokens but {len(completion.log_probs)} log-probs")
        self.compact_ids += completion.token_ids
        self.token_ids += completion.token_ids
        self.mask += [1] * count
        self.log_probs += completion.log_probs
        self.versions += [completion.weight_version] * count
