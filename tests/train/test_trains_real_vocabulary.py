"""SFT, RL with vLLM and the export of a model with the published vocabulary: 151,936 rows of its head, 267 without a token."""
from __future__ import annotations

from pathlib import Path

import pytest
from launching import accelerate, settings
from real_vocabulary import HEAD

from hdpo.state.dump import read_rollouts
from hdpo.state.folders import step_folders
from hdpo.toyworld.world import World
from hdpo.train.jsonl import read_metrics

pytestmark = [pytest.mark.engine, pytest.mark.slow]
SMALL = {"model__min_pixels": 65536, "model__max_pixels": 65536, "data__max_prompt_tokens": 512,
         "rollout__max_response_tokens": 256, "batch__tokens_per_micro_batch": 1024,
         "checkpoint__every_steps": 2, "log__tensorboard": "false"}


def test_sft_then_two_steps_of_rl_with_vllm_and_a_plain_model_folder(
        real_vocabulary_folder: Path, toy_world: World, tmp_path: Path) -> None:
    done = accelerate("launch/train_sft.py", ["--config", "demo_sft", *settings(**SMALL | {
        "run__folder": tmp_path, "run__name": "sft", "model__path": real_vocabulary_folder,
        "data__train": f"[{toy_world.demos}]", "optim__steps": 2, "optim__rows_per_step": 4, "optim__lr": 1e-4})], ranks=1)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len([row for row in read_metrics(tmp_path / "sft" / "metrics.jsonl") if "sft/loss" in row]) == 2

    done = accelerate("launch/train_rl.py", ["--config", "demo_rl", *settings(**SMALL | {
        "run__folder": tmp_path, "run__name": "rl", "model__path": step_folders(tmp_path / "sft")[-1],
        "data__train": f"[{toy_world.train}]", "data__val": f"[{toy_world.val}]", "tools__text_index": toy_world.text_index,
        "tools__image_index": toy_world.image_index, "rollout__prompts_per_step": 4, "optim__mini_batch_prompts": 2,
        "rollout__group_size": 2, "rollout__max_turn_tokens": 24, "rollout__max_num_seqs": 8, "optim__steps": 2,
        "optim__warmup_steps": 0, "eval__before": "false", "eval__after": "false"})], ranks=1)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "parity before the first step" in done.stdout + done.stderr
    assert [row["step"] for row in read_metrics(tmp_path / "rl" / "metrics.jsonl") if "actor/grad_norm" in row] == [1, 2]

    folder = step_folders(tmp_path / "rl")[-1]
    dumped = read_rollouts(tmp_path / "rl" / "rollouts", columns=["token_ids"])
    assert len(dumped) == 16 and max(max(row.token_ids) for row in dumped) < HEAD - 267      # no id without a token

    from transformers import AutoProcessor, Qwen3VLForConditionalGeneration
    model = Qwen3VLForConditionalGeneration.from_pretrained(folder, local_files_only=True)
    assert model.lm_head.weight.shape[0] == HEAD
    processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    assert processor.tokenizer.encode("Hello world") == [9707, 1879]
    assert (folder / "tokenizer.json").read_bytes() == (real_vocabulary_folder / "tokenizer.json").read_bytes()
