"""Rollouts that ended before a run was killed are found again, exactly; torn or foreign ones are not."""
from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hdpo.agent.images import bound_image, content_key, decode_image, encode_png
from hdpo.config import Config
from hdpo.ranks.world import World
from hdpo.state import records
from hdpo.state import spool as spool_module
from hdpo.state.spool import Spool
from hdpo.types import EndReason, Task, ToolCall, Trajectory


def config(tmp_path: Path, **sections: dict) -> Config:
    return Config.model_validate({"run": {"folder": str(tmp_path), "name": "r", **sections.pop("run", {})}, **sections})


def picture(seed: int) -> Image.Image:
    image = Image.new("RGB", (40, 24))
    image.putdata([(i * seed % 256, i * 7 % 256, seed) for i in range(40 * 24)])
    return image


def trajectory(index: int, sample: int, end: EndReason = EndReason.ANSWERED) -> Trajectory:
    task = Task(f"t{index}", "toy", [{"role": "user", "content": "<image>?"}], (b"png" * index, b"other"), ["7", "sieben"],
                {"index": index, "tool_needed": True})
    call = ToolCall("python", {"code": "print('ü')\n"}, True, "out\x00put", 1, 0.25)
    return Trajectory(task, sample, [1, 2, 3, index], [0, 1, 1, 0], [0.0, -0.1 - sample / 3, -1e-17, 0.0], 1,
                      (picture(index), picture(100 + sample)), (call,), end, ("a", "b"), 4, 1.5, "",
                      (f"prompt{index}", f"crop{sample}"), index)


def same(a: Trajectory, b: Trajectory) -> bool:
    pictures = [image.tobytes() for image in a.images] == [image.tobytes() for image in b.images]
    return pictures and dataclasses.replace(a, images=()) == dataclasses.replace(b, images=())


def killed_in_step(c: Config, step: int, *trajectories: Trajectory) -> Path:
    """What a process leaves that ends in the middle of a step; its file."""
    with Spool(c, World()) as spool:
        assert spool.begin(step) is not None
        for finished in trajectories:
            spool.add(finished)
    return max((c.run.path / "spool" / f"step_{step:06d}").iterdir())


def test_every_finished_rollout_comes_back_as_it_was(tmp_path: Path) -> None:
    c = config(tmp_path)
    kept = [trajectory(1, 0), trajectory(1, 1), trajectory(2, 0)]
    killed_in_step(c, 4, *kept)
    with Spool(c, World()) as spool:
        known = spool.begin(4)
        assert sorted(known) == [(1, 0), (1, 1), (2, 0)]
        assert all(same(known[t.index, t.sample_index], t) for t in kept)
        assert known[1, 0].images[0] is known[1, 1].images[0]     # a prompt's picture is decoded once
        assert known.get((7, 0)) is None


@pytest.mark.parametrize("lost", [1, 100, 3000])
def test_a_torn_tail_costs_the_rollouts_in_it_and_no_other_and_new_ones_are_kept_besides(tmp_path: Path, lost: int) -> None:
    c = config(tmp_path)
    path = killed_in_step(c, 4, *[trajectory(1, sample) for sample in range(6)])
    path.write_bytes(path.read_bytes()[:-lost])
    with Spool(c, World()) as spool:
        known = spool.begin(4)
        found = sorted(known)
        assert found == [(1, sample) for sample in range(len(found))] and 0 < len(found) < 6
        assert all(same(known[key], trajectory(*key)) for key in found)
        spool.add(trajectory(1, 0))          # a known one, told of again
        spool.add(trajectory(1, 5))
    with Spool(c, World()) as spool:
        assert sorted(spool.begin(4)) == sorted({*found, (1, 5)})


def test_rollouts_that_failed_on_our_side_are_sampled_again(tmp_path: Path) -> None:
    c = config(tmp_path)
    killed_in_step(c, 0, trajectory(1, 0, EndReason.INFRASTRUCTURE), trajectory(1, 1, EndReason.ABORTED), trajectory(1, 2))
    with Spool(c, World()) as spool:
        assert list(spool.begin(0)) == [(1, 2)]


