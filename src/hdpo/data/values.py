"""A row's Python values, the large ones read from the file itself instead of through the map.

A map is faulted in 4 KiB at a time: a picture of 0.7 MB costs some 170 faults, several times what one read of it costs. So the
map says where a large value lies, and `pread` gets it in one piece, and nothing around it. Where the place in the file is not
known for certain (no Linux, a copy that was replaced since), values come out of the map as they always did.
"""
from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.types as types

from hdpo.data.pages import TEXTS, WORTHWHILE, large_values


class MappedFile:
    """The file that a memory-mapped table begins in; valid as long as the table is held."""

    def __init__(self, table: pa.Table) -> None:
        self._handle, self._shift, self._places = -1, 0, range(0)
        address = next((buffer.address for column in table.columns for chunk in column.chunks for buffer in chunk.buffers()
                        if buffer is not None and buffer.size), 0)
        if sys.platform != "linux" or not address:
            return
        with contextlib.suppress(OSError):
            for line in Path("/proc/self/maps").read_text().splitlines():
                limits, _, offset, _, inode, *path = line.split(None, 5)
                places = range(*(int(limit, 16) for limit in limits.split("-")))
                if address in places and path:
                    handle = os.open(path[0], os.O_RDONLY)
                    if os.fstat(handle).st_ino != int(inode):
                        os.close(handle)
                        return
                    self._handle, self._shift, self._places = handle, places.start - int(offset, 16), places
                    return

    def __del__(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)

    def row(self, table: pa.Table) -> dict[str, Any]:
        """The only row of a slice of the table. Raises what pyarrow raises for values that Python can't hold."""
        if self._handle < 0 or any(column.num_chunks != 1 for column in table.columns):
            return table.to_pylist()[0]
        return {name: self._values(column.chunk(0))[0] for name, column in zip(table.column_names, table.columns, strict=True)}

    def touch(self, table: pa.Table) -> int:
        """Read the row's pages into memory; returns its bytes."""
        if self._handle < 0:
            return table.take([0]).nbytes
        for start, end in (place for column in table.columns for chunk in column.chunks for place in large_values(chunk)):
            self._read(start, end)
        return table.nbytes

    def _values(self, array: pa.Array) -> list[Any]:
        kind = array.type
        if types.is_struct(kind):
            fields = zip(*map(self._values, array.flatten()), strict=True) if kind.num_fields else [()] * len(array)
            names = [field.name for field in kind]
            return [dict(zip(names, some)) if valid else None for some, valid in zip(fields, array.is_valid().to_pylist())]
        if types.is_list(kind) or types.is_large_list(kind):
            inside = iter(self._values(array.flatten()))
            counts = array.value_lengths().to_pylist()
            return [None if count is None else [next(inside) for _ in range(count)] for count in counts]
        if kind in TEXTS and any(True for _ in large_values(array)):
            return [self._value(array.slice(place, 1)) for place in range(len(array))]
        return array.to_pylist()

    def _value(self, one: pa.Array) -> Any:
        """Of an array of one text or binary value. A scalar of it would be a copy out of the map."""
        start, end = next(large_values(one), (0, 0))
        data = self._read(start, end) if end - start >= WORTHWHILE and not one.null_count else b""
        if len(data) < max(1, end - start):      # small, null, not of this map, or a file that was cut since
            return one.to_pylist()[0]
        return data.decode() if types.is_string(one.type) or types.is_large_string(one.type) else data

    def _read(self, start: int, end: int) -> bytes:
        """What the map has at these addresses; b"" for others."""
        if start not in self._places or end - 1 not in self._places:
            return b""
        os.posix_fadvise(self._handle, start - self._shift, end - start, os.POSIX_FADV_WILLNEED)
        return os.pread(self._handle, end - start, start - self._shift)
