"""Rollouts that ended before a run was killed are found again, exactly; torn or foreign ones are not."""
from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from PIL import Image

from hdpo.config import Config
from hdpo.ranks.world import World
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
    assert caplog.text.count("until the next checkpoint") == 3
    kept = sorted(path.parent.name for path in c.run.path.rglob("*.spool") if path.stat().st_size > one / 2)
    assert kept == ["step_000000", "step_000001", "step_000002"]
    with Spool(c, World()) as spool:
        assert [list(spool.begin(step)) for step in range(3)] == [[(1, 0)]] * 3
    (c.run.path / "checkpoints" / "step_000005").mkdir(parents=True)
    killed_in_step(c, 6, trajectory(1, 0))
    with Spool(c, World()) as spool:
        assert list(spool.begin(6)) == [(1, 0)]


def test_a_full_disk_costs_the_spool_and_not_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    c = config(tmp_path)
    c.run.path.mkdir(parents=True)
    (c.run.path / "spool").write_text("no folder can be made here")
    with Spool(c, World()) as spool:
        spool.begin(4)
        spool.add(trajectory(1, 0))
        spool.add(trajectory(1, 1))
    assert "rollouts of this step are not kept for a resume" in caplog.text
