"""kill -9 at random moments: the run goes on to the same weights, and nothing is left behind.

HDPO_KILLS=10 (`make test-faults`) kills ten times on two ranks with vLLM; without it, three times on one rank.
"""
from __future__ import annotations

import os
import random
import re
import tempfile
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
from launching import BASE, Running, command, family, kill_as_a_lost_machine, settings
from tool_server import containers, post, python, until

from hdpo.config.file import load_config
from hdpo.state.dump import read_rollouts
from hdpo.state.spool import spooled
from hdpo.toyworld.world import World, make_world
from hdpo.train.jsonl import read_metrics

pytestmark = [pytest.mark.engine, pytest.mark.slow]

KILLS = int(os.environ.get("HDPO_KILLS", "3"))
PHASES = ("rollout", "update", "save", "score")
LEFT_S = 30.0      # within which everything a dead run had started must be gone


class Run:
    """One RL run under its launcher, started as often as it takes."""

    def __init__(self, folder: Path, name: str, world: World, steps: int, **values: object) -> None:
        self.path, self.phases, self.log = folder / name, folder / f"{name}.phases", folder / f"{name}.log"
        self.ranks, engine = (2, "vllm") if KILLS > 3 else (1, "hf")
        self.arguments = ["--config", "launch/configs/demo_rl.yaml", *settings(**{
            "run__folder": folder, "run__name": name, "model__path": BASE, "data__train": f"[{world.train}]",
            "data__val": f"[{world.val}]", "tools__text_index": world.text_index, "tools__image_index": world.image_index,
            "rollout__prompts_per_step": 4, "optim__mini_batch_prompts": 2, "rollout__group_size": 4, "optim__steps": steps,
            "checkpoint__every_steps": 1, "eval__before": "false", "eval__after": "false", "optim__warmup_steps": 0,
            "rollout__engine": engine, "run__deterministic": "true", **values})]

    def start(self) -> Running:
        return Running(command("tests/support/ranks/watched_rl.py", self.arguments, self.ranks, "--max_restarts", "20"), self.log,
                       {"PHASES": str(self.phases)}, self.ranks)

    def entered(self) -> list[list[str]]:
        """The phases of each life so far."""
        text = self.phases.read_text() if self.phases.exists() else ""
        return [life.split() for life in text.split("start\n")[1:]]

    def has_entered(self, phase: str, life: int) -> bool:
        lives = self.entered()
        return len(lives) == life and phase in lives[-1]

    def weights(self, step: int) -> bytes:
        return (self.path / "checkpoints" / f"step_{step:06d}" / "model.safetensors").read_bytes()

    def seconds(self, phase: str) -> float:
        return min([row[f"time/{phase}"] for row in read_metrics(self.path / "metrics.jsonl")
                    if f"time/{phase}" in row] or [0.3])


def all_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=LEFT_S)
    assert not alive, [process.cmdline() for process in alive]


def test_a_run_killed_at_random_moments_ends_with_the_weights_of_one_that_was_not(tmp_path: Path) -> None:
    world = make_world(tmp_path / "world", seed=5, train_rows=40, val_rows=8, demos=8)
    steps = 2 + KILLS // 2
    whole, victim = Run(tmp_path, "whole", world, steps), Run(tmp_path, "victim", world, steps)
    running = whole.start()
    assert running.end(900) == 0, running.text()[-3000:]
    moments = random.Random(7)
    running = victim.start()
    try:
        for kill in range(KILLS):
            phase = PHASES[kill % 4]
            running.until(partial(victim.has_entered, phase, kill + 1), timeout=400)
            time.sleep(moments.random() * whole.seconds(phase))
            before = family(psutil.Process(running.process.pid))
            if victim.ranks > 1 and kill % 2:
                running.rank(1).kill()     # its launcher starts the run again by itself
                all_gone(before[1:])
            else:
                kill_as_a_lost_machine(running)
                all_gone(before)
                running = victim.start()
        before = family(psutil.Process(running.process.pid))
        assert running.end(900) == 0, running.text()[-3000:]
        all_gone(before)
    finally:
        running.kill()
    assert len(victim.entered()) == KILLS + 1
    assert victim.weights(steps) == whole.weights(steps)
    assert [row["step"] for row in read_metrics(victim.path / "metrics.jsonl")] == list(range(1, steps + 1))


