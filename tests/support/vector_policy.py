"""A policy whose whole state is one vector, and runs of it: for tests of what checkpoints do, not what is in them."""
from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import torch

from hdpo.config import Config
from hdpo.ranks.world import World
from hdpo.state.checkpoint import Checkpoints
from hdpo.state.folders import step_folders
from hdpo.state.shards import ShardReader, TrainingState


class VectorPolicy:
    """A policy whose whole state is one vector. `gate` holds back the writing of its weights."""

    def __init__(self, value: float = 0.0, elements: int = 5) -> None:
        self.world, self.vector = World(), torch.full((elements,), value)
        self.gate = threading.Event()
        self.gate.set()

    def export_model(self, folder: Path) -> Callable[[], list[Path]]:
        def write() -> list[Path]:
            assert self.gate.wait(30)
            (folder / "model.safetensors").write_text("weights")
            return [folder / "model.safetensors"]
        return write

    def snapshot_state(self) -> TrainingState:
        return TrainingState({"master/w": self.vector.clone()}, {"w": len(self.vector)}, {"optimizer_steps": 1})

    def restore_state(self, reader: ShardReader) -> None:
        self.vector = reader.read("master", "w", 0, reader.numel["w"])


def config(tmp_path: Path, **sections: dict) -> Config:
    return Config.model_validate({"run": {"folder": str(tmp_path), "name": "r"}, "checkpoint": {"keep": 2}, **sections})


def save(c: Config, step: int, value: float = 0.0, data: dict | None = None, **numbers: float) -> Path:
    with Checkpoints(VectorPolicy(value), c) as checkpoints:
        checkpoints.note(step, numbers)
        folder = checkpoints.save(step, data or {})
        checkpoints.finish()
    return folder


def resume(c: Config) -> tuple[int, dict | None, float]:
    """(steps done, data position, value of the restored vector)"""
    policy = VectorPolicy(-1.0)
    with Checkpoints(policy, c) as checkpoints:
        step, data = checkpoints.resume()
    return step, data, float(policy.vector[0])


def names(c: Config) -> list[str]:
    return [folder.name for folder in step_folders(c.run.path)]
