"""Checkpoints are whole or absent, whatever happens while they are written, and refuse what they do not belong to."""
from __future__ import annotations

import logging
import re
import resource
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from vector_policy import VectorPolicy, config, names, resume, save

from hdpo.errors import CheckpointError
from hdpo.state.checkpoint import Checkpoints
from hdpo.state.shards import ShardReader, TrainingState, part_of, rng_state, set_rng_state, shard_path, write_state

STATE = Path("trainer") / "rank_00000.safetensors"


def test_resume_gives_back_what_was_saved(tmp_path: Path) -> None:
    c = config(tmp_path)
    save(c, 3, 7.0, {"row": 12})
    assert resume(c) == (3, {"row": 12}, 7.0)


def test_a_fresh_run_starts_at_zero_and_a_declined_resume_puts_old_checkpoints_aside(tmp_path: Path) -> None:
    c = config(tmp_path)
    assert resume(c) == (0, None, -1.0)
    save(c, 3, 7.0)
    declined = config(tmp_path, run={"folder": str(tmp_path), "name": "r", "resume": False})
    assert resume(declined) == (0, None, -1.0)
    assert (c.run.path / "checkpoints" / ".replaced_step_000003" / STATE).is_file()
    save(c, 1, 8.0)    # would be thrown away at once if it were compared with step 3 of the other run
    assert resume(c) == (1, {}, 8.0)


def test_training_goes_on_while_a_checkpoint_is_written_and_it_holds_the_state_of_its_step(tmp_path: Path) -> None:
    c = config(tmp_path)
    policy = VectorPolicy(7.0)
    policy.gate.clear()
    with Checkpoints(policy, c) as checkpoints:
        checkpoints.save(1, {})
        policy.vector.fill_(9.0)      # the next step
        checkpoints.check()
        assert names(c) == []         # not visible before it is whole
        policy.gate.set()
        checkpoints.finish()
    assert names(c) == ["step_000001"] and resume(c)[2] == 7.0


def test_the_next_save_waits_for_the_one_before_and_leaving_waits_too(tmp_path: Path) -> None:
    c = config(tmp_path)
    policy = VectorPolicy(1.0)
    policy.gate.clear()
    opener = threading.Timer(0.2, policy.gate.set)
    with Checkpoints(policy, c) as checkpoints:
        checkpoints.save(1, {})
        opener.start()
        checkpoints.save(2, {})
        assert names(c)[0] == "step_000001"
    assert names(c) == ["step_000001", "step_000002"]


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file of this process may grow beyond 64 KiB, as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_one_line_at_the_next_step_and_leaves_the_last_good_checkpoint_usable(
        tmp_path: Path, small_files: None) -> None:
    c = config(tmp_path)
    save(c, 3, 7.0, {"row": 12})
    with Checkpoints(VectorPolicy(8.0, elements=1 << 20), c) as checkpoints:
        checkpoints.save(4, {"row": 13})
        assert checkpoints._writing is not None
        checkpoints._writing.wrote.wait(30)
        with pytest.raises(CheckpointError, match="step_000004: File too large; earlier checkpoints are intact") as error:
            checkpoints.check()
    assert "\n" not in str(error.value)
    assert resume(c) == (3, {"row": 12}, 7.0)
    assert not list((c.run.path / "checkpoints").glob(".partial*"))     # removed when the run was opened again
    save(c, 4, 8.0)
    assert resume(c) == (4, {}, 8.0)


def test_only_the_newest_are_kept_and_the_best_besides(tmp_path: Path) -> None:
    c = config(tmp_path, checkpoint={"keep": 2, "best": "eval/accuracy"})
    for step, accuracy in ((1, 0.3), (2, 0.9), (3, 0.5), (4, 0.5), (5, 0.6)):
        save(c, step, **{"eval/accuracy": accuracy})
    assert names(c) == ["step_000002", "step_000004", "step_000005"]
    lowest = config(tmp_path / "lowest", checkpoint={"keep": 1, "best": "-eval/sft_loss"})
    for step, loss in ((1, 0.9), (2, 0.3), (3, 0.5)):
        save(lowest, step, **{"eval/sft_loss": loss})
    assert names(lowest) == ["step_000002", "step_000003"]
    plain = config(tmp_path / "plain")
    for step in (1, 2, 3, 4):
        save(plain, step)
    assert names(plain) == ["step_000003", "step_000004"]


@pytest.mark.parametrize("target", ["there", "gone"])
def test_a_checkpoint_that_was_moved_behind_a_link_is_let_go_and_its_files_stay(tmp_path: Path, target: str) -> None:
    c = config(tmp_path)
    folder, disk = save(c, 1), tmp_path / "other_disk"
    folder.rename(disk)
    save(c, 2)
    folder.symlink_to(disk, target_is_directory=True)
    if target == "gone":
        shutil.rmtree(disk)
    for step in (3, 4):
        save(c, step)
    assert names(c) == ["step_000003", "step_000004"] and disk.is_dir() == (target == "there")
    assert not [entry for entry in folder.parent.iterdir() if entry.name.startswith(".")]


