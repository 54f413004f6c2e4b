"""What may differ when a run goes on: what lies behind a path counts, not the path; what a user must change can be allowed."""
from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from vector_policy import VectorPolicy, config, names, resume, save

from hdpo.config import Config
from hdpo.errors import CheckpointError, ConfigError
from hdpo.state import fingerprints
from hdpo.state.checkpoint import Checkpoints
from hdpo.state.folders import read_state, step_folders
from hdpo.state.starting import is_finished


def run_config(tmp_path: Path, **sections: dict[str, Any]) -> Config:
    run = {"folder": str(tmp_path / "runs"), "name": "r", **sections.pop("run", {})}
    return config(tmp_path, **{"run": run, **sections})


@pytest.fixture
def places(tmp_path: Path) -> dict[str, Any]:
    """A model folder and a data file, as settings."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "rows.parquet").write_bytes(b"rows")
    return {"model": {"path": str(tmp_path / "model")}, "data": {"train": [str(tmp_path / "rows.parquet")]}}


def test_what_lies_behind_a_path_counts_and_not_the_path(tmp_path: Path, places: dict[str, Any]) -> None:
    save(run_config(tmp_path, **places), 1, 1.0)
    mount = tmp_path / "mount"
    mount.mkdir()
    shutil.move(tmp_path / "model", mount / "the_model")
    shutil.move(tmp_path / "rows.parquet", mount / "renamed.parquet")
    moved = {"model": {"path": str(mount / "the_model")}, "data": {"train": [str(mount / "renamed.parquet")]}}
    assert resume(run_config(tmp_path, **moved))[0] == 1


@pytest.mark.parametrize(("file", "field"), [("rows.parquet", "data.train"), ("model/model.safetensors", "model.path"),
                                             ("model/config.json", "model.path")])
def test_files_edited_in_place_are_noticed_in_one_line_that_says_the_way_on(
        tmp_path: Path, places: dict[str, Any], file: str, field: str) -> None:
    save(run_config(tmp_path, **places), 1, 1.0)
    old = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(old[::-1] + b" ")
    with pytest.raises(CheckpointError, match=f"the files of {field} have changed; to go on .*run.allow=.{field}.") as error:
        resume(run_config(tmp_path, **places))
    assert "\n" not in str(error.value)
    assert resume(run_config(tmp_path, **places, run={"allow": [field]}))[0] == 1


def test_allowed_changes_go_on_are_said_and_stand_in_every_later_checkpoint(
        tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(run_config(tmp_path, optim={"lr": 1e-4, "grad_clip": 1.0}), 1, 1.0)
    lower = {"lr": 5e-5, "grad_clip": 0.5}
    with pytest.raises(CheckpointError, match=r"optim.lr was .*, optim.grad_clip was .*run.allow=\[optim.lr,optim.grad_clip\]"):
        resume(run_config(tmp_path, optim=lower))
    with pytest.raises(CheckpointError, match="optim.grad_clip was 1.0, is 0.5"):
        resume(run_config(tmp_path, optim=lower, run={"allow": ["optim.lr"]}))
    allowed = run_config(tmp_path, optim=lower, run={"allow": ["optim.lr", "optim.grad_clip"]})
    with caplog.at_level(logging.WARNING), Checkpoints(VectorPolicy(), allowed) as checkpoints:
        assert checkpoints.resume()[0] == 1
        checkpoints.save_last(2, {})
    assert "run.allow: optim.lr was 0.0001, is 5e-05 from step 2 on" in caplog.text
    assert resume(run_config(tmp_path, optim=lower))[0] == 2       # what was allowed once is the run's own now
    changes = read_state(step_folders(allowed.run.path)[-1])["changes"]
    assert [(change["field"], change["was"], change["now"], change["step"]) for change in changes] == [
        ("optim.lr", 1e-4, 5e-5, 1), ("optim.grad_clip", 1.0, 0.5, 1)]


def test_a_setting_that_does_not_exist_cannot_be_allowed() -> None:
    with pytest.raises(ValueError, match="run.allow: there is no setting optim.learning_rate"):
        Config.model_validate({"run": {"allow": ["optim.learning_rate"]}})


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_more_steps_under_a_schedule_that_ends_are_refused_unless_they_are_allowed(tmp_path: Path, schedule: str) -> None:
    save(run_config(tmp_path, optim={"steps": 10, "schedule": schedule}), 8, 1.0)
    longer = {"steps": 40, "schedule": schedule}
    with pytest.raises(CheckpointError, match="optim.steps was 10, is 40 .the learning rate would jump"):
        resume(run_config(tmp_path, optim=longer))
    assert resume(run_config(tmp_path, optim=longer, run={"allow": ["optim.steps"]}))[0] == 8


def test_a_field_that_the_checkpoints_version_did_not_have_stands_at_its_default(tmp_path: Path) -> None:
    state = save(run_config(tmp_path), 1, 1.0) / "trainer" / "state.json"
    known = json.loads(state.read_text())
    assert known["config"]["hdpo"].pop("mask_truncated") is False
    known["config"]["hdpo"]["gone_since"] = 3
    del known["content"], known["changes"]
    state.write_text(json.dumps(known))
    rewrite_manifest(state)
    assert resume(run_config(tmp_path))[0] == 1
    with pytest.raises(CheckpointError, match="hdpo.mask_truncated was False, is True"):
        resume(run_config(tmp_path, hdpo={"mask_truncated": True}))


def rewrite_manifest(state: Path) -> None:
    from hdpo.state.shards import checksum, manifest_path
    path = manifest_path(state.parent, 0)
    entries = json.loads(path.read_text())
    entries["files"]["trainer/state.json"] = [state.stat().st_size, checksum(state)]
    path.write_text(json.dumps(entries))


def test_new_rows_and_another_seed_are_told_to_the_data_stream(tmp_path: Path, places: dict[str, Any]) -> None:
    save(run_config(tmp_path, **places), 1, 1.0)
    (tmp_path / "rows.parquet").write_bytes(b"one row fewer")
    for allow, new_rows in ((["data.train"], True), ([], None)):
        allowed = run_config(tmp_path, **places, run={"allow": allow})
        with Checkpoints(VectorPolicy(), allowed) as checkpoints:
            if new_rows:
                checkpoints.resume()
                assert checkpoints.new_rows
            else:
                with pytest.raises(CheckpointError):
                    checkpoints.resume()
    with pytest.raises(CheckpointError, match="run.seed was 1, is 2"):
        resume(run_config(tmp_path, **places, run={"seed": 2, "allow": ["data.train"]}))


def test_a_run_goes_back_to_a_step_once_and_then_on_from_its_newest(tmp_path: Path) -> None:
    c = run_config(tmp_path, checkpoint={"keep": 0})
    for step in (1, 2, 3):
        save(c, step, float(step))
    back = run_config(tmp_path, checkpoint={"keep": 0}, run={"resume_from": "1"})
    assert resume(back) == (1, {}, 1.0) and names(c) == ["step_000001"]
    assert resume(back) == (1, {}, 1.0)         # nothing was saved since
    save(back, 2, 22.0)
    assert resume(back) == (2, {}, 22.0) and resume(c) == (2, {}, 22.0)


def test_a_run_goes_on_from_a_folder_that_is_named(tmp_path: Path) -> None:
    copy = save(run_config(tmp_path), 2, 2.0).rename(tmp_path / "step_000002_good")
    other = run_config(tmp_path, run={"name": "other", "resume_from": str(copy)})
    assert resume(other) == (2, {}, 2.0)
    save(other, 3, 3.0)
    assert resume(other) == (3, {}, 3.0) and copy.is_dir()


@pytest.mark.parametrize(("wanted", "words"), [
    ("7", "no such checkpoint: .*step_000007; this run has step_000001, step_000002"), ("nowhere", "no such checkpoint: nowhere"),
    ("2", "step_000002 holds no trainer/"), ("1", "model.safetensors cannot be read")])
def test_a_checkpoint_that_cannot_be_gone_on_from_is_one_line(tmp_path: Path, wanted: str, words: str) -> None:
    c = run_config(tmp_path)
    first, second = save(c, 1, 1.0), save(c, 2, 2.0)
    damaged = tmp_path / "damaged"
    shutil.copytree(first, damaged)
    (damaged / "model.safetensors").unlink()
    shutil.rmtree(second / "trainer")
    named = str(damaged) if wanted == "1" else wanted
    with pytest.raises(CheckpointError, match=words):
        resume(run_config(tmp_path, run={"resume_from": named}))


def test_resume_from_and_no_resume_contradict_each_other(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run.resume_from"):
        resume(run_config(tmp_path, run={"resume": False, "resume_from": "1"}))


def test_only_weights_left_is_one_line_and_not_a_run_that_begins_anew(tmp_path: Path) -> None:
    c = run_config(tmp_path)
    shutil.rmtree(save(c, 1, 1.0) / "trainer")
    with pytest.raises(CheckpointError, match="step_000001 holds weights and no trainer/"):
        resume(c)


def test_weights_are_kept_at_an_interval_of_their_own_and_hold_no_state(tmp_path: Path) -> None:
    c = run_config(tmp_path, checkpoint={"keep": 1})
    with Checkpoints(VectorPolicy(), c) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save_weights(step)
            checkpoints.save(step, {})
        checkpoints.save_weights(3)     # again, as after a kill
        checkpoints.finish()
    assert names(c) == ["step_000003"]
    weights = sorted((c.run.path / "weights").iterdir())
    assert [folder.name for folder in weights] == ["step_000001", "step_000002", "step_000003"]
    assert all([file.name for file in folder.iterdir()] == ["model.safetensors"] for folder in weights)


def test_a_run_whose_last_step_is_saved_is_finished(tmp_path: Path) -> None:
    c = run_config(tmp_path, optim={"steps": 2})
    assert not is_finished(c)
    save(c, 1)
    assert not is_finished(c)
    save(c, 2)
    assert is_finished(c) and not is_finished(run_config(tmp_path, optim={"steps": 3}))


def test_a_large_file_that_was_written_again_has_another_fingerprint_and_its_copy_the_same(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprints, "WHOLE", 1000)
    monkeypatch.setattr(fingerprints, "BLOCK", 64)
    data = bytes(range(256)) * 400
    file, copy = tmp_path / "a", tmp_path / "b"
    file.write_bytes(data)
    copy.write_bytes(data)
    assert fingerprints.of_file(file) == fingerprints.of_file(copy)
    for changed in (data + b"1", data[:-1] + b"1", data[::-1], b"1" + data[1:]):
        copy.write_bytes(changed)
        assert fingerprints.of_file(file) != fingerprints.of_file(copy)
