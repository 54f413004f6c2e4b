"""The loops on real parts: ZeRO-3 ranks under accelerate, vLLM and plain transformers engines, real tool calls."""
from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from launching import ROOT, accelerate
from launching import rl_settings as any_rl_settings

from hdpo.state.dump import read_rollouts
from hdpo.state.folders import step_folders
from hdpo.toyworld.demo import cpu_environment
from hdpo.toyworld.world import World
from hdpo.train.jsonl import read_metrics

pytestmark = [pytest.mark.engine, pytest.mark.slow]
rl_settings = partial(any_rl_settings, hdpo__kl_coef=0.05)


def update_once(model: Path, tokens: int, share: str, ranks: int) -> dict:
    done = accelerate("tests/support/ranks/update_once.py", [str(model), str(tokens), share], ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if "RESULT " in line)
    return json.loads(line.split("RESULT ", 1)[1])


def test_optimizer_steps_are_the_same_for_any_split_over_micro_batches_and_ranks(
        tmp_path_factory: pytest.TempPathFactory) -> None:
    from tiny_models import save_tiny_qwen3_vl

    model = save_tiny_qwen3_vl(tmp_path_factory.mktemp("model"))
    whole = update_once(model, 10_000, "even", ranks=1)
    uneven = update_once(model, 70, "first", ranks=2)    # rank 0 has all rows, rank 1 gets its part from it
    assert whole["micro_batches"] == 1 and uneven["micro_batches"] > 1
    assert uneven["norms"] == pytest.approx(whole["norms"], rel=1e-5)
    assert uneven["losses"] == pytest.approx(whole["losses"], rel=1e-5, abs=1e-6)
    # A bias of attention's keys has no gradient but rounding, and Adam makes steps of that: hence the absolute part
    assert uneven["weights"] == pytest.approx(whole["weights"], rel=1e-5, abs=1e-5)


@pytest.fixture(scope="module")
def world(toy_world: World) -> World:
    return toy_world


@pytest.fixture(scope="module")
def sft(sft_run: Path) -> Path:
    return sft_run