def test_a_metric_of_another_step_does_not_make_a_checkpoint_the_best(
        tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    c = config(tmp_path, checkpoint={"keep": 1, "best": "eval/accuracy"})
    with Checkpoints(VectorPolicy(), c) as checkpoints:
        checkpoints.note(1, {"eval/accuracy": 0.9})
        checkpoints.save(2, {})
        assert "eval/accuracy was not logged at step 2" in caplog.text
        checkpoints.note(3, {"eval/accuracy": 0.1})
        checkpoints.save(3, {})
        checkpoints.finish()
    assert names(c) == ["step_000003"]


def test_saving_the_same_step_twice_changes_nothing(tmp_path: Path) -> None:
    c = config(tmp_path)
    save(c, 1, 1.0)
    save(c, 1, 2.0)
    assert resume(c)[2] == 1.0


@pytest.mark.parametrize(("sections", "refused"), [
    ({"hdpo": {"w_tool": 0.3}}, "hdpo.w_tool was 0.15, is 0.3"),
    ({"data": {"train": ["other.parquet"]}}, "data.train was"),
    ({"optim": {"steps": 900}}, None),
    ({"log": {"tensorboard": False}}, None),
])
def test_a_changed_setting_is_refused_only_if_it_changes_what_is_learned(
        tmp_path: Path, sections: dict, refused: str | None) -> None:
    save(config(tmp_path), 1, 1.0)
    changed = config(tmp_path, **sections)
    if refused is None:
        assert resume(changed)[0] == 1
    else:
        with pytest.raises(CheckpointError, match=refused):
            resume(changed)


def truncate(folder: Path) -> str:
    path = folder / STATE
    path.write_bytes(path.read_bytes()[:-8])
    return "rank_00000.safetensors has .* bytes and should have"


def flip_one_bit(folder: Path) -> str:
    path = folder / "model.safetensors"
    path.write_bytes(b"Weights")
    return "model.safetensors has changed since it was written"


def remove_weights(folder: Path) -> str:
    (folder / "model.safetensors").unlink()
    return "model.safetensors cannot be read .No such file"


def cut_state(folder: Path) -> str:
    (folder / "trainer" / "state.json").write_text('{"step": 1, "da')
    return "state.json cannot be read"


def remove_manifest(folder: Path) -> str:
    (folder / "trainer" / "rank_00000.json").unlink()
    return "rank_00000.json cannot be read"


@pytest.mark.parametrize("harm", [truncate, flip_one_bit, remove_weights, cut_state, remove_manifest])
def test_a_damaged_checkpoint_is_named_in_one_line_and_the_run_goes_on_from_the_one_before(
        tmp_path: Path, harm: Callable[[Path], str], caplog: pytest.LogCaptureFixture) -> None:
    c = config(tmp_path)
    save(c, 1, 1.0)
    words = harm(save(c, 2, 2.0))
    with caplog.at_level(logging.WARNING):
        assert resume(c) == (1, {}, 1.0)
    (line,) = [record.getMessage() for record in caplog.records]
    assert "going on from step_000001" in line and "\n" not in line
    assert re.search(words, line)
    assert (c.run.path / "checkpoints" / ".damaged_step_000002").is_dir()     # kept for whoever wants to look
    save(c, 2, 3.0)
    assert resume(c) == (2, {}, 3.0)


def test_when_no_checkpoint_is_usable_the_run_stops_with_one_line(tmp_path: Path) -> None:
    c = config(tmp_path)
    truncate(save(c, 1, 1.0))
    with pytest.raises(CheckpointError, match="no checkpoint of .* is usable: .*; to start anew set run.name") as error:
        resume(c)
    assert "\n" not in str(error.value)


def test_what_a_killed_process_left_is_removed_and_never_read(tmp_path: Path) -> None:
    c = config(tmp_path)
    half = save(c, 1, 1.0)
    shutil.copytree(half, half.with_name(".partial_step_000002"))
    half.rename(half.with_name(".pruned_step_000001"))
    assert resume(c) == (0, None, -1.0)
    assert not list((c.run.path / "checkpoints").iterdir())


@pytest.mark.parametrize("wrote", [1, 2, 3, 7])
@pytest.mark.parametrize("numel", [1, 5, 12])
def test_any_number_of_ranks_reads_what_any_other_number_wrote(tmp_path: Path, wrote: int, numel: int) -> None:
    whole = torch.arange(float(numel))
    for rank in range(wrote):
        low, high = part_of(numel, wrote, rank)
        write_state(shard_path(tmp_path, rank), TrainingState({"master/w": whole[low:high].clone()}, {"w": numel}, {"steps": 4}))
    reader = ShardReader(tmp_path, wrote)
    assert reader.counters == {"steps": 4} and reader.kinds == ["master"]
    for world in (1, 2, 3, 7):
        parts = [reader.read("master", "w", *part_of(numel, world, rank)) for rank in range(world)]
        assert torch.equal(torch.cat(parts), whole)


def test_generators_go_on_as_if_nothing_had_happened() -> None:
    import json
    import random

    import numpy

    def draw() -> list[float]:
        return [random.gauss(0, 1), float(numpy.random.normal()), float(torch.randn(()))]

    draw()
    state = json.loads(json.dumps(rng_state()))     # as it lies on the disk
    first = [draw() for _ in range(3)]
    set_rng_state(state)
    assert [draw() for _ in range(3)] == first
