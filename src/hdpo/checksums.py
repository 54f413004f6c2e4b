"""Exact checksums of weights that do not depend on the order of their elements.

A checksum is the sum of a tensor's bit patterns, read as integers. Engines fuse, transpose and stack what they are sent;
the sum over a fused tensor is the sum over its parts, so both sides can be compared without undoing any of it. A stale,
skipped or damaged tensor changes the sum. What a sum can't see is a permutation within a tensor: the parity canary does.
Imports torch only.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

_SLICE = 1 << 24     # elements: 128 MiB as int64
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Checksum(NamedTuple):
    """Sum of bit patterns modulo 2**64, number of elements, and the type the bits are of."""

    total: int
    numel: int
    dtype: torch.dtype


Sums = dict[str, Checksum]


class Comparison(NamedTuple):
    """Names that differ, and the share of sent elements that could be compared."""

    wrong: list[str]
    share: float


def bit_sum(tensor: Tensor) -> Tensor:
    """0-dim int64 on the tensor's device; wraps around. In slices: torch's sum first copies what it sums to int64."""
    bits = tensor.detach().view(_INTEGERS[tensor.element_size()])
    bits = bits.view(-1) if bits.is_contiguous() else bits
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for part in bits.split(max(1, _SLICE * len(bits) // max(1, bits.numel()))):
        total += part.sum(dtype=torch.int64)
    return total


class Watch:
    """Sums tensors on their way through, without waiting for the device until `sums` is read."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor, int, torch.dtype]] = {}

    def note(self, name: str, tensor: Tensor) -> None:
        self._sums[name] = bit_sum(tensor), tensor.numel(), tensor.dtype

    def passing(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            self.note(name, tensor)
            yield name, tensor

    def sums(self) -> dict[str, Checksum]:
        """By name; one transfer."""
        if not self._sums:
            return {}
        totals = torch.stack([total for total, _, _ in self._sums.values()]).tolist()
        return {name: Checksum(total, numel, dtype)
                for total, (name, (_, numel, dtype)) in zip(totals, self._sums.items())}


def compare(sent: Mapping[str, Checksum], held: Iterable[tuple[str, Tensor]], key: Callable[[str], str] = lambda name: name,
            gather: Callable[[Sums], list[Sums]] = lambda sums: [sums]) -> Comparison:
    """Compare what was sent with the tensors an engine holds, where `key` gives the parts of a fused tensor one name.

    `gather` turns this rank's sums into those of all ranks that hold a part of the engine: where this one holds less of a
    tensor than was sent, all parts are added up. A tensor with other elements than were sent (packed, padded or copied by
    the engine) counts as not comparable, unless the sums are equal all the same: padding is zeros.
    """
    wanted = _grouped((key(name), checksum) for name, checksum in sent.items())
    watch = Watch()
    for name, tensor in held:
        if key(name) in wanted:
            watch.note(name, tensor.to(wanted[key(name)].dtype))
    have = _grouped((key(name), checksum) for name, checksum in watch.sums().items())
    everywhere = _grouped(item for part in gather(have) for item in part.items())
    wrong, compared = [], 0
    for name, checksum in wanted.items():
        other = have.get(name)
        if other is not None and other.numel < checksum.numel:
            other = everywhere[name]
        if other is None or other.numel < checksum.numel or other.numel != checksum.numel and other.total != checksum.total:
            continue
        compared += checksum.numel
        wrong += [name] if other.total != checksum.total else []
    return Comparison(wrong, compared / max(1, sum(checksum.numel for checksum in wanted.values())))


def _grouped(items: Iterable[tuple[str, Checksum]]) -> dict[str, Checksum]:
    groups: dict[str, Checksum] = {}
    for name, (total, numel, dtype) in items:
        before = groups.get(name, Checksum(0, 0, dtype))
        groups[name] = Checksum((before.total + total + 2**63) % 2**64 - 2**63, before.numel + numel, before.dtype)
    return groups
