"""Two shipped files for the 8B model: the reference's own run, and what we recommend. Every difference is a named setting that
README lists with its reason. The tables below are the measure of all three."""
from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from hdpo.config import Config
from hdpo.config.file import load_config
from hdpo.config.yaml import field_paths

ROOT = Path(__file__).resolve().parents[1]
PAPER, OURS = "metis_8b_paper", "metis_8b_rl"

REFERENCE: dict[str, Any] = {
    "run.seed": 1,
    "model.min_pixels": 4 * 32 * 32, "model.max_pixels": 16384 * 32 * 32, "model.max_tool_pixels": 5120 * 32 * 32,
    "model.tell_sizes": False, "model.freeze": [], "model.lora_rank": 0, "model.gradient_checkpointing": True,
    "rollout.prompts_per_step": 128, "rollout.group_size": 16, "rollout.temperature": 1.0, "rollout.dynamic_sampling": 0,
    "rollout.max_turns": 10, "rollout.max_response_tokens": 16384, "rollout.max_turn_tokens": 16384,
    "rollout.max_observation_tokens": 8192, "rollout.max_images": 1000, "rollout.max_seconds": 1e9,
    "rollout.gpu_memory": 0.7, "rollout.max_num_seqs": 2048,
    "rollout.max_batched_tokens": 131072, "rollout.enforce_eager": True, "rollout.tensor_parallel": 1,
    "data.max_prompt_tokens": 24576, "data.bad_row": "stop", "data.shuffle": True,
    "tools.layout": "reference", "tools.allowed": ["python", "text_search", "image_search"], "tools.call_timeout_s": 400.0,
    "tools.python_timeout_s": 20.0, "tools.search_results": 10, "tools.max_image_searches": 1, "tools.retries": 1,
    "reward.answer_weight": 0.9, "reward.format_weight": 0.1, "reward.rules": {"*": "judge"}, "reward.judge": True,
    "reward.cross_check": 0.0, "reward.max_unscored": 1.0,
    "judge.timeout_s": 30.0, "judge.votes": 1, "judge.panel": [],
    "hdpo.w_acc": 1.0, "hdpo.w_tool": 0.15, "hdpo.tool_estimator": "conditional", "hdpo.tool_norm": "effective",
    "hdpo.scale": "std", "hdpo.aggregation": "token_mean", "hdpo.clip_low": 0.2, "hdpo.clip_high": 0.2, "hdpo.dual_clip": 3.0,
    "hdpo.importance": "none", "hdpo.surrogate": "ppo", "hdpo.entropy_coef": 0.0, "hdpo.kl_coef": 0.0,
    "hdpo.mask_truncated": False,
    "optim.steps": 200, "optim.lr": 1e-6, "optim.schedule": "constant", "optim.warmup_steps": 0, "optim.betas": (0.9, 0.999),
    "optim.weight_decay": 0.01, "optim.grad_clip": 1.0, "optim.reduce_dtype": "float32", "optim.offload": False,
    "optim.mini_batch_prompts": 64, "optim.ppo_epochs": 1,
    "batch.tokens_per_micro_batch": 40960, "checkpoint.every_steps": 50, "checkpoint.keep": 0,
    "eval.every_steps": 0, "eval.before": False, "eval.after": True}
"""What the reference's launch script and its defaults say, in our settings. The script limits neither a trajectory's time
(1e9 s) nor its pictures (1,000 are more than its context holds)."""

DIFFERENT: dict[str, tuple[str, str]] = {
    "rollout.max_images": ("1000", "32"), "rollout.max_seconds": ("1e9", "1800"), "rollout.max_num_seqs": ("2048", "256"),
    "rollout.max_batched_tokens": ("131072", "16384"), "rollout.enforce_eager": ("true", "false"),
    "data.bad_row": ("stop", "skip"), "tools.retries": ("1", "2"), "reward.rules": ("judge", "auto"),
    "reward.cross_check": ("0", "0.02"), "reward.max_unscored": ("1", "0.1"), "hdpo.tool_norm": ("effective", "global"),
    "hdpo.importance": ("none", "token"), "checkpoint.keep": ("0", "2")}
"""Settings of the two files that differ: the reference's, ours."""


def value(config: Config, path: str) -> Any:
    for part in path.split("."):
        config = getattr(config, part)
    return config


def shown(value: Any) -> str:
    """As README's table has it."""
    if isinstance(value, dict):
        return str(value["*"])
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}".replace("+0", "") if isinstance(value, float) else str(value)


@pytest.mark.parametrize("path", REFERENCE)
def test_the_papers_file_has_the_references_value(path: str) -> None:
    assert value(load_config(PAPER, (), {}), path) == REFERENCE[path]


def test_the_papers_file_sets_nothing_that_the_table_lacks() -> None:
    given = yaml.safe_load((ROOT / f"launch/configs/{PAPER}.yaml").read_text())
    paths = {f"{section}.{field}" for section, fields in given.items() for field in fields}
    assert paths <= set(REFERENCE) | {"run.name", "tools.sandbox"}


def test_the_two_files_differ_in_the_table_and_nowhere_else() -> None:
    paper, ours = load_config(PAPER, (), {}), load_config(OURS, (), {})
    different = {path: (shown(value(paper, path)), shown(value(ours, path)))
                 for path in field_paths() if value(paper, path) != value(ours, path) and path != "run.name"}
    assert different == DIFFERENT


def test_readme_lists_every_difference_with_both_values_and_a_reason() -> None:
    readme = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| `([a-z_.]+)` \| ([^|]+?) \| ([^|]+?) \| ([^|]{20,}) \|$", readme, re.MULTILINE)
    assert {path: (theirs, mine) for path, theirs, mine, _ in rows} == DIFFERENT
