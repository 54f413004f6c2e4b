"""Nothing grows from step to step: 200 steps of sync, rollout and update hold no more at their end than early on."""
from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
from launching import accelerate
from tiny_models import save_tiny_qwen3_vl

MIB = 2**20


def memory(folder: Path, engine: str) -> dict[str, list[int]]:
    model = save_tiny_qwen3_vl(folder)
    done = accelerate("tests/support/ranks/grow.py", [str(model), "200", engine], ranks=1, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(next(line for line in done.stdout.splitlines() if "RESULT " in line).split("RESULT ", 1)[1])


def growth(sizes: list[int]) -> float:
    """Between the medians of steps 50 to 70 and of the last twenty: allocators have settled by then."""
    return statistics.median(sizes[-20:]) - statistics.median(sizes[50:70])


@pytest.mark.engine
@pytest.mark.long
def test_host_memory_does_not_grow_over_200_steps(tmp_path: Path) -> None:
    """One copy of the weights kept every tenth step would be 18 MiB."""
    assert growth(memory(tmp_path, "hf")["host"]) < 8 * MIB


@pytest.mark.gpu
@pytest.mark.slow
def test_device_memory_does_not_grow_over_200_steps_of_sleep_and_wake(tmp_path: Path) -> None:
    sizes = memory(tmp_path, "vllm")
    assert growth(sizes["device"]) <= 0 and growth(sizes["host"]) < 64 * MIB
