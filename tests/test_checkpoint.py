"""Checkpoints are whole or absent, and refuse what they do not belong to."""
from __future__ import annotations

from pathlib import Path

import pytest

from hdpo.config import Config
from hdpo.errors import CheckpointError
from hdpo.train import checkpoint
from hdpo.train.world import World


class FilePolicy:
    """A policy whose whole state is one number in a file; saving can be made to fail half-way."""

    def __init__(self, value: int = 0, full: bool = False) -> None:
        self.world, self.value, self.full = World(), value, full

    def save_model(self, folder: Path) -> None:
        (folder / "model.safetensors").write_text("weights")

    def save_state(self, folder: Path) -> None:
        if self.full:
            raise OSError(28, "No space left on device")
        (folder / "value").write_text(str(self.value))

    def load_state(self, folder: Path) -> None:
        self.value = int((folder / "value").read_text())


def config(tmp_path: Path, **sections: dict) -> Config:
    return Config.model_validate({"run": {"folder": str(tmp_path), "name": "r"}, "checkpoint": {"keep": 2}, **sections})


def test_resume_gives_back_what_was_saved(tmp_path: Path) -> None:
    c = config(tmp_path)
    checkpoint.save(c.run.path, 3, FilePolicy(7), {"row": 12}, c)
    policy = FilePolicy()
    assert checkpoint.resume(c.run.path, policy, c) == (3, {"row": 12})
    assert policy.value == 7


def test_a_fresh_run_starts_at_zero_and_resume_can_be_declined(tmp_path: Path) -> None:
    c = config(tmp_path)
    assert checkpoint.resume(c.run.path, FilePolicy(), c) == (0, None)
    checkpoint.save(c.run.path, 3, FilePolicy(7), {}, c)
    declined = config(tmp_path, run={"folder": str(tmp_path), "name": "r", "resume": False})
    assert checkpoint.resume(c.run.path, FilePolicy(), declined) == (0, None)


def test_a_full_disk_is_one_line_and_leaves_the_last_good_checkpoint_usable(tmp_path: Path) -> None:
    c = config(tmp_path)
    checkpoint.save(c.run.path, 3, FilePolicy(7), {"row": 12}, c)
    with pytest.raises(CheckpointError, match="No space left on device; earlier checkpoints are intact") as error:
        checkpoint.save(c.run.path, 4, FilePolicy(8, full=True), {"row": 13}, c)
    assert "\n" not in str(error.value)
    policy = FilePolicy()
    assert checkpoint.resume(c.run.path, policy, c)[0] == 3 and policy.value == 7
    checkpoint.save(c.run.path, 4, FilePolicy(8), {"row": 13}, c)   # the half-written one is in nobody's way
    assert checkpoint.resume(c.run.path, policy, c)[0] == 4


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    c = config(tmp_path)
    for step in (1, 2, 3, 4):
        checkpoint.save(c.run.path, step, FilePolicy(step), {}, c)
    assert [f.name for f in checkpoint.step_folders(c.run.path)] == ["step_000003", "step_000004"]


def test_saving_the_same_step_twice_changes_nothing(tmp_path: Path) -> None:
    c = config(tmp_path)
    checkpoint.save(c.run.path, 1, FilePolicy(1), {}, c)
    checkpoint.save(c.run.path, 1, FilePolicy(2), {}, c)
    policy = FilePolicy()
    checkpoint.resume(c.run.path, policy, c)
    assert policy.value == 1


@pytest.mark.parametrize(("sections", "refused"), [
    ({"hdpo": {"w_tool": 0.3}}, "hdpo.w_tool was 0.15, is 0.3"),
    ({"data": {"train": ["other.parquet"]}}, "data.train was"),
    ({"optim": {"steps": 900}}, None),
    ({"log": {"tensorboard": False}}, None),
])
def test_a_changed_setting_is_refused_only_if_it_changes_what_is_learned(
        tmp_path: Path, sections: dict, refused: str | None) -> None:
    c = config(tmp_path)
    checkpoint.save(c.run.path, 1, FilePolicy(1), {}, c)
    changed = config(tmp_path, **sections)
    if refused is None:
        assert checkpoint.resume(c.run.path, FilePolicy(), changed)[0] == 1
    else:
        with pytest.raises(CheckpointError, match=refused):
            checkpoint.resume(c.run.path, FilePolicy(), changed)


def test_a_damaged_state_is_one_line_that_says_what_to_do(tmp_path: Path) -> None:
    c = config(tmp_path)
    folder = checkpoint.save(c.run.path, 1, FilePolicy(1), {}, c)
    (folder / "trainer" / "state.json").write_text('{"step": 1, "da')
    with pytest.raises(CheckpointError, match="is damaged .* remove it to resume from the one before"):
        checkpoint.resume(c.run.path, FilePolicy(), c)
