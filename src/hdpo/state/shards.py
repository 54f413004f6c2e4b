"""The training state on disk: one safetensors file per rank, written as a stream, read by name and range of elements.

A parameter of n elements is cut into `world` ranges of ceil(n / world), the last ones shorter (ZeRO-3's own cut without
its padding). What a rank needs is a range of a name, so a state written by any number of ranks is read by any other.
Beside each file lies a manifest with the size and CRC-32 of every file that rank wrote.
"""
from __future__ import annotations

import json
import math
import os
import random
import struct
import threading
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hdpo.errors import CheckpointError

CHUNK = 16 << 20
"""Bytes written and summed at once; both let other threads run meanwhile."""

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


def part_of(numel: int, world: int, rank: int) -> tuple[int, int]:
    """First and last-plus-one element of a parameter that `rank` of `world` holds; empty for ranks beyond its end."""
    size = -(-numel // world)
    return min(rank * size, numel), min((rank + 1) * size, numel)


@dataclass(slots=True)
class TrainingState:
    """One rank's part, on the host."""

    tensors: dict[str, Tensor]       # "master/NAME", "exp_avg/NAME", ...: [elements of `part_of`], contiguous
    numel: dict[str, int]            # NAME -> elements of the whole parameter
    counters: dict[str, int]         # optimizer and engine steps
    rng: dict[str, Any] = field(default_factory=dict)
    written: threading.Event = field(default_factory=threading.Event)   # nobody reads the tensors any more


def shard_path(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank:05d}.safetensors"


def manifest_path(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank:05d}.json"


# -- writing -------------------------------------------------------------------------------------------------------


def write_state(path: Path, state: TrainingState) -> None:
    """Write a safetensors file without a second copy in memory. Tensors are released as they are written."""
    info = json.dumps({"numel": state.numel, "counters": state.counters, "rng": state.rng})
    entries = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in state.tensors.items()]
    with path.open("wb") as file:
        file.write(safetensors_header(entries, {"format": "pt", "hdpo": info}))
        for name in list(state.tensors):
            write_tensor(file, state.tensors.pop(name))


def safetensors_header(entries: Iterable[tuple[str, torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """What stands before the data of tensors (name, dtype, shape), which follow in this order without gaps."""
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name, dtype, shape in entries:
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_tensor(file: IO[bytes], tensor: Tensor) -> None:
    """The bytes of a contiguous tensor on the host, in chunks."""
    data = tensor.view(-1).view(torch.uint8).numpy().data
    for start in range(0, len(data), CHUNK):
        file.write(data[start:start + CHUNK])


def write_manifest(folder: Path, root: Path, rank: int, files: Sequence[Path]) -> None:
    """Bring `files` to the disk, then name them with size and checksum in the rank's manifest, whole or not at all."""
    entries = {}
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
        entries[str(path.relative_to(root))] = [path.stat().st_size, checksum(path)]
    final = manifest_path(folder, rank)
    partial = final.with_suffix(".tmp")
    with partial.open("w") as file:
        json.dump({"files": entries}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, final)


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            value = zlib.crc32(chunk, value)
    return value


def sync_folder(folder: Path) -> None:
    """Bring a folder's list of names to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -- reading -------------------------------------------------------------------------------------------------------


def listed_files(folder: Path, root: Path, world: int) -> dict[str, tuple[int, int]]:
    """Relative path -> (bytes, CRC-32) of every file of a checkpoint. Raises CheckpointError naming a bad manifest."""
    files: dict[str, tuple[int, int]] = {}
    for rank in range(world):
        path = manifest_path(folder, rank)
        try:
            entries = json.loads(path.read_text())["files"]
        except (OSError, ValueError, KeyError) as exc:
            raise CheckpointError(f"{path} cannot be read ({exc})") from exc
        files |= {name: (size, crc) for name, (size, crc) in entries.items()}
    return files


def damage(root: Path, files: Mapping[str, tuple[int, int]]) -> str:
    """What is wrong with the first damaged file, or an empty string."""
    for name, (size, crc) in files.items():
        path = root / name
        try:
            found = path.stat().st_size
            if found != size:
                return f"{path} has {found} bytes and should have {size}"
            if checksum(path) != crc:
                return f"{path} has changed since it was written (its checksum differs)"
        except OSError as exc:
            return f"{path} cannot be read ({exc.strerror})"
    return ""


class ShardReader:
    """Ranges of parameters from the files of `world` ranks. Files are opened as they are needed."""

    def __init__(self, folder: Path, world: int) -> None:
        self.folder, self.world = folder, world
        self._files: dict[int, Any] = {}
        info = self._info(0)
        self.numel: dict[str, int] = info["numel"]
        self.counters: dict[str, int] = info["counters"]
        self.kinds = sorted({key.split("/", 1)[0] for key in self._open(0).keys()})

    def rng(self, rank: int) -> dict[str, Any] | None:
        """The generators of that rank; None when fewer ranks wrote the state."""
        return self._info(rank)["rng"] if rank < self.world else None

    def read(self, kind: str, name: str, start: int, end: int) -> Tensor:
        """Elements start..end-1 of, for example, kind "exp_avg" of a parameter. Raises CheckpointError."""
        parts = []
        for rank in range(self.world):
            low, high = part_of(self.numel[name], self.world, rank)
            if low < end and start < high:
                piece = self._open(rank).get_slice(f"{kind}/{name}")
                parts.append(piece[max(start, low) - low:min(end, high) - low])
        return torch.cat(parts) if parts else torch.empty(0)

    def _open(self, rank: int) -> Any:
        if rank not in self._files:
            path = shard_path(self.folder, rank)
            try:
                self._files[rank] = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as exc:
                raise CheckpointError(f"{path} cannot be read ({exc})") from exc
        return self._files[rank]

    def _info(self, rank: int) -> dict[str, Any]:
        return json.loads(self._open(rank).metadata()["hdpo"])


# -- generators ----------------------------------------------------------------------------------------------------


def rng_state() -> dict[str, Any]:
    """The generators of Python, NumPy and torch (CPU and this process's device), as JSON."""
    kind, keys, position, has_gauss, gauss = numpy.random.get_state(legacy=True)   # type: ignore
    state = {"python": random.getstate(), "numpy": [kind, [int(key) for key in keys], position, has_gauss, gauss],
             "torch": torch.get_rng_state().numpy().tobytes().hex()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state().numpy().tobytes().hex()
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), *rest))
    torch.set_rng_state(_bytes(state["torch"]))
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(_bytes(state["cuda"]))


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
