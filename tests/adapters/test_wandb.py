"""Weights & Biases never ends a run. A scripted module stands for wandb, which needs an account: same calls, as named there."""
from __future__ import annotations

import logging
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from hdpo.adapters.wandb import WandbSink
from hdpo.protocols import ShownRollout
from hdpo.train.lifecycle import go_on


class ScriptedWandb(ModuleType):
    """`reachable`: whether an online run can be opened; `breaks`: whether logging fails later."""

    def __init__(self, reachable: bool = True, breaks: bool = False) -> None:
        super().__init__("wandb")
        self.reachable, self.breaks = reachable, breaks
        self.opened: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []

    def Settings(self, **values: Any) -> dict[str, Any]:
        return values

    def init(self, **options: Any) -> ScriptedWandb:
        self.opened.append(options)
        if not self.reachable and options.get("mode") != "offline":
            raise RuntimeError("Run initialization has timed out\nafter 20.0 sec")
        return self

    def define_metric(self, name: str, step_metric: str | None = None) -> None: ...

    def Histogram(self, np_histogram: Any) -> Any:
        return np_histogram

    def Image(self, image: Any) -> Any:
        return image.size

    def Table(self, columns: list[str], data: list[list[Any]]) -> list[dict[str, Any]]:
        return [dict(zip(columns, row, strict=True)) for row in data]

    def log(self, row: dict[str, Any]) -> None:
        if self.breaks:
            raise OSError("broken pipe")
        self.rows.append(row)

    def finish(self) -> None:
        if self.breaks:
            raise OSError("broken pipe")


def run(module: ScriptedWandb, folder: Path, monkeypatch: pytest.MonkeyPatch, resumed: bool = False, step: int = 1) -> None:
    monkeypatch.setitem(sys.modules, "wandb", module)
    sink = WandbSink("r", folder, {}, resumed)
    sink.write(step, {"a": 1.0})
    sink.write(step + 1, {"a": 2.0})
    sink.close()


def test_a_server_out_of_reach_makes_the_log_an_offline_one_with_one_line(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    module = ScriptedWandb(reachable=False)
    with caplog.at_level(logging.WARNING):
        run(module, tmp_path, monkeypatch)
    (line,) = [record.getMessage() for record in caplog.records]
    assert "can't be reached (Run initialization has timed out after 20.0 sec)" in line and "offline" in line and "\n" not in line
    assert module.opened[-1]["mode"] == "offline" and [row["step"] for row in module.rows] == [1, 2]


def test_what_fails_later_is_said_once_and_ends_nothing(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        run(ScriptedWandb(breaks=True), tmp_path, monkeypatch)
    assert [record.getMessage() for record in caplog.records] == [
        "Weights & Biases: broken pipe; training goes on, metrics.jsonl has every step"]


def test_a_resumed_run_goes_on_under_its_id_and_another_of_its_name_does_not(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ScriptedWandb()
    run(module, tmp_path / "one", monkeypatch)
    run(module, tmp_path / "one", monkeypatch, resumed=True, step=2)     # step 2 is logged again, on its own axis
    run(module, tmp_path / "two", monkeypatch)
    run(module, tmp_path / "one", monkeypatch)
    ids = [options["id"] for options in module.opened]
    assert ids[0] == ids[1] and len({ids[0], ids[2], ids[3]}) == 3
    assert [row["step"] for row in module.rows[:4]] == [1, 2, 2, 3]


def test_rollouts_are_a_table_and_sizes_of_q_a_histogram(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ScriptedWandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    sink = WandbSink("r", tmp_path, {})
    sink.write(4, {"hdpo/groups": 4.0, "hdpo/q_size_is/0": 0.25, "hdpo/q_size_is/1": 0.75})
    picture = Image.new("RGB", (20, 10))
    sink.write_rollouts(4, [ShownRollout("t1", "s", "said", (picture,), "wrong", "judge", "7", 2, (0.5, -1.0)),
                            ShownRollout("t2", "s", "said", (), "unscored", "none", "7", 0, ())])
    assert module.rows[0]["hdpo/q_size"] == ([1, 3], [-0.5, 0.5, 1.5])
    first, second = module.rows[1]["rollouts"]
    assert first["picture 1"] == (20, 10) and first["tool advantage"] == -1.0 and first["decided by"] == "judge"
    assert second["picture 1"] is None and second["accuracy advantage"] is None and module.rows[1]["step"] == 4


class Stream:
    def state(self) -> dict[str, Any]:
        return {"epoch": 0, "position": 0, "rows": 399, "seed": 1}

    def restore(self, state: dict[str, Any]) -> None:
        self.restored = state


def test_new_rows_are_gone_through_from_the_beginning_of_the_next_epoch() -> None:
    stream, position = Stream(), {"epoch": 2, "position": 17, "rows": 400, "seed": 1}
    go_on(stream, position, new_rows=False)
    assert stream.restored == position
    go_on(stream, position, new_rows=True)
    assert stream.restored == {"epoch": 3, "position": 0, "rows": 399, "seed": 1}
