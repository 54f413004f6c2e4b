"""rollout.carry_over on two ranks with vLLM and the embedded world: the whole run, killed in its middle."""
from __future__ import annotations

import io
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from launching import BASE, Running, command, kill_as_a_lost_machine, settings
from local_policy import LocalPolicy
from PIL import Image

from hdpo.adapters.chat_format import open_chat
from hdpo.compose.policy import build_packing
from hdpo.config.file import load_config
from hdpo.state.dump import DumpedRollout, read_rollouts
from hdpo.state.records import Records
from hdpo.toyworld.world import World
from hdpo.train.canary import compare_log_probs
from hdpo.train.carry import FILES
from hdpo.train.jsonl import read_metrics
from hdpo.types import Sample

pytestmark = [pytest.mark.engine, pytest.mark.slow]

STEPS, PROMPTS, GROUP = 4, 4, 4


def start(folder: Path, world: World, phases: Path) -> Running:
    arguments = ["--config", "launch/configs/demo_rl.yaml", *settings(**{
        "run__folder": folder, "run__name": "run", "model__path": BASE, "data__train": f"[{world.train}]",
        "tools__text_index": world.text_index, "tools__image_index": world.image_index, "eval__before": "false",
        "eval__after": "false", "rollout__prompts_per_step": PROMPTS, "optim__mini_batch_prompts": 2,
        "rollout__group_size": GROUP,
        "rollout__carry_over": 0.5, "rollout__engine": "vllm", "rollout__max_num_seqs": 4, "optim__steps": STEPS,
        "optim__warmup_steps": 0, "optim__lr": 3e-3, "checkpoint__every_steps": 1, "checkpoint__keep": 0})]
    return Running(command("tests/support/ranks/watched_rl.py", arguments), folder / "log", {"PHASES": str(phases)})


def entered(phases: Path, phase: str, times: int) -> bool:
    return phases.exists() and phases.read_text().split().count(phase) >= times


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, toy_world: World) -> tuple[Path, Records]:
    """The folder of a run that was killed with SIGKILL in its third step and went on; what was carried into that step."""
    folder = tmp_path_factory.mktemp("runs")
    phases = folder / "phases"
    running = start(folder, toy_world, phases)
    try:
        running.until(partial(entered, phases, "rollout", 3), timeout=400)
        running.until((folder / "run" / "checkpoints" / "step_000002").is_dir, timeout=100)
        kill_as_a_lost_machine(running)
        carried = Records((folder / "run" / "checkpoints" / "step_000002" / "trainer").glob(FILES), {})
        running = start(folder, toy_world, phases)
        assert running.end(400) == 0, running.text()[-3000:]
    finally:
        running.kill()
    return folder / "run", carried


def dumped(run: Path) -> list[DumpedRollout]:
    return [row for step in range(1, STEPS + 1) for row in read_rollouts(run / "rollouts" / f"step_{step:06d}.parquet")]


def test_a_run_killed_with_carried_trajectories_goes_on_and_loses_none(killed: tuple[Path, Records]) -> None:
    run, carried = killed
    rows = dumped(run)
    assert Counter(row.step for row in rows) == {step: PROMPTS * GROUP for step in range(1, STEPS + 1)}
    assert Counter(Counter(row.task_id for row in rows).values()).keys() == {GROUP}, "each prompt is trained once"
    assert len(carried), "something was carried"
    later = {(row.task_id, row.sample_index): row for row in rows if row.step > 2}
    for key in carried:
        record = carried[key]
        past = record.so_far if key in carried.carried else record   # type: ignore[union-attr]
        row = later[past.task.id, past.sample_index]
        length = len(past.token_ids)
        assert row.token_ids[:length] == past.token_ids and row.weight_versions[:length] == past.versions
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl") if "carry/share" in row] == list(range(1, STEPS + 1))


def test_every_token_was_sampled_by_the_weights_that_the_dump_names_with_the_log_prob_it_says(
        killed: tuple[Path, Records]) -> None:
    run, _ = killed
    config = load_config(run / "config.yaml", environment={})
    chat = open_chat(config.model)
    assert chat.image_token_id is not None
    spec, rows, checked = build_packing(config, chat), dumped(run), Counter[int]()
    assert all(row.step - 1 - min(v for v in row.weight_versions if v >= 0) <= 1 for row in rows)
    for version in range(STEPS):
        policy = LocalPolicy(run / "checkpoints" / f"step_{version:06d}" if version else Path(BASE), chat.image_token_id)
        for row in rows:
            mine = torch.tensor([v == version for v, mask in zip(row.weight_versions, row.mask, strict=True) if mask])
            if not mine.any():
                continue
            vision = chat.vision([Image.open(io.BytesIO(data)) for data in row.images])
            sample = Sample(row.token_ids, row.mask, row.log_probs, (), (), vision, row.prompt_length)
            assert compare_log_probs(policy, sample, spec, chat)[mine].abs().max() < 1e-4   # type: ignore[arg-type]
            checked[version] += int(mine.sum())
    assert set(checked) == set(range(STEPS))
    mixed = [row for row in rows if len({v for v in row.weight_versions if v >= 0}) > 1]
    assert mixed, "some trajectory holds tokens of two versions"
