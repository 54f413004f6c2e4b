"""Settings: one tree, known fields, one-line errors, the reference's environment variables."""
from __future__ import annotations

from pathlib import Path

import pytest

from hdpo.config import Config
from hdpo.config_file import describe_fields, dump_config, field_paths, load_config
from hdpo.errors import ConfigError

CONFIGS = Path(__file__).resolve().parents[1] / "launch" / "configs"

FIELDS = """
run.name run.folder run.seed run.deterministic run.resume run.hang_timeout_s run.stuck_timeout_s
model.path model.dtype model.attention model.gradient_checkpointing model.freeze model.lora_rank
model.lora_alpha model.lora_targets model.min_pixels model.max_pixels
data.train data.val data.mix data.cache data.image_root data.insert_markers data.max_prompt_tokens data.bad_row data.shuffle
rollout.engine rollout.prompts_per_step rollout.group_size rollout.temperature rollout.dynamic_sampling
rollout.max_turns rollout.max_response_tokens
rollout.max_turn_tokens rollout.max_observation_tokens rollout.max_images rollout.max_seconds rollout.max_num_seqs
rollout.max_batched_tokens rollout.kv_cache_gib rollout.gpu_memory rollout.tensor_parallel rollout.enforce_eager
tools.url tools.allowed tools.sandbox tools.call_timeout_s tools.python_timeout_s tools.retries tools.max_image_searches
tools.search_provider tools.text_index tools.image_index tools.image_cache tools.search_results
reward.answer_weight reward.format_weight reward.rules reward.judge reward.cross_check reward.max_unscored
judge.base_url judge.model judge.panel judge.concurrency judge.timeout_s judge.deadline_s judge.votes judge.cache
judge.max_prediction_chars judge.max_tokens judge.extra_body
hdpo.w_acc hdpo.w_tool hdpo.tool_estimator hdpo.scale hdpo.aggregation hdpo.clip_low hdpo.clip_high hdpo.dual_clip
hdpo.importance hdpo.importance_cap hdpo.importance_range hdpo.tool_norm hdpo.surrogate hdpo.entropy_coef
hdpo.mask_truncated
optim.steps optim.lr optim.schedule optim.warmup_steps optim.betas optim.weight_decay optim.grad_clip optim.offload
optim.max_skipped optim.rows_per_step optim.mini_batch_prompts optim.ppo_epochs
batch.tokens_per_micro_batch batch.patches_per_micro_batch batch.head_chunk_tokens batch.share_prompts
sync.group_mib sync.checksum_every sync.canary_every sync.parity_tolerance checkpoint.every_steps checkpoint.keep
checkpoint.best
eval.every_steps eval.rows eval.before eval.after eval.label_before eval.label_after
log.tensorboard log.wandb log.rollouts_every log.samples
""".split()


def test_the_list_of_fields_is_the_one_written_here() -> None:
    """A new knob is added here in the same commit, so that knobs are counted."""
    assert field_paths() == FIELDS


def test_every_field_explains_itself_in_one_sentence() -> None:
    assert all(text.endswith(".") for _, _, text in describe_fields())


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda f: f.stem)
def test_every_shipped_configuration_is_valid_and_reads_back_the_same(file: Path, tmp_path: Path) -> None:
    config = load_config(file, environment={})
    (tmp_path / "copy.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "copy.yaml", environment={}) == config


def test_the_8b_configuration_has_the_references_hyper_parameters() -> None:
    c = load_config(CONFIGS / "metis_8b_rl.yaml", environment={})
    assert (c.rollout.prompts_per_step, c.rollout.group_size, c.optim.mini_batch_prompts, c.optim.steps) == (128, 16, 64, 200)
    assert (c.optim.lr, c.optim.betas, c.optim.weight_decay, c.optim.grad_clip) == (1e-6, (0.9, 0.999), 0.01, 1.0)
    assert (c.hdpo.w_acc, c.hdpo.w_tool, c.hdpo.clip_low, c.hdpo.clip_high, c.hdpo.dual_clip) == (1.0, 0.15, 0.2, 0.2, 3.0)
    assert (c.data.max_prompt_tokens, c.rollout.max_response_tokens, c.rollout.max_turns) == (24576, 16384, 10)
    assert c.max_model_len == 40960


@pytest.mark.parametrize(("overrides", "message"), [
    (["hdpo.wtool=1"], "unknown key hdpo.wtool; did you mean hdpo.w_tool?"),
    (["optim.lr=fast"], "optim.lr: Input should be a valid number"),
    (["w_tool"], "expected KEY=VALUE"),
    (["rollout.tensor_parallel=0"], "rollout.tensor_parallel: Input should be greater than or equal to 1"),
    (["rollout.group_size=1"], "group_size must be at least 2"),
    (["rollout.prompts_per_step=100"], "must be a multiple of optim.mini_batch_prompts"),
])
def test_a_bad_override_is_one_line_that_names_the_key(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(None, overrides, environment={})
    assert message in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_key_in_a_file_names_file_and_nearest_key(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("rollout: {group_sizes: 4}\n")
    with pytest.raises(ConfigError, match=r"bad.yaml: unknown key rollout.group_sizes; did you mean rollout.group_size\?"):
        load_config(tmp_path / "bad.yaml", environment={})


def test_overrides_beat_files_and_files_beat_the_environment(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: {path: from-file}\n")
    environment = {"MODEL_PATH": "from-env", "TRAIN_DATA": "[a.parquet, 'b.parquet']", "REMOTE_TOOL_SERVER_URL": "http://t"}
    config = load_config(tmp_path / "run.yaml", ["optim.lr=1e-4"], environment)
    assert config.model.path == "from-file"
    assert config.data.train == ["a.parquet", "b.parquet"]
    assert config.tools.url == "http://t" and config.optim.lr == 1e-4
    assert load_config(tmp_path / "run.yaml", ["model.path=from-set"], environment).model.path == "from-set"


def test_secrets_of_the_environment_never_enter_a_configuration() -> None:
    environment = {name: "sk-secret" for name in ("JUDGE_API_KEY", "SERPER_API_KEY", "WANDB_API_KEY", "BRIGHTDATA_API_TOKEN")}
    assert "sk-secret" not in dump_config(load_config(None, (), environment))


def test_a_configuration_cannot_be_changed_in_place() -> None:
    with pytest.raises(Exception, match="frozen"):
        Config().optim.lr = 1.0   # type: ignore[misc]
