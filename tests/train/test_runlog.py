"""What one line of a run's log holds: all of the step's time, dumps and pictures without holding the step up."""
from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from synthetic_run import make_task, make_trajectory, score

from hdpo import gauges, oddities
from hdpo.config import Config
from hdpo.errors import DataError
from hdpo.protocols import ShownRollout
from hdpo.ranks.world import World
from hdpo.state.dump import read_rollouts
from hdpo.train import runlog
from hdpo.train.runlog import SHOWN_CHARS, SHOWN_IMAGES, SHOWN_SIDE, RunLog
from hdpo.types import RewardedGroup


class Sink:
    def __init__(self) -> None:
        self.lines: list[dict[str, float]] = []
        self.rollouts: list[tuple[int, ShownRollout]] = []

    def write(self, step: int, scalars: dict[str, float]) -> None:
        self.lines.append(scalars)

    def write_rollouts(self, step: int, rollouts: Sequence[ShownRollout]) -> None:
        self.rollouts += [(step, one) for one in rollouts]

    def close(self) -> None:
        pass


def config(folder: Path, **log: Any) -> Config:
    return Config.model_validate({"run": {"folder": str(folder)}, "log": log, "optim": {"steps": 3}})


def group(images: int = 2, side: int = 60) -> RewardedGroup:
    pictures = tuple(Image.effect_noise((2 * side, side), 50 + i).convert("RGB") for i in range(images))
    made = make_trajectory(make_task(0, True), 0, call=True, right=True)
    return score((replace(made, images=pictures, image_keys=()),))


def test_the_phases_of_a_line_and_the_rest_are_the_time_since_the_line_before(tmp_path: Path, monkeypatch: Any) -> None:
    clock = [100.0]
    monkeypatch.setattr("hdpo.train.metrics.time.perf_counter", lambda: clock[0])
    sink = Sink()
    log = RunLog(config(tmp_path), World(), [sink], [])
    with log.timed("before"):
        clock[0] += 50           # of no step
    for step in log.steps(0, 3, "test"):
        for phase, seconds in (("rollout", 4.0), ("update", 2.0)):
            with log.timed(phase):
                clock[0] += seconds + step
        clock[0] += 0.25         # in no phase
        log.write(step + 1, {}, [group()], None)
        with log.timed("save"):
            clock[0] += 8
    log.close()
    for step, line in enumerate(sink.lines):
        parts = {name: value for name, value in line.items() if name.startswith("time/") and name != "time/step"}
        assert sum(parts.values()) == pytest.approx(line["time/step"]) == pytest.approx(6.25 + 2 * step + 8 * (step > 0))
        assert parts["time/other"] == pytest.approx(0.25) and "time/before" not in parts
        assert parts.get("time/save", 0.0) == 8 * (step > 0)


def test_a_step_does_not_wait_for_its_dump_and_the_next_line_comes_after_it(tmp_path: Path, monkeypatch: Any) -> None:
    go, written = threading.Event(), []
    inner = runlog.RolloutDumps.write

    def held(self: Any, step: int, *rest: Any) -> None:
        assert go.wait(30)
        inner(self, step, *rest)
        written.append(step)
    monkeypatch.setattr(runlog.RolloutDumps, "write", held)
    log = RunLog(config(tmp_path), World(), [], [])
    log.write(1, {}, [group()], None)
    assert not written
    go.set()
    log.write(2, {}, [group()], None)
    assert written[0] == 1
    log.finish()
    assert written == [1, 2] and len(read_rollouts(tmp_path / "run" / "rollouts")) == 2
    log.close()


def test_what_keeps_a_dump_from_being_written_ends_the_run_at_the_next_line(tmp_path: Path, monkeypatch: Any) -> None:
    def full(*_: Any) -> None:
        raise DataError("the disk is full")
    monkeypatch.setattr(runlog.RolloutDumps, "write", full)
    log = RunLog(config(tmp_path), World(), [], [])
    log.write(1, {}, [group()], None)
    with pytest.raises(DataError, match="disk is full"):
        log.write(2, {}, [group()], None)
    log.close()


