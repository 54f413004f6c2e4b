"""Rollout dumps: everything comes back, pictures are stored as files once, a file is whole or absent."""
from __future__ import annotations

import dataclasses
import io

import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageChops
from synthetic_run import make_task, make_trajectory, score

from hdpo.config import Config
from hdpo.errors import DataError
from hdpo.ranks.world import World
from hdpo.state.dump import RolloutDumps, encode_image, read_rollouts, write_rollouts
from hdpo.types import EndReason, ToolCall


def _group(index=0, size=2, **changes):
    task = make_task(index, needed=True)
    made = [make_trajectory(task, n, call=n % 2 == 0, right=True) for n in range(size)]
    return score(tuple(dataclasses.replace(trajectory, **changes) for trajectory in made))


def test_a_row_comes_back_with_tokens_turns_calls_pictures_and_rewards(tmp_path):
    groups = [_group(0), _group(1)]
    path = write_rollouts(tmp_path / "step_000012.parquet", groups, step=12, advantages=[[0.5, -1], [0, 0], [1, 0], [2, 3]])
    rows = read_rollouts(path)
    assert [(row.task_id, row.sample_index, row.advantages) for row in rows] == [
        ("toy_0000", 0, [0.5, -1]), ("toy_0000", 1, [0, 0]), ("toy_0001", 0, [1, 0]), ("toy_0001", 1, [2, 3])]
    row, made = rows[0], groups[0].trajectories[0]
    assert (row.token_ids, row.mask, row.log_probs) == (made.token_ids, made.mask, made.log_probs)
    assert row.turns == list(made.turns) and row.observations == [made.calls[0].observation]
    assert row.calls[0]["arguments"] == made.calls[0].arguments and row.calls[0]["num_images"] == 1
    assert (row.answer, row.ground_truth, row.verdict, row.by) == ("3", ["3"], "correct", "rule")
    assert (row.reward_accuracy, row.reward_tool, row.num_tool_calls, row.end) == (1.0, 0.5, 1, "answered")
    assert (row.step, row.tool_needed, row.weight_version) == (12, True, 3)
    assert len(row.images) == 2 and row.num_prompt_images == 1


def test_the_crop_keeps_every_pixel_it_had(tmp_path):
    group = _group()
    row = read_rollouts(write_rollouts(tmp_path / "a.parquet", [group], step=1))[0]
    crop = Image.open(io.BytesIO(encode_image(group.trajectories[0].images[1].resize((200, 150)))))
    assert crop.format == "PNG"
    seen = Image.open(io.BytesIO(row.images[1]))
    assert seen.size == group.trajectories[0].images[1].size
    assert max(ImageChops.difference(seen.convert("L"), group.trajectories[0].images[1].convert("L")).getextrema()) <= 40


def test_pictures_are_bounded_and_the_prompt_is_stored_once_a_group(tmp_path):
    noise = Image.effect_noise((900, 700), 80).convert("RGB")
    task = make_task(0, True)

    def dump(size):
        group = score(tuple(dataclasses.replace(make_trajectory(task, n, call=False, right=True), images=(noise,))
                            for n in range(size)))
        return write_rollouts(tmp_path / f"{size}.parquet", [group], step=1, image_side=512)
    row = read_rollouts(dump(1))[0]
    assert Image.open(io.BytesIO(row.images[0])).size == (512, 398)
    assert dump(16).stat().st_size < 1.5 * dump(1).stat().st_size
    assert b"base64" not in dump(1).read_bytes()


def _photos(index, size=4, side=400):
    """A group whose rollouts show the prompt's picture and a crop, of 200 KB each."""
    pictures = tuple(Image.effect_noise((side, side), 90 + index + i).convert("RGB") for i in range(2))
    return _group(index, size, images=pictures, image_keys=(f"prompt {index}", f"crop {index}"))


def test_a_picture_is_encoded_and_stored_once_however_many_rollouts_show_it(tmp_path, monkeypatch):
    from hdpo.state import dump
    encoded = []
    monkeypatch.setattr(dump, "encode_image", lambda image, side: (encoded.append(1), encode_image(image, side))[1])
    one, many = (write_rollouts(tmp_path / f"{size}.parquet", [_photos(0, size)], step=1) for size in (1, 12))
    assert len(encoded) == 4 and many.stat().st_size < 1.2 * one.stat().st_size
    assert [len(row.images) for row in read_rollouts(many)] == [2] * 12


