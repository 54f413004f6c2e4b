"""Old checkpoints and the user's own copies beside them: neither is harmed, neither ends a run."""
from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from vector_policy import VectorPolicy, config, names, resume, save

from hdpo.state import folders
from hdpo.state.checkpoint import Checkpoints
from hdpo.state.folders import hidden_folders, newest_step, step_folders


@pytest.fixture(autouse=True)
def nothing_said_yet() -> None:
    folders._warned.clear()


@pytest.mark.parametrize("name", ["step_000002_good", "step_000009_best", "step_best", "step_", "step_000001 copy", "step_-1"])
def test_a_users_copy_is_neither_counted_nor_removed_nor_in_the_way_of_a_start(tmp_path: Path, name: str) -> None:
    c = config(tmp_path)
    copy = save(c, 2, 2.0).with_name(name)
    shutil.copytree(copy.with_name("step_000002"), copy)
    (copy.parent / "step_000050").write_text("a file, not a checkpoint")
    for step in (3, 4, 5):
        save(c, step, float(step))
    assert copy.is_dir() and names(c) == ["step_000004", "step_000005"]
    assert newest_step(c.run.path) == 5 and resume(c) == (5, {}, 5.0)


def test_steps_are_ordered_by_number_beyond_six_digits(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000, 5):
        (tmp_path / "checkpoints" / f"step_{step:06d}").mkdir(parents=True)
    assert [folder.name for folder in step_folders(tmp_path)] == ["step_000005", "step_999999", "step_1000000"]


def open_elsewhere(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on NFS while another process reads a file of it."""
    real = shutil.rmtree

    def busy(path: Path, *args: object, **kwargs: object) -> None:
        if Path(path).name == f".pruned_{folder.name}" and not kwargs.get("ignore_errors"):
            raise OSError(16, "Device or resource busy", str(path))
        real(path, *args, **kwargs)     # type: ignore[arg-type]
    monkeypatch.setattr("hdpo.state.folders.shutil.rmtree", busy)


def cannot_be_renamed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self == folder:
            raise PermissionError(1, "Operation not permitted", str(self))
        return real(self, target)
    monkeypatch.setattr(Path, "rename", refuse)


@pytest.mark.parametrize("trouble", [open_elsewhere, cannot_be_renamed])
def test_an_old_checkpoint_that_cannot_be_removed_is_a_warning_once_and_the_new_one_stands(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
        trouble: Callable[[Path, pytest.MonkeyPatch], None]) -> None:
    c = config(tmp_path)
    trouble(save(c, 1, 1.0), monkeypatch)
    with caplog.at_level(logging.WARNING):
        for step in (2, 3, 4):
            save(c, step, float(step))
    assert names(c)[-2:] == ["step_000003", "step_000004"] and resume(c) == (4, {}, 4.0)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1 and "can't be removed" in lines[0] and "step_000001" in lines[0]


def test_what_could_not_be_removed_goes_when_it_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    c = config(tmp_path)
    with monkeypatch.context() as patch:
        open_elsewhere(save(c, 1, 1.0), patch)
        save(c, 2, 2.0)
        save(c, 3, 3.0)
        assert len(hidden_folders(c.run.path / "checkpoints", "pruned")) == 1
    save(c, 4, 4.0)
    assert not hidden_folders(c.run.path / "checkpoints", "pruned")


@pytest.mark.parametrize("best", ["", "eval/accuracy"])
def test_an_old_checkpoint_whose_state_is_gone_ends_nothing(tmp_path: Path, best: str) -> None:
    """Removed by hand while the run goes on, to save space."""
    c = config(tmp_path, checkpoint={"keep": 3, "best": best})
    with Checkpoints(VectorPolicy(), c) as checkpoints:
        for step, accuracy in enumerate((0.9, 0.3, 0.2, 0.1), start=1):
            checkpoints.note(step, {"eval/accuracy": accuracy})
            folder = checkpoints.save(step, {})
            checkpoints.finish()
            if step == 1:
                shutil.rmtree(folder / "trainer")
            if step == 2:
                (folder / "trainer" / "state.json").write_text("{")
    assert names(c) == ["step_000002", "step_000003", "step_000004"] and resume(c)[0] == 4


def test_weights_without_a_state_are_left_alone_and_the_run_goes_on_from_the_one_before(tmp_path: Path) -> None:
    c = config(tmp_path)
    save(c, 1, 1.0)
    shutil.rmtree(save(c, 2, 2.0) / "trainer")
    assert resume(c) == (1, {}, 1.0)
    save(c, 2, 2.5)
    assert resume(c) == (2, {}, 2.5)


def test_checkpoints_put_aside_are_removed_once_as_many_new_ones_stand(tmp_path: Path) -> None:
    c = config(tmp_path)
    save(c, 7, 7.0)
    anew = config(tmp_path, run={"folder": str(tmp_path), "name": "r", "resume": False})
    resume(anew)
    save(c, 1, 1.0)
    assert len(hidden_folders(c.run.path / "checkpoints", "replaced")) == 1
    save(c, 2, 2.0)
    assert not hidden_folders(c.run.path / "checkpoints", "replaced") and names(c) == ["step_000001", "step_000002"]


def test_all_are_kept_and_nothing_put_aside_is_removed_with_keep_0(tmp_path: Path) -> None:
    c = config(tmp_path, checkpoint={"keep": 0})
    for step in (1, 2, 3):
        folder = save(c, step)
    (folder / "model.safetensors").unlink()
    save(c, 4)
    assert names(c) == [f"step_{step:06d}" for step in (1, 2, 4)]
    assert [left.name for left in hidden_folders(folder.parent, "damaged")] == [".damaged_step_000003"]
