"""The weights as Hugging Face shard files, written while they are gathered, in memory that does not grow with the model.

Which tensor goes into which file is known before the first is gathered, so every file is one stream. Files are dealt over
the ranks, which write theirs in threads of their own, at the same time. What waits for the disk is a copy, because the
weights change with the next step, and is bounded: a model of up to `world * SHARD_BYTES` bytes is copied at once and
written while training goes on; a larger one makes the gathering wait for the disks.
"""
from __future__ import annotations

import json
import math
import queue
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hdpo.state.shards import safetensors_header, write_tensor

SHARD_BYTES = 2 << 30
"""Largest file, unless a single tensor is larger, and the most that a rank holds of what is not on the disk yet."""

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor as a folder holds it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def split(entries: Sequence[Entry], shard_bytes: int = SHARD_BYTES) -> dict[str, list[Entry]]:
    """File name -> what it holds, in order: model.safetensors, or model-00001-of-0000N.safetensors and so on."""
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{number:05d}-of-{len(shards):05d}.safetensors": shard for number, shard in enumerate(shards, 1)}


def write_index(folder: Path, files: Mapping[str, Sequence[Entry]]) -> None:
    """The file that says where each tensor is; a single file needs none."""
    if len(files) > 1:
        size = sum(entry.nbytes for entries in files.values() for entry in entries)
        places = {entry.name: file for file, entries in files.items() for entry in entries}
        text = json.dumps({"metadata": {"total_size": size}, "weight_map": places}, indent=2, sort_keys=True)
        (folder / INDEX).write_text(text + "\n")


class ShardWriter:
    """Writes every `world`-th of `files` into `folder`, from the `rank`-th on. Not collective.

    `put` takes all tensors in the order of `files` and keeps copies of this rank's. `peak` is the most it held, bytes: at
    most `held_bytes`, or the largest tensor.
    """

    def __init__(self, folder: Path, files: Mapping[str, Sequence[Entry]], rank: int, world: int,
                 held_bytes: int = SHARD_BYTES) -> None:
        self._files = {folder / name: files[name] for name in list(files)[rank::world]}
        self._mine = {entry.name for entries in self._files.values() for entry in entries}
        self._limit, self._held, self.peak = held_bytes, 0, 0
        self._room = threading.Condition()
        self._error: Exception | None = None
        self._copies: queue.SimpleQueue[tuple[str, Tensor]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="hdpo-export", daemon=True)
        self._thread.start()

    def put(self, name: str, tensor: Tensor) -> None:
        """Copy a tensor to the host if this rank writes it; waits for the disk while too much is held."""
        if name not in self._mine:
            return
        with self._room:
            self._room.wait_for(lambda: self._error or not self._held or self._held + tensor.nbytes <= self._limit)
            if self._error:      # `finish` raises it; until then the other ranks' gathering must go on
                return
            self._held += tensor.nbytes
            self.peak = max(self.peak, self._held)
        self._copies.put((name, torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)))

    def finish(self) -> list[Path]:
        """Wait until this rank's files are written; returns them. Raises what writing raised."""
        self._thread.join()
        if self._error:
            raise self._error
        return list(self._files)

    def _run(self) -> None:
        try:
            for path, entries in self._files.items():
                with path.open("wb") as file:
                    known = [(entry.name, entry.dtype, entry.shape) for entry in entries]
                    file.write(safetensors_header(known, {"format": "pt"}))
                    for entry in entries:
                        name, tensor = self._copies.get()
                        assert (name, tensor.shape) == (entry.name, entry.shape), f"{name} came instead of {entry.name}"
                        write_tensor(file, tensor)
                        self._let_go(tensor.nbytes)
        except Exception as exc:   # noqa: BLE001  a thread's boundary: `finish` raises it
            with self._room:
                self._error = exc
                self._room.notify_all()

    def _let_go(self, nbytes: int) -> None:
        with self._room:
            self._held -= nbytes
            self._room.notify_all()
