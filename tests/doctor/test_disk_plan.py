"""The disk plan counts what a run really writes, refuses one that can't save twice, and names a setting that fits."""
from __future__ import annotations

import json
import re
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
from tiny_models import save_tiny_qwen3_vl
from vector_policy import VectorPolicy
from vector_policy import config as vector_config

from hdpo.config import Config, ModelConfig
from hdpo.config.file import load_config
from hdpo.doctor import disk_plan
from hdpo.doctor.disk_plan import GIB, check, plan
from hdpo.doctor.doctor import dry_run
from hdpo.doctor.doctor import main as doctor
from hdpo.doctor.shapes import Shapes, read_shapes
from hdpo.errors import ConfigError
from hdpo.state.checkpoint import Checkpoints

BILLION = Shapes(parameters=10**9, trained=10**9, head_trained=True, largest_layer=10**7, vocabulary=1000, hidden=64, layers=2,
                 heads=2, kv_heads=2, head_dim=32, mlp=128)
ONE = 14 * 10**9     # bytes of its checkpoint: bf16 weights, fp32 weights and two moments


def configured(**values: Any) -> Config:
    return load_config(None, [f"{key.replace('__', '.')}={value}" for key, value in values.items()], environment={})


def test_a_checkpoint_is_the_tensors_of_the_folder_and_twelve_bytes_for_each_trained_parameter(tmp_path: Path) -> None:
    folder = save_tiny_qwen3_vl(tmp_path / "model")
    data = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = {name: entry for name, entry in json.loads(data[8:8 + length]).items() if name != "__metadata__"}
    assert {entry["dtype"] for entry in header.values()} == {"F32"}
    weights = len(data) - 8 - length
    config = configured(run__folder=tmp_path)
    assert plan(config, read_shapes(ModelConfig(path=str(folder))), 4).checkpoint == weights + 12 * weights // 4
    text = sum(entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in header.items() if "visual" not in name)
    frozen = read_shapes(ModelConfig(path=str(folder), freeze=["*visual*"]))
    assert plan(config, frozen, 2).checkpoint == weights // 2 + 12 * text // 4


@pytest.mark.parametrize("settings", [dict(keep=2), dict(keep=1), dict(keep=0), dict(keep=5), dict(keep=2, best="m"),
                                      dict(keep=1, best="m", weights_every_steps=1), dict(keep=2, every_steps=3)])
def test_no_more_checkpoints_are_there_at_once_than_are_planned(tmp_path: Path, settings: dict[str, Any]) -> None:
    config = vector_config(tmp_path, **{"run": {"folder": str(tmp_path), "name": "r"}, "optim": {"steps": 7},
                                        "checkpoint": {"every_steps": 1, **settings}})
    most = 0
    with Checkpoints(VectorPolicy(), config) as checkpoints:
        for step in range(1, 8):
            checkpoints.note(step, {"m": -step})      # the first stays the best
            checkpoints.save_due(step, {})
            there = {path.name.removeprefix(".partial_") for path in (config.run.path / "checkpoints").glob("*step_*")}
            most = max(most, len(there))
            checkpoints.finish()
        weights = len(list((config.run.path / "weights").glob("step_*")))
    made = plan(config, BILLION, 2, sft=True)
    assert most <= made.checkpoints <= most + 1       # whether a write has ended when we look is chance
    assert made.parts["weights"] == weights * 2 * 10**9


@pytest.mark.parametrize("steps, needed", [(50, 1), (51, 2), (5000, 2)])
def test_a_run_that_cannot_save_twice_is_refused_and_one_that_can_is_warned_at_most(
        tmp_path: Path, steps: int, needed: int) -> None:
    config = configured(run__folder=tmp_path, optim__steps=steps, checkpoint__every_steps=50)
    with pytest.raises(ConfigError, match="^disk: .* a checkpoint has 13.0 GiB.*set run.folder to a larger disk$"):
        check(config, BILLION, 2, sft=True, free=needed * ONE - 1)
    _, warning = check(config, BILLION, 2, sft=True, free=needed * ONE)
    assert bool(warning) == (steps == 5000)           # three at once, two fit


@pytest.mark.parametrize("values, free", [
    (dict(checkpoint__keep=8), 5 * ONE), (dict(checkpoint__keep=0, optim__steps=5000), 4 * ONE),
    (dict(log__rollouts_gib=400, run__spool_gib=10), 3 * ONE + 200 * GIB), (dict(log__rollouts_gib=0), 3 * ONE + 60 * GIB),
    (dict(checkpoint__weights_every_steps=1), 3 * ONE + 150 * GIB), (dict(run__spool_gib=0, log__rollouts_every=0), 4 * ONE),
    (dict(checkpoint__keep=9, checkpoint__best="eval/accuracy", run__spool_gib=300, log__rollouts_gib=300), 6 * ONE)])
