"""From recorded trajectories to a trained folder by the commands that hdpo prints, answering held-out questions on the way."""
from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from launching import BASE, ROOT, settings
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hdpo.state.dump import read_rollouts
from hdpo.state.folders import read_state, step_folders
from hdpo.toyworld.demo import cpu_environment
from hdpo.toyworld.world import World
from hdpo.train.jsonl import read_metrics

pytestmark = [pytest.mark.engine, pytest.mark.slow]
ROWS = 24


def shell(line: str, folder: Path) -> str:
    """What a line typed in a checkout prints, on this machine's CPU and with the environment that is here."""
    stamp = folder / "installed"
    stamp.touch()
    launch = f"{sys.executable} -m hdpo.adapters.launcher --config_file {ROOT}/launch/accelerate/cpu2.yaml --main_process_port 0"
    line = re.sub(r"^make (\w+)", f"make \\1 STAMP={stamp} BIN={Path(sys.executable).parent} LAUNCH='{launch}'", line)
    done = subprocess.run(["sh", "-c", line], cwd=ROOT, env=os.environ | cpu_environment(2), capture_output=True, text=True,
                          timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def said(output: str, word: str) -> str:
    return next(line.removeprefix(word).strip() for line in output.splitlines() if line.startswith(word))


@pytest.fixture(scope="module")
def printed(toy_world: World, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What SFT printed, which was started by the line that curation printed; only sizes and the tiny model's limits are added."""
    folder = tmp_path_factory.mktemp("after_curation")
    pq.write_table(pq.read_table(toy_world.demos).slice(0, ROWS), folder / "demos.parquet")
    curate = " ".join(["--source", f"demonstrations={folder}/demos.parquet", "--out", f"{folder}/data", "--config", "demo_rl",
                       *settings(model__path=BASE, data__cache=folder / "cache")])
    line = said(shell(f'make curate ARGS="{curate}"', folder), "next")
    assert line.startswith("make sft CONFIG=metis_8b_sft ARGS=") and f"{folder}/data/kept.parquet" in line
    small = " ".join(["--config", "demo_sft", *settings(
        run__folder=folder, run__name="sft", data__cache=folder / "cache", optim__epochs=2, optim__rows_per_step=ROWS,
        optim__warmup_steps=0, checkpoint__every_steps=1, checkpoint__best="eval/accuracy", data__group_by_length=2,
        eval__tasks=f"[{toy_world.val}]", eval__rows=6, eval__every_steps=1, eval__before="true", rollout__engine="hf",
        tools__text_index=toy_world.text_index, tools__image_index=toy_world.image_index)])
    return shell(line.replace('ARGS="', f'ARGS="{small} '), folder)


def test_sft_runs_by_the_line_that_curation_prints_for_its_epochs_and_says_where_the_folder_is_and_what_comes_next(
        printed: str) -> None:
    final = said(printed, "done").rpartition(" ")[2]
    assert final.endswith("sft/checkpoints/step_000002") and (Path(final) / "config.json").is_file()
    assert said(printed, "next") == (
        f'make rl CONFIG=metis_8b_rl ARGS="--set model.path={final} --set data.train=[RL.parquet]"')
    assert f"--set model.path={final}" in said(printed, "evaluate")
    rows = read_metrics(Path(final).parents[1] / "metrics.jsonl")
    assert [row["training/epoch"] for row in rows if "sft/loss" in row] == [0, 1]


def test_questions_are_answered_with_the_weights_of_each_evaluated_step_and_decide_the_best(
        printed: str, toy_world: World) -> None:
    final = Path(said(printed, "done").rpartition(" ")[2])
    run = final.parents[1]
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["step"] for row in rows if "eval/accuracy" in row and "eval/tool_rate" in row] == [0, 1, 2]
    shown = EventAccumulator(str(run / "tensorboard"))
    shown.Reload()
    assert [point.step for point in shown.Scalars("eval/accuracy")] == [0, 1, 2]
    assert "parity before the first step" in printed and "parity after sync" in printed
    assert rows[1]["mismatch/canary_failed"] == 0 and rows[2]["sync/gb"] > 0
    by_step = {row["step"]: row["eval/accuracy"] for row in rows if "eval/accuracy" in row}
    for folder in step_folders(run):
        assert read_state(folder)["metric"] == {"name": "eval/accuracy", "value": by_step[int(folder.name[-6:])]}

    def answers(file: Path) -> list[tuple]:
        return sorted((row.task_id, row.token_ids, row.end, row.verdict) for row in read_rollouts(file))

    def sureness(file: Path) -> list[float]:
        return [sum(row.log_probs) for row in sorted(read_rollouts(file), key=lambda row: row.task_id)]
    alone = subprocess.run([sys.executable, "-m", "hdpo", "eval", "--config", f"{run}/config.yaml", *settings(
        model__path=final, run__name="sft-eval", data__val=f"[{toy_world.val}]")], cwd=ROOT, text=True, capture_output=True,
        env=os.environ | cpu_environment(1), timeout=300)
    assert alone.returncode == 0, alone.stderr[-3000:]
    here, there = run / "eval" / "step_000002.parquet", run.parent / "sft-eval" / "eval" / "rl.parquet"
    assert answers(here) == answers(there) and sureness(here) == pytest.approx(sureness(there), abs=1e-3)
    for step in (0, 1):
        assert sureness(run / "eval" / f"step_{step:06d}.parquet") != pytest.approx(sureness(here), abs=1e-2)
    assert "step_000002" in json.loads((run / "summary.json").read_text())
