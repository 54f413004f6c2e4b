"""A second start in a live run's folder, as users and launchers do it by mistake: the first run loses nothing."""
from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from launching import BASE, ROOT, Running, settings

from hdpo.state.folders import step_folders
from hdpo.toyworld.world import World
from hdpo.train.jsonl import read_metrics

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def sft(folder: Path, world: World, **values: object) -> list[str]:
    return [sys.executable, "-m", "hdpo", "sft", "--config", "launch/configs/demo_sft.yaml", *settings(**{
        "run__folder": folder, "run__name": "r", "model__path": BASE, "data__train": f"[{world.demos}]", "optim__steps": 16,
        "optim__rows_per_step": 8, "checkpoint__every_steps": 4, **values})]


def start(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, cwd=ROOT, text=True, capture_output=True, timeout=240)


def error_of(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2, done.stderr[-3000:]
    (line,) = [line for line in done.stderr.splitlines() if "error:" in line]
    assert "Traceback" not in done.stderr
    return line


def contents(run: Path) -> dict[str, tuple[int, int]]:
    return {str(path.relative_to(run)): (path.stat().st_mtime_ns, path.stat().st_size) for path in run.rglob("*")
            if path.name != ".lock" and path.is_file()}


def test_a_second_start_harms_neither_a_live_run_nor_one_that_has_ended(tmp_path: Path, toy_world: World) -> None:
    run = tmp_path / "r"
    live = Running(sft(tmp_path, toy_world), tmp_path / "log", {}, 1)
    try:
        live.until(lambda: (run / "metrics.jsonl").exists() and len(read_metrics(run / "metrics.jsonl")) > 1)
        live.process.send_signal(signal.SIGSTOP)      # it would be over before the others have loaded torch
        for values in ({}, {"optim__lr": 0.5}):
            line = error_of(start(sft(tmp_path, toy_world, **values)))
            assert f"{run} is in use by pid " in line and "(hdpo sft), since 20" in line
        live.process.send_signal(signal.SIGCONT)
        assert live.end() == 0, live.text()[-3000:]
    finally:
        live.kill()
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == list(range(1, 17))
    assert "lr: 0.5" not in (run / "config.yaml").read_text() and step_folders(run)[-1].name == "step_000016"

    before = contents(run)
    line = error_of(start(sft(tmp_path, toy_world, optim__lr=0.5)))
    assert "belongs to another configuration: optim.lr" in line and "run.allow=[optim.lr]" in line
    again = start(sft(tmp_path, toy_world))
    assert again.returncode == 0 and "finished already: all 16 steps are done" in again.stdout
    assert contents(run) == before


@pytest.mark.long
def test_a_demo_goes_on_to_its_end_when_a_second_one_is_started_in_its_folder(tmp_path: Path) -> None:
    run = tmp_path / "demo"
    arguments = [sys.executable, "-m", "hdpo", "demo", "--run", str(run), "--ranks", "1"]
    for setting in ("optim.steps=4", "optim.rows_per_step=8"):
        arguments += ["--set-sft", setting]
    for setting in ("optim.steps=1", "rollout.prompts_per_step=2", "optim.mini_batch_prompts=2", "rollout.group_size=2",
                    "rollout.engine=hf", "eval.rows=2", "rollout.max_num_seqs=4"):
        arguments += ["--set-rl", setting]
    first = Running(arguments, tmp_path / "log", {}, 1)
    try:
        first.until(lambda: (run / "sft" / "metrics.jsonl").exists())
        for flag in ((), ("--fresh",)):
            assert f"{run} is in use by pid {first.process.pid} on " in error_of(start([*arguments, *flag]))
        assert first.end(400) == 0, first.text()[-3000:]
    finally:
        first.kill()
    for folder, steps in ((run / "sft", 4), (run, 1)):
        assert [row["step"] for row in read_metrics(folder / "metrics.jsonl") if "actor/lr" in row] == list(range(1, steps + 1))
    assert (run / "report.html").is_file()