def test_the_setting_that_the_warning_names_fits(tmp_path: Path, values: dict[str, Any], free: int) -> None:
    values = dict(run__folder=tmp_path, optim__steps=400) | values
    made, warning = check(configured(**values), BILLION, 2, free=free)
    assert made.to_come > free and "\n" not in warning
    named = re.search(r"it fits with (.+), or run\.folder on a larger disk$", warning)
    assert named, warning
    change = dict(part.split("=") for part in named[1].split(", "))
    changed = configured(**values | {field.replace(".", "__"): value for field, value in change.items()})
    after = plan(changed, BILLION, 2, free=free)
    assert after.fits() and set(change) <= {"checkpoint.keep", "log.rollouts_gib", "log.rollouts_every", "run.spool_gib",
                                            "checkpoint.weights_every_steps"}


def test_where_no_setting_helps_the_disk_alone_is_named(tmp_path: Path) -> None:
    config = configured(run__folder=tmp_path, checkpoint__keep=1, checkpoint__best="-eval/sft_loss", optim__steps=400)
    _, warning = check(config, BILLION, 2, sft=True, free=2 * ONE)
    assert warning.endswith("it fits with run.folder on a larger disk")


def test_what_a_resumed_run_has_written_is_not_asked_for_again(tmp_path: Path) -> None:
    config = configured(run__folder=tmp_path, run__name="r", checkpoint__every_steps=10, optim__steps=400)
    fresh = plan(config, BILLION, 2, sft=True)
    for step in (10, 20):
        (tmp_path / "r" / "checkpoints" / f"step_{step:06d}").mkdir(parents=True)
    with (tmp_path / "r" / "checkpoints" / "step_000020" / "model.safetensors").open("wb") as file:
        file.truncate(ONE)       # sparse
    resumed, _ = check(config, BILLION, 2, sft=True, free=2 * ONE)
    assert (fresh.at_least, resumed.at_least) == (2 * ONE, ONE) and resumed.to_come == fresh.to_come - ONE


def test_spool_and_dumps_are_what_their_settings_allow_and_a_small_runs_are_small(tmp_path: Path) -> None:
    large = plan(configured(run__folder=tmp_path, run__spool_gib=7, log__rollouts_gib=11), BILLION, 2)
    assert (large.parts["spool"], large.parts["rollouts"]) == (7 * GIB, 11 * GIB)
    small = plan(configured(run__folder=tmp_path, optim__steps=2, optim__mini_batch_prompts=1, rollout__prompts_per_step=1,
                            rollout__group_size=2), BILLION, 2)
    assert 0 < small.parts["spool"] < GIB > small.parts["rollouts"] > 0
    assert plan(configured(run__folder=tmp_path, run__deterministic=True, log__rollouts_every=0), BILLION, 2).parts == {
        "checkpoints": 3 * ONE, "weights": 0, "spool": 0, "rollouts": 0}


def test_dry_run_and_doctor_say_it_and_do_not_judge_another_machines_disk(
        tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    settings = dict(run__folder=tmp_path / "not" / "there", model__path=tiny_folder, optim__steps=400)
    assert dry_run(configured(**settings), "sft") == 2      # it has no data
    assert re.search(r"^ok +disk: 3 checkpoints of .* free, at most$", capsys.readouterr().out, re.MULTILINE)
    usage = type(shutil.disk_usage("/"))(1, 1, 0)
    monkeypatch.setattr(disk_plan.shutil, "disk_usage", lambda _: usage)
    assert dry_run(configured(**settings), "sft") == 2
    assert re.search(r"^MISSING +disk: .*set run.folder", capsys.readouterr().out, re.MULTILINE)
    (tmp_path / "run.yaml").write_text("log: {wandb: false}\n")
    options = ["--config", str(tmp_path / "run.yaml")]
    options += [f"--set={key.replace('__', '.')}={value}" for key, value in settings.items()]
    capsys.readouterr()
    assert doctor(options) == 1
    assert re.search(r"^disk +MISSING +disk: .*set run.folder", capsys.readouterr().out, re.MULTILINE)
    assert doctor([*options, "--gpus", "8", "--gpu-gib", "80"]) == 0
    assert "free" not in next(line for line in capsys.readouterr().out.splitlines() if line.startswith("disk"))