@pytest.fixture(scope="module")
def rl(sft: Path, world: World) -> Path:
    """Two HDPO steps of two mini-batches on two ranks with vLLM; the run's folder."""
    done = accelerate("launch/train_rl.py", rl_settings(sft, world, "rl", eval__after="true"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "parity before the first step" in done.stdout + done.stderr
    return sft.parent / "rl"


def test_sft_lowers_its_loss_and_leaves_a_plain_model_folder(sft: Path) -> None:
    losses = [row["sft/loss"] for row in read_metrics(sft / "metrics.jsonl")]
    assert len(losses) == 24 and losses[-1] < losses[0] / 4
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {f.name for f in step_folders(sft)[-1].iterdir()}


def test_rl_on_two_zero3_ranks_with_vllm_samples_what_the_trainer_computes_after_every_sync(rl: Path) -> None:
    rows = read_metrics(rl / "metrics.jsonl")
    assert [row["step"] for row in rows if "actor/grad_norm" in row] == [1, 2]
    for row in rows[:2]:   # the second step samples with weights that two optimizer steps have changed
        assert row["mismatch/ratio_max"] < 1 + 1e-3 and row["mismatch/k3"] < 1e-8
        assert row["end/infrastructure"] == row["end/aborted"] == 0.0
    assert rows[0]["hdpo/kl"] > 0 and rows[1]["hdpo/kl"] > 0, "each step has a mini-batch that follows an update"


def test_rl_makes_real_tool_calls_and_dumps_every_rollout_with_its_images(rl: Path) -> None:
    dumped = read_rollouts(rl / "rollouts" / "step_000001.parquet")
    assert len(dumped) == 8 * 4
    calls = [call for row in dumped for call in row.calls]
    assert sum(call["ok"] for call in calls) > len(calls) / 2 > 0
    assert all(len(row.token_ids) == len(row.mask) == len(row.log_probs) for row in dumped)
    assert any(row.images for row in dumped)
    assert json.loads((rl / "summary.json").read_text())["rl"]["rows"] == 20


def test_a_kept_step_is_trained_again_to_the_same_gradient_bit_for_bit(rl: Path) -> None:
    done = accelerate("launch/replay.py", [str(rl), "--step", "2"])
    assert done.returncode == 0, done.stderr[-3000:]
    recorded = next(row for row in read_metrics(rl / "metrics.jsonl") if row["step"] == 2)
    replayed = json.loads((rl / "replay" / "step_000002" / "result.json").read_text())["replayed"]
    assert recorded["actor/grad_norm"] > 0
    for name in ("actor/grad_norm", "hdpo/kl", "hdpo/q_size_mean", "hdpo/tool_advantage_mass", "mismatch/k3",
                 "reward/score/mean"):
        assert replayed[name] == recorded[name], name
    assert "numbers are the same, to the last bit" in done.stdout and "differs" not in done.stdout
    assert {"checkpoints", "rollouts"} <= {path.name for path in rl.iterdir()} and len(step_folders(rl)) == 2


def test_an_evaluation_by_itself_gives_the_rows_and_figures_of_the_runs_own_on_any_number_of_ranks(
        rl: Path, sft: Path, world: World) -> None:
    """Two ranks share their prompts as they come; one rank is `hdpo eval` without a launcher."""
    def evaluated(run: str) -> tuple[list[tuple], dict]:
        rows = read_rollouts(sft.parent / run / "eval" / "rl.parquet")
        seen = sorted((row.task_id, row.token_ids, row.end, row.verdict, row.reward_accuracy, row.num_tool_calls) for row in rows)
        summary = json.loads((sft.parent / run / "summary.json").read_text())["rl"]
        for part in (summary, *summary["families"].values(), *summary["need"].values()):
            assert part.pop("seconds") > 0
        return seen, summary

    def arguments(run: str) -> list[str]:
        return rl_settings(sft, world, run, model__path=step_folders(rl)[-1], run__deterministic="false")

    two = accelerate("launch/evaluate.py", arguments("two"), 2)
    one = subprocess.run([sys.executable, "-m", "hdpo", "eval", *arguments("one")], cwd=ROOT, text=True, capture_output=True,
                         env=os.environ | cpu_environment(1), timeout=300)
    for done in (two, one):
        assert done.returncode == 0 and "tool needed" in done.stdout, done.stderr[-3000:]
    (rows, summary), (rows_of_two, summary_of_two), (rows_of_one, summary_of_one) = map(evaluated, ("rl", "two", "one"))
    assert len(rows) == 20 and rows_of_two == rows and rows_of_one == rows
    assert summary_of_two == summary_of_one == summary


def test_a_resumed_run_takes_the_same_next_step_bit_for_bit(rl: Path, sft: Path, world: World) -> None:
    again = rl.parent / "again"
    (again / "checkpoints").mkdir(parents=True)
    shutil.copytree(rl / "checkpoints" / "step_000001", again / "checkpoints" / "step_000001")
    shutil.copy(rl / "metrics.jsonl", again)
    done = accelerate("launch/train_rl.py", rl_settings(sft, world, "again"))
    assert done.returncode == 0, done.stderr[-3000:]
    weights = [(run / "checkpoints" / "step_000002" / "model.safetensors").read_bytes() for run in (rl, again)]
    assert weights[0] == weights[1]
    tokens = [[row.token_ids for row in read_rollouts(run / "rollouts" / "step_000002.parquet")] for run in (rl, again)]
    assert tokens[0] == tokens[1]
    assert [row["step"] for row in read_metrics(again / "metrics.jsonl") if "actor/lr" in row] == [1, 2]


def test_the_transformers_engine_passes_the_same_gate_and_trains_on_a_shared_queue_with_dynamic_sampling(
        sft: Path, world: World) -> None:
    done = accelerate("launch/train_rl.py", rl_settings(
        sft, world, "hf", rollout__engine="hf", optim__steps=1, run__deterministic="false", rollout__dynamic_sampling=2))
    assert done.returncode == 0, done.stderr[-3000:]
    row = read_metrics(sft.parent / "hf" / "metrics.jsonl")[0]
    dumped = read_rollouts(sft.parent / "hf" / "rollouts" / "step_000001.parquet")
    assert len(dumped) == 4 * (8 + row["rollout/groups_dropped"]) and row["rollout/groups_with_signal"] <= 8
    shares = [row[f"rollout/share_{name}"] for name in ("engine", "tools", "ranks")]
    assert all(0 <= share <= 1 for share in shares) and 0.3 < sum(shares) < 1.01
    assert row["mismatch/ratio_max"] < 1 + 1e-3 and row["actor/grad_norm"] > 0


def test_a_checkpoint_of_another_configuration_is_refused_in_one_line(rl: Path, sft: Path, world: World) -> None:
    done = accelerate("launch/train_rl.py", rl_settings(sft, world, "rl", hdpo__w_tool=0.5))
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if "error: " in line]     # once, though both ranks have it
    assert "belongs to another configuration: hdpo.w_tool was 0.15, is 0.5" in line