def test_rollouts_shown_in_a_viewer_are_few_and_small_with_their_own_advantages(tmp_path: Path) -> None:
    sink = Sink()
    log = RunLog(config(tmp_path, samples=2, rollouts_every=0), World(), [sink], [])
    long = group(SHOWN_IMAGES + 3, 500)
    (trajectory,) = long.trajectories
    long = replace(long, trajectories=(replace(trajectory, turns=("word " * SHOWN_CHARS, *trajectory.turns[1:])),) * 2,
                   judgements=long.judgements * 2, rewards=long.rewards * 2)
    log.write(1, {}, [long, group(), group()], [(1.0, 0.5), (0.0, 0.0), (-2.0, 0.25), (9.0, 9.0)])
    log.close()
    (step, first), (_, second) = sink.rollouts
    assert step == 1 and [image.size for image in first.images] == [(SHOWN_SIDE, SHOWN_SIDE // 2)] * SHOWN_IMAGES
    assert SHOWN_CHARS < len(first.text) < SHOWN_CHARS + 100 and "more characters)" in first.text
    assert (first.advantages, second.advantages) == ((1.0, 0.5), (-2.0, 0.25))
    assert "accuracy -2.00, tool +0.25" in second.outcome


def test_readings_from_below_are_the_mean_and_the_largest_of_their_step(tmp_path: Path) -> None:
    sink = Sink()
    log = RunLog(config(tmp_path), World(), [sink], [])
    gauges.take()
    for seconds in (1.0, 2.0, 6.0):
        gauges.note("tool/queue_wait_seconds", seconds)
    log.write(1, {}, None, None)
    log.write(2, {}, None, None)
    log.close()
    assert (sink.lines[0]["tool/queue_wait_seconds/mean"], sink.lines[0]["tool/queue_wait_seconds/max"]) == (3.0, 6.0)
    assert not any("queue_wait" in name for name in sink.lines[1])


def test_every_curve_of_the_board_can_be_drawn_from_a_steps_scalars(tmp_path: Path) -> None:
    """What a pattern of the layout finds among the names of a run, read back from the event file."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from hdpo.adapters.tensorboard import LAYOUT, TensorBoardSink
    log = RunLog(config(tmp_path), World(), [TensorBoardSink(tmp_path / "tb")], [])
    gauges.note("tool/queue_wait_seconds", 1.0)
    gauges.note("tool/python_sessions", 3)
    oddities.count("session/its_sandbox_died")
    for phase in ("rollout", "update"):
        with log.timed(phase):
            pass
    others = dict.fromkeys(("hdpo/gradient_cosine", "hdpo/tool_gradient_share", "mismatch/k1", "judge/asked", "actor/lr"), 0.5)
    next(log.steps(0, 1, "test"))
    groups = [score(tuple(make_trajectory(make_task(0, needed), n, call=n == 0, right=True) for n in range(2)))
              for needed in (True, False)]
    log.write(1, others, groups, [(1.0, 0.5)] * 4)
    log.close()
    names = EventAccumulator(str(tmp_path / "tb")).Reload().Tags()["scalars"]
    missing = [f"{board}: {chart}" for board, charts in LAYOUT.items() for chart, (_, patterns) in charts.items()
               if not any(re.match(pattern, name) for pattern in patterns for name in names)]
    assert not missing


def test_a_photograph_takes_as_many_bytes_in_tensorboard_as_its_jpeg(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from hdpo.adapters.tensorboard import TensorBoardSink
    sink = TensorBoardSink(tmp_path)
    photo = Image.radial_gradient("L").resize((SHOWN_SIDE, SHOWN_SIDE)).convert("RGB")
    sink.write_rollouts(3, [ShownRollout("t", "s", "q", (photo,), "wrong", "rule", "1", 0, ())])
    sink.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    (shown,) = events.Images("rollouts/0/image_1")
    assert (shown.step, shown.width, shown.height) == (3, SHOWN_SIDE, SHOWN_SIDE)
    assert shown.encoded_image_string[:3] == b"\xff\xd8\xff" and len(shown.encoded_image_string) < 60_000
