"""Runs that end early, by choice or by force, and go on: to the same weights, on as many ranks as there are then."""
from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from launching import Running, accelerate, command

from hdpo.state.folders import step_folders

pytestmark = [pytest.mark.engine, pytest.mark.slow]


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_models import save_tiny_qwen3_vl

    return save_tiny_qwen3_vl(tmp_path_factory.mktemp("model"))


def train_some(model: Path, run: Path, steps: int, ranks: int, dtype: str = "float32") -> dict:
    done = accelerate("tests/support/ranks/train_some.py", [str(model), str(run), str(steps), dtype], ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if "RESULT " in line)
    return json.loads(line.split("RESULT ", 1)[1])


def weights_of(run: Path, step: int) -> bytes:
    return (run / "run" / "checkpoints" / f"step_{step:06d}" / "model.safetensors").read_bytes()


def cut(run: Path, copy: Path, step: int) -> Path:
    """The run's folder as it was when `step` steps were saved and no more."""
    shutil.copytree(run, copy)
    for folder in step_folders(copy / "run")[step:]:
        shutil.rmtree(folder)
    return copy


def test_a_resumed_run_is_the_same_bit_for_bit_on_as_many_ranks_and_to_rounding_on_another_number(
        tiny_model: Path, tmp_path: Path) -> None:
    runs = {name: tmp_path / name for name in ("whole", "same", "fewer", "more")}
    whole = train_some(tiny_model, runs["whole"], 4, ranks=2)
    same = train_some(tiny_model, cut(runs["whole"], runs["same"], 2), 4, ranks=2)
    fewer = train_some(tiny_model, cut(runs["whole"], runs["fewer"], 2), 4, ranks=1)
    more = train_some(tiny_model, cut(runs["fewer"], runs["more"], 3), 5, ranks=2)    # goes on from one rank's state
    assert [run["start"] for run in (whole, same, fewer, more)] == [0, 2, 2, 3]
    assert same["losses"] == whole["losses"][2:] and same["draw"] == whole["draw"]
    assert weights_of(runs["same"], 4) == weights_of(runs["whole"], 4)
    assert fewer["losses"] == pytest.approx(whole["losses"][2:], rel=1e-5, abs=1e-6)
    assert more["losses"][:1] == pytest.approx(whole["losses"][3:], rel=1e-5, abs=1e-6)


def test_master_weights_behind_bf16_are_what_a_run_goes_on_from(tiny_model: Path, tmp_path: Path) -> None:
    whole = train_some(tiny_model, tmp_path / "whole", 4, 1, "bfloat16")
    same = train_some(tiny_model, cut(tmp_path / "whole", tmp_path / "same", 2), 4, 1, "bfloat16")
    assert same["losses"] == whole["losses"][2:]
    assert weights_of(tmp_path / "same", 4) == weights_of(tmp_path / "whole", 4)


def test_a_launcher_with_restarts_goes_on_by_itself_after_a_rank_is_killed(tiny_model: Path, tmp_path: Path) -> None:
    steps, checkpoints = 30, tmp_path / "run" / "run" / "checkpoints"
    arguments = [str(tiny_model), str(tmp_path / "run"), str(steps), "float32"]
    running = Running(command("tests/support/ranks/train_some.py", arguments, 2, "--max_restarts", "2"), tmp_path / "log", {})
    try:
        running.until((checkpoints / "step_000003").is_dir)
        running.rank(1).kill()
        assert running.end(400) == 0, running.text()[-3000:]
    finally:
        running.kill()
    (line,) = [line for line in running.text().splitlines() if "RESULT " in line]
    result = json.loads(line.split("RESULT ", 1)[1])
    assert result["start"] >= 3 and len(result["losses"]) == steps - result["start"]
    assert (checkpoints / f"step_{steps:06d}").is_dir()
