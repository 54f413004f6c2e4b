"""The fault matrix, on one real run of two ZeRO-3 ranks that is hurt again and again. Each test's name states the outcome.

Full disks and damaged checkpoints are in test_checkpoint.py and test_resume.py; ranks alone in test_watchdog.py.
"""
from __future__ import annotations

import re
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from judge_server import JudgeServer, in_order, say
from launching import Running, command, settings
from tool_server import ToolServer

from hdpo.state.dump import read_rollouts
from hdpo.state.folders import step_folders
from hdpo.toyworld.world import World
from hdpo.train.jsonl import read_metrics

pytestmark = [pytest.mark.engine, pytest.mark.slow]

HANG_TIMEOUT_S = 8.0
OUTAGE_S = 5.0


class Run:
    """The run's folder, the services it uses, and how to start it again."""

    def __init__(self, folder: Path, sft: Path, world: World) -> None:
        self.folder, self.path, self.starts = folder, folder / "run", 0
        self.tools = ToolServer("--layout", "compact", "--text-index", str(world.text_index),
                                "--image-index", str(world.image_index))
        self.judge = JudgeServer(in_order(say("CORRECT")))
        self.arguments = ["--config", "launch/configs/demo_rl.yaml", *settings(
            run__folder=folder, run__name="run", run__hang_timeout_s=HANG_TIMEOUT_S, model__path=step_folders(sft)[-1],
            data__train=f"[{world.train}]", tools__url=self.tools.url, tools__call_timeout_s=120, rollout__engine="hf",
            rollout__prompts_per_step=4, rollout__group_size=4, optim__mini_batch_prompts=4, optim__steps=50,
            checkpoint__every_steps=1, checkpoint__keep=0, reward__judge="true", reward__rules="{'*': judge}",
            judge__base_url=self.judge.url, judge__timeout_s=2, judge__deadline_s=4, eval__before="false",
            eval__after="false", optim__warmup_steps=0)]

    def start(self) -> Running:
        self.starts += 1
        return Running(command("launch/train_rl.py", self.arguments), self.folder / f"log{self.starts}", {})

    def saved(self) -> int:
        """Steps in the newest checkpoint."""
        return int(step_folders(self.path)[-1].name.removeprefix("step_")) if step_folders(self.path) else 0


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, sft_run: Path, toy_world: World) -> Iterator[Run]:
    run = Run(tmp_path_factory.mktemp("faults"), sft_run, toy_world)
    yield run
    run.tools.kill()
    run.judge.close()


@pytest.fixture(scope="module")
def first(run: Run) -> Iterator[Running]:
    """The first start: a tool server that goes away for a while, then a judge that goes away."""
    running = run.start()
    try:
        running.until(lambda: "parity after sync" in running.text())
        run.tools.kill()
        time.sleep(OUTAGE_S)
        run.tools.start()
        running.until(lambda: run.saved() == 1)
        run.judge.stop()
        yield running
    finally:
        running.kill()


def test_a_tool_server_that_is_down_for_a_while_is_waited_for_and_costs_the_sessions_it_held_at_most(
        run: Run, first: Running) -> None:
    """It goes away as rollouts begin; with more sessions open: test_rollout_faults.py."""
    rollouts = read_rollouts(run.path / "rollouts" / "step_000001.parquet")
    assert len(rollouts) == 16 and sum(row.num_tool_calls for row in rollouts) > 0
    lost = [row for row in rollouts if "the session of this trajectory was lost: the tool server restarted" in row.error]
    assert all(len(row.calls) > 1 and row.end == "infrastructure" and not row.scored for row in lost)
    assert all(row.scored and row.end not in ("infrastructure", "aborted") for row in rollouts if row not in lost)


def test_a_judge_that_is_down_stops_the_run_with_its_cause_after_saving(run: Run, first: Running) -> None:
    assert first.end() == 3
    errors = first.lines("hdpo (rank")
    assert errors and all("trajectories of this step are unscored, more than reward.max_unscored" in line for line in errors)
    assert "Traceback" not in first.text()
    assert 1 <= run.saved() <= 2


@pytest.fixture(scope="module")
def second(run: Run, first: Running) -> Iterator[Running]:
    """The same command again, with the judge back; after another step a rank is stopped."""
    first.end()
    run.judge.start()
    before = run.saved()
    running = run.start()
    try:
        running.until(lambda: run.saved() > before)
        yield running
    finally:
        running.kill()


def test_with_the_judge_back_the_same_command_continues(run: Run, second: Running) -> None:
    steps = [row["step"] for row in read_metrics(run.path / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= run.saved() >= 2


def test_a_stopped_rank_is_named_with_its_phase_and_the_others_end_within_the_limit(run: Run, second: Running) -> None:
    rank0, rank1 = second.rank(0), second.rank(1)
    rank1.send_signal(signal.SIGSTOP)
    started = time.monotonic()
    rank0.wait(60)
    seconds = time.monotonic() - started
    rank1.kill()
    assert second.end() == 3
    (line,) = second.lines("hdpo (rank 0)")
    assert f"rank 1 on {socket.gethostname()} (pid {rank1.pid}) gave no sign of life for " in line
    assert re.search(r" s, in \w+ of step \d+; this rank stops$", line) and seconds < HANG_TIMEOUT_S + 10, seconds


def test_a_killed_rank_is_named_and_the_launcher_ends_in_one_line_for_each(run: Run, second: Running) -> None:
    second.end()
    running = run.start()
    try:
        running.until(lambda: "\nRL:" in running.text())     # from here on a rank that is told to end does so in its own words
        rank1 = running.rank(1)
        rank1.kill()
        started = time.monotonic()
        assert running.end(40) == 1
        seconds = time.monotonic() - started
    finally:
        running.kill()
    (line,) = running.lines("hdpo (rank 0)")
    assert f"rank 1 on {socket.gethostname()} (pid {rank1.pid}) died, in " in line
    assert f"(pid {rank1.pid}) was ended by SIGKILL" in running.lines("hdpo: error")[-1]
    assert "Traceback" not in running.text() and seconds < 25, seconds


def test_ranks_whose_launcher_is_killed_save_and_end(run: Run, second: Running) -> None:
    second.end()
    running = run.start()
    try:
        running.until(lambda: "\nRL:" in running.text())
        ranks = [running.rank(number) for number in (0, 1)]
        running.process.kill()
        assert psutil.wait_procs(ranks, timeout=60)[1] == []
    finally:
        running.kill()
    assert (f"stopped after step {run.saved()}; the same command goes on" in running.text()
            or "stopped before a step was finished: there is nothing new to save" in running.text())
    assert "Traceback" not in running.text()