@pytest.mark.parametrize("sections", [{"rollout": {"temperature": 0.7}}, {"run": {"seed": 2}}, {"run": {"resume": False}},
                                      {"run": {"deterministic": True}}])
def test_rollouts_of_another_configuration_or_of_a_run_that_starts_anew_are_not_taken(tmp_path: Path, sections: dict) -> None:
    killed_in_step(config(tmp_path), 4, trajectory(1, 0))
    with Spool(config(tmp_path, **sections), World()) as spool:
        assert not spool.begin(4)


def test_a_step_is_kept_until_a_checkpoint_covers_it_and_later_ones_only_while_nothing_new_is_sampled(tmp_path: Path) -> None:
    c = config(tmp_path)
    folder = c.run.path / "spool"
    with Spool(c, World()) as spool:
        for step in (0, 1, 2):
            spool.begin(step)
            spool.add(trajectory(step, 0))
    assert len(list(folder.iterdir())) == 3
    with Spool(c, World()) as spool:          # no checkpoint yet: everything is taken again, without sampling
        for step in (0, 1):
            assert list(spool.begin(step)) == [(step, 0)]
            spool.add(spool.begin(step)[step, 0])
        spool.add(trajectory(1, 1))           # killed before this one had ended: from here on the weights are others
        assert not spool.begin(2)
    (c.run.path / "checkpoints" / "step_000002").mkdir(parents=True)
    with Spool(c, World()) as spool:
        assert not spool.begin(2)
        assert [path.name for path in folder.iterdir()] == []


