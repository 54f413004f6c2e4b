"""Weights on their way to Hugging Face files: the files' split, their contents, and how much waits for the disk.

With a ZeRO-3 policy on two ranks, every family: tests/agent/test_families.py; merged adapters: tests/adapters/test_lora.py.
"""
from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from hdpo.state.export import INDEX, SINGLE, Entry, ShardWriter, split, write_index

WEIGHTS = {
    "embed": torch.randn(30, 4), "a": torch.randn(10, 10).bfloat16(), "odd": torch.randn(3).bfloat16(),
    "b": torch.randn(5, 2, 5), "scalar": torch.randn(()), "head": torch.randn(30, 4), "turned": torch.randn(8, 3).T}


def entries(weights: dict[str, Tensor]) -> list[Entry]:
    return [Entry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in weights.items()]


def test_files_are_bounded_but_for_single_tensors_and_keep_the_order() -> None:
    files = split(entries(WEIGHTS), 410)
    assert list(files) == [f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)]
    assert [[entry.name for entry in held] for held in files.values()] == [
        ["embed"], ["a", "odd", "b", "scalar"], ["head"], ["turned"]]     # embed and head have 480 bytes
    assert list(split(entries(WEIGHTS), 4096)) == [SINGLE]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("shard_bytes", [1, 410, 4096])
def test_all_ranks_together_write_every_tensor_once_bit_for_bit(tmp_path: Path, world: int, shard_bytes: int) -> None:
    files = split(entries(WEIGHTS), shard_bytes)
    for rank in range(world):
        writer = ShardWriter(tmp_path, files, rank, world)
        for name, tensor in WEIGHTS.items():
            live = tensor.clone()
            writer.put(name, live)
            live.zero_()      # the next step changes the weights
        assert writer.finish() == [tmp_path / name for name in list(files)[rank::world]]
    write_index(tmp_path, files)
    found = {name: load_file(tmp_path / name) for name in files}
    merged = {key: tensor for held in found.values() for key, tensor in held.items()}
    assert sum(len(held) for held in found.values()) == len(WEIGHTS)
    assert all(torch.equal(merged[name], tensor) and merged[name].dtype == tensor.dtype for name, tensor in WEIGHTS.items())
    for name in files:
        with safe_open(tmp_path / name, "pt") as file:
            assert file.metadata() == {"format": "pt"}
    if len(files) > 1:
        index = json.loads((tmp_path / INDEX).read_text())
        assert all(key in found[file] for key, file in index["weight_map"].items())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in WEIGHTS.values())
    assert (tmp_path / INDEX).exists() == (len(files) > 1)


def test_what_waits_for_a_slow_disk_is_bounded_whatever_the_model_weighs(tmp_path: Path) -> None:
    """The file is a pipe that nobody reads for a while."""
    weights = {f"layer.{i}": torch.full((100,), float(i)) for i in range(50)}     # 400 bytes each
    os.mkfifo(tmp_path / SINGLE)
    writer = ShardWriter(tmp_path, {SINGLE: entries(weights)}, 0, 1, held_bytes=1000)
    gathering = threading.Thread(target=lambda: [writer.put(*item) for item in weights.items()])
    gathering.start()
    gathering.join(0.2)
    assert gathering.is_alive() and writer.peak == 800
    data = (tmp_path / SINGLE).read_bytes()
    gathering.join()
    writer.finish()
    assert writer.peak == 800 and len(data) > 50 * 400
    (tmp_path / "copy").write_bytes(data)
    assert torch.equal(load_file(tmp_path / "copy")["layer.49"], weights["layer.49"])


def test_a_tensor_larger_than_the_bound_is_held_alone(tmp_path: Path) -> None:
    weights = {"small": torch.ones(10), "large": torch.ones(1000), "other": torch.ones(10)}
    writer = ShardWriter(tmp_path, split(entries(weights), 100), 0, 1, held_bytes=100)
    for item in weights.items():
        writer.put(*item)
    assert len(writer.finish()) == 3 and writer.peak == 4000


def test_a_file_that_cannot_be_written_holds_nobody_up_and_is_raised_at_the_end(tmp_path: Path) -> None:
    (tmp_path / SINGLE).mkdir()
    weights = {f"layer.{i}": torch.ones(100) for i in range(50)}
    writer = ShardWriter(tmp_path, {SINGLE: entries(weights)}, 0, 1, held_bytes=1000)
    for item in weights.items():
        writer.put(*item)     # would wait for good
    with pytest.raises(IsADirectoryError):
        writer.finish()