def test_a_dump_within_a_limit_loses_later_pictures_first_and_then_later_groups(tmp_path):
    groups = [_photos(i) for i in range(6)]
    whole = write_rollouts(tmp_path / "whole.parquet", groups, step=1).stat().st_size
    half = write_rollouts(tmp_path / "half.parquet", groups, step=1, byte_limit=whole // 2)
    rows = read_rollouts(half)
    assert half.stat().st_size <= 1.1 * whole / 2
    kept = [len(row.images) for row in rows[::4]]
    assert kept in ([2, 2, 2, 0, 0, 0], [2, 2, 0, 0, 0, 0]) and len(rows) == 24
    few = read_rollouts(write_rollouts(tmp_path / "few.parquet", groups, step=1, byte_limit=7000,
                                       advantages=[[float(i)] for i in range(24)]))
    assert 0 < len(few) < 24 and not any(row.images for row in few) and [row.advantages for row in few] == [
        [float(i)] for i in range(len(few))]
    assert read_rollouts(write_rollouts(tmp_path / "none.parquet", groups, step=1, byte_limit=0)) == []


def test_the_dumps_of_a_run_stay_within_their_size_and_none_is_starved_by_those_before(tmp_path, caplog):
    gib = 6e6 / 2**30
    config = Config.model_validate({"run": {"folder": str(tmp_path)}, "log": {"rollouts_gib": gib}, "optim": {"steps": 8}})
    dumps = RolloutDumps(config, World())
    sizes = []
    for step in range(1, 9):
        dumps.write(step, [_photos(i) for i in range(8)], None)
        sizes.append((tmp_path / "run" / "rollouts" / f"step_{step:06d}.parquet").stat().st_size)
        assert caplog.text.count("log.rollouts_gib") == (1 if step <= 4 else 2)      # said once, and not at every step
        if step == 4:
            dumps = RolloutDumps(config, World())     # a resumed run counts what is there
    assert sum(sizes) <= 6.3e6 and min(sizes) > 0.6 * max(sizes)


def test_text_no_encoder_can_hold_and_base64_do_not_stop_a_run(tmp_path):
    call = ToolCall("python", {"code": "x = '\ud83d'"}, True, "data:image/png;base64," + "A" * 500 + " \udc80 done")
    rows = read_rollouts(write_rollouts(tmp_path / "a.parquet", [_group(calls=(call,), turns=("half \ud83d",))], step=1))
    assert rows[0].observations == ["[500 characters of base64] ? done"]
    assert rows[0].turns == ["half ?"] and rows[0].answer is None


def test_a_rollout_without_turns_is_a_row_too(tmp_path):
    group = score((make_trajectory(make_task(0, True), 0, call=False, right=False, end=EndReason.INFRASTRUCTURE),))
    group = dataclasses.replace(group, trajectories=(dataclasses.replace(
        group.trajectories[0], turns=(), images=(), error="tool server gone"),))
    row = read_rollouts(write_rollouts(tmp_path / "a.parquet", [group], step=1))[0]
    assert (row.verdict, row.scored, row.error, row.images) == ("unscored", False, "tool server gone", [])


def test_ranks_write_parts_that_are_read_as_one_dump(tmp_path):
    path = tmp_path / "step_000003.parquet"
    for rank in range(11):
        write_rollouts(path, [_group(rank, size=1)], step=3, rank=rank, world=11)
    assert [row.task_id for row in read_rollouts(path)] == [f"toy_{rank:04d}" for rank in range(11)]
    assert len(read_rollouts(tmp_path)) == 11


def test_another_number_of_ranks_leaves_no_stale_parts(tmp_path):
    path = tmp_path / "step_000003.parquet"
    for world in (3, 2, 1, 2):
        for rank in range(world):
            write_rollouts(path, [_group(10 * world + rank, size=1)], step=3, rank=rank, world=world)
        assert [row.task_id for row in read_rollouts(path)] == [f"toy_{10 * world + rank:04d}" for rank in range(world)]


def test_a_rank_without_groups_writes_an_empty_part(tmp_path):
    assert read_rollouts(write_rollouts(tmp_path / "a.parquet", [], step=1)) == []


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = write_rollouts(tmp_path / "a.parquet", [_group()], step=1)
    before = path.read_bytes()

    def torn(where, *_, **__):
        where.write_bytes(b"half")
        raise OSError("disk full")
    monkeypatch.setattr(pq, "ParquetWriter", torn)
    with pytest.raises(OSError, match="disk full"):
        write_rollouts(path, [_group(1)], step=1)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_some_columns_can_be_read_without_the_pictures(tmp_path):
    write_rollouts(tmp_path / "a.parquet", [_group()], step=1)
    row = read_rollouts(tmp_path / "a.parquet", columns=["task_id", "correct"])[0]
    assert row.task_id == "toy_0000" and row.correct and row.images is None
    row = read_rollouts(tmp_path / "a.parquet", columns=["token_ids"])[0]
    assert row.token_ids and row.task_id is None


@pytest.mark.parametrize("content", [None, b"not parquet at all"])
def test_a_missing_or_damaged_dump_is_one_line_that_names_it(tmp_path, content):
    path = tmp_path / "step_000001.parquet"
    if content:
        path.write_bytes(content)
    with pytest.raises(DataError, match="step_000001.parquet: n") as found:
        read_rollouts(path)
    assert "\n" not in str(found.value)