def test_beyond_its_size_the_spool_keeps_what_it_has_until_a_checkpoint_lets_go(
        tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = killed_in_step(config(tmp_path / "size"), 0, trajectory(1, 0)).stat().st_size
    c = config(tmp_path, run={"spool_gib": 2.5 * one / 2**30})
    with Spool(c, World()) as spool:
        for step in range(6):
            spool.begin(step)
            spool.add(trajectory(1, 0))
    assert caplog.text.count("until the next checkpoint") == 1      # and not at each of the steps after it
    kept = sorted(path.parent.name for path in c.run.path.rglob("*.spool") if path.stat().st_size > one / 2)
    assert kept == ["step_000000", "step_000001", "step_000002"]
    with Spool(c, World()) as spool:
        assert [list(spool.begin(step)) for step in range(3)] == [[(1, 0)]] * 3
    (c.run.path / "checkpoints" / "step_000005").mkdir(parents=True)
    killed_in_step(c, 6, trajectory(1, 0))
    with Spool(c, World()) as spool:
        assert list(spool.begin(6)) == [(1, 0)]
        for step in range(6, 10):
            spool.begin(step)
            spool.add(trajectory(1, 1))
    assert caplog.text.count("until the next checkpoint") == 2      # full anew


def test_a_full_disk_costs_the_spool_and_not_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    c = config(tmp_path)
    c.run.path.mkdir(parents=True)
    (c.run.path / "spool").write_text("no folder can be made here")
    with Spool(c, World()) as spool:
        spool.begin(4)
        spool.add(trajectory(1, 0))
        spool.add(trajectory(1, 1))
    assert "rollouts of this step are not kept for a resume" in caplog.text


class OfRows:
    """A data file of two rows with a photograph each, and rollouts of them as a run makes them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.photos = [encode_jpeg(photo(seed)) for seed in (1, 2)]
        self.write(self.photos)

    def write(self, photos: list[bytes]) -> None:
        rows = [{"images": [{"bytes": data, "path": None}], "prompt": [{"role": "user", "content": "<image>?"}],
                 "reward_model": {"ground_truth": "7"}} for data in photos]
        pq.write_table(pa.Table.from_pylist(rows), self.folder / "rows.parquet")

    def config(self, **sections: dict) -> Config:
        return config(self.folder, data={"train": [str(self.folder / "rows.parquet")], "cache": str(self.folder / "cache")},
                      **sections)

    def rollout(self, row: int, sample: int, zoom: bool = False) -> Trajectory:
        whole = decode_image(self.photos[row], "")
        came = whole.crop((8 + sample, 8, 392 + sample, 264))
        file = encode_png(came.resize((640, 320), Image.Resampling.LANCZOS) if zoom else came)
        seen = [bound_image(image, 32, 1024, 1 << 16) for image in (whole, decode_image(file, ""))]
        task = Task(f"t{row}", "toy", [{"role": "user", "content": "<image>?"}], (self.photos[row],), "7", row=row)
        return dataclasses.replace(trajectory(row, sample), task=task, images=tuple(seen), files=(self.photos[row], file),
                                   image_keys=tuple(map(content_key, seen)))


def photo(seed: int) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((600, 400), Image.Resampling.BICUBIC)


def encode_jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def test_pictures_of_rows_and_boxes_of_them_are_referred_to_and_come_back_to_the_pixel(tmp_path: Path) -> None:
    rows = OfRows(tmp_path)
    kept = [rows.rollout(row, sample, zoom=sample == 3) for row in (0, 1) for sample in range(4)]
    path = killed_in_step(rows.config(), 4, *kept)
    zoomed = sum(len(one.files[1]) for one in kept if one.sample_index == 3)
    assert path.stat().st_size < zoomed + len(kept) * 2000, "all but what was enlarged is in the data"
    with Spool(rows.config(), World()) as spool:
        known = spool.begin(4)
        for one in kept:
            found = known[one.index, one.sample_index]
            assert isinstance(found, Trajectory) and same(dataclasses.replace(one, files=()), found)
            assert found.task.row == one.task.row and found.task.images == one.task.images


def test_pictures_of_no_row_or_of_no_file_are_kept_themselves(tmp_path: Path) -> None:
    rows = OfRows(tmp_path)
    own = rows.rollout(0, 0)
    own = dataclasses.replace(own, task=dataclasses.replace(own.task, row=-1))
    bare = dataclasses.replace(rows.rollout(1, 0), files=())
    killed_in_step(rows.config(), 4, own, bare)
    with Spool(rows.config(), World()) as spool:
        known = spool.begin(4)
        (tmp_path / "cache").rename(tmp_path / "gone")
        assert all(same(dataclasses.replace(one, files=()), known[one.index, 0]) for one in (own, bare))


def test_a_rollout_whose_rows_picture_is_another_one_now_is_sampled_again_and_the_steps_after_it_too(
        tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = OfRows(tmp_path)
    content = {"data.train": "told to be the same"}
    monkeypatch.setattr(spool_module, "content_of", lambda config: content)
    for step in (4, 5):
        killed_in_step(rows.config(), step, rows.rollout(0, 0), rows.rollout(1, 0))
    rows.write([rows.photos[0], encode_jpeg(photo(3))])
    with Spool(rows.config(), World()) as spool:
        assert list(spool.begin(4)) == [(0, 0)] and caplog.text.count("are sampled again") == 1
        spool.add(rows.rollout(1, 0))
        assert not spool.begin(5)


def test_pixels_of_another_decoder_are_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = OfRows(tmp_path)
    killed_in_step(rows.config(), 4, rows.rollout(0, 0))
    monkeypatch.setattr(records, "DECODERS", "pil 99")
    with Spool(rows.config(), World()) as spool:
        assert not spool.begin(4)
    monkeypatch.undo()
    monkeypatch.setattr(records, "made_again", lambda *given: photo(9))      # the version is the same, the pixels are not
    with Spool(rows.config(), World()) as spool:
        assert spool.begin(4).get((0, 0)) is None and (0, 0) not in spool.begin(4)