@pytest.mark.skipif(KILLS > 3, reason="runs with the others in make test")
def test_a_killed_run_loses_no_finished_rollout(tmp_path: Path) -> None:
    """Not deterministic: only then rollouts are kept, because only then they need not repeat in the same batches."""
    world = make_world(tmp_path / "world", seed=5, train_rows=40, val_rows=8, demos=8)
    run = Run(tmp_path, "run", world, 1, run__deterministic="false", rollout__max_num_seqs=2)
    spool = run.path / "spool" / "step_000000"
    running = run.start()
    try:
        running.until(lambda: any(b'"kind": "trajectory"' in path.read_bytes() for path in spool.glob("*")), timeout=400)
        kill_as_a_lost_machine(running)
        known = dict(spooled(load_config(run.path / "config.yaml", environment={}), 0))
        assert 0 < len(known) <= 16       # all of them where the machine was fast: then none is sampled again
        running = run.start()
        assert running.end(400) == 0, running.text()[-3000:]
    finally:
        running.kill()
    rows = {(row.task_id, row.sample_index): row for row in read_rollouts(run.path / "rollouts" / "step_000001.parquet")}
    assert len(rows) == 16
    for trajectory in known.values():
        row = rows[trajectory.task.id, trajectory.sample_index]
        assert row.token_ids == trajectory.token_ids
        assert row.seconds == trajectory.seconds      # the very same rollout, not one that came out the same


class Sandbox:
    """What a run's tool server keeps on the machine, once it has been given a session that holds a process and a file."""

    def __init__(self, run: Run, running: Running) -> None:
        (self.server,) = [process for process in family(psutil.Process(running.process.pid))
                          if "hdpo.toolserver.app" in process.cmdline()]
        (log,) = run.path.glob("tool_server_*.log")
        url = re.findall(r"http://\S+", log.read_text())[-1]
        cell = "import subprocess; open('f', 'w').write('x'); subprocess.Popen(['sleep', '1000'])"
        token = {"Authorization": f"Bearer {self.server.environ()['HDPO_TOOL_SERVER_TOKEN']}"}
        assert post(url, {"trajectory_ids": ["t"], "actions": [python(cell)]}, token)[1]["valids"] == [True]
        (container,) = containers(self.server.pid)
        self.processes = family(psutil.Process(container.attrs["State"]["Pid"]))
        assert len(self.processes) == 4       # template, supervisor, session, sleep
        assert self.folders()

    def folders(self) -> list[Path]:
        return list(Path(tempfile.gettempdir()).glob(f"hdpo-sandbox-*-{self.server.pid}-*"))

    def check_gone(self) -> None:
        """The container and everything in it."""
        all_gone(self.processes)
        assert until(lambda: not containers(self.server.pid), LEFT_S)


@pytest.mark.docker
def test_of_a_killed_trainer_or_tool_server_no_container_process_or_session_folder_is_left(tmp_path: Path) -> None:
    """The empty folder of a killed server's socket goes when the next server starts: nobody else is there to do it."""
    world = make_world(tmp_path / "world", seed=5, train_rows=40, val_rows=8, demos=8)
    run = Run(tmp_path, "run", world, 100, tools__sandbox="docker")
    running = run.start()
    try:
        running.until(partial(run.has_entered, "rollout", 1), timeout=400)
        first = Sandbox(run, running)
        kill_as_a_lost_machine(running)
        first.check_gone()
        all_gone([first.server])
        assert not first.folders()
        running = run.start()
        running.until(partial(run.has_entered, "rollout", 2), timeout=400)
        second = Sandbox(run, running)
        second.server.kill()
        second.check_gone()
        running.rank(0).kill()        # its launcher starts the run again by itself
        running.until(partial(run.has_entered, "rollout", 3), timeout=400)
        all_gone([second.server])     # until then nobody had asked how it ended
        assert not second.folders()
    finally:
        running.kill()
