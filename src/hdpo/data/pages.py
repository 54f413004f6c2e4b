"""What the kernel is told about a mapped copy, and where in it large values lie.

A page fault makes it read ahead as far as the disk's setting says, up to megabytes (8 on common cloud disks), on the guess
that reading goes on. Of shuffled rows that is read for nothing: several times their own bytes. So the map is said to be read at
random; large values are read from the file (values.py). Advice alone: where it can't be given (no Linux) rows are the same.
"""
from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
import pyarrow.types as types

WORTHWHILE = 64 << 10
"""Smallest value that is read by itself, bytes."""
_RANDOM = 1
TEXTS = (pa.binary(), pa.string(), pa.large_binary(), pa.large_string())


@lru_cache(maxsize=1)
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def read_at_random(file: Path) -> None:
    """Say so of all maps of the file in this process."""
    if sys.platform != "linux":
        return
    path = os.path.realpath(file)
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/maps").read_text().splitlines():
            if line.endswith(path):
                first, _, last = line.split(" ", 1)[0].partition("-")
                start, end = int(first, 16), int(last, 16)
                _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _RANDOM)


def large_values(array: pa.Array) -> Iterator[tuple[int, int]]:
    """(address, address behind the end) of the bytes of text and binary values, those of neighbours together."""
    kind = array.type
    if not len(array):
        return
    if types.is_struct(kind):
        for child in array.flatten():
            yield from large_values(child)
    elif types.is_list(kind) or types.is_large_list(kind):
        yield from large_values(array.flatten())
    elif kind in TEXTS:
        _, offsets, data = array.buffers()
        if offsets is None or data is None:
            return
        view = memoryview(offsets).cast("b").cast("q" if types.is_large_binary(kind) or types.is_large_string(kind) else "i")
        first, last = view[array.offset], view[array.offset + len(array)]
        if last - first >= WORTHWHILE:
            yield data.address + first, data.address + last
