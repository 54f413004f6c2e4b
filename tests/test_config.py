"""Settings: one tree, known fields, one-line errors, the reference's environment variables."""
from __future__ import annotations

import re
from pathlib import Path

import pytest

from hdpo.config import Config
from hdpo.config.file import describe_fields, dump_config, load_config
from hdpo.config.hints import MEANT
from hdpo.config.yaml import field_paths, kinds
from hdpo.errors import ConfigError

CONFIGS = Path(__file__).resolve().parents[1] / "launch" / "configs"

FIELDS = """
run.name run.folder run.seed run.deterministic run.resume run.resume_from run.allow run.hang_timeout_s run.stuck_timeout_s
run.spool_gib
model.path model.dtype model.attention model.gradient_checkpointing model.freeze model.lora_rank
model.lora_alpha model.lora_targets model.min_pixels model.max_pixels
model.max_tool_pixels model.tell_sizes
data.train data.val data.mix data.cache data.image_root data.insert_markers data.max_prompt_tokens data.bad_row data.shuffle
data.group_by_length
rollout.engine rollout.prompts_per_step rollout.group_size rollout.temperature rollout.dynamic_sampling
rollout.carry_over rollout.carry_max_versions
rollout.max_turns rollout.max_response_tokens
rollout.max_turn_tokens rollout.max_observation_tokens rollout.max_images rollout.max_seconds rollout.max_num_seqs
rollout.max_batched_tokens rollout.kv_cache_gib rollout.gpu_memory rollout.tensor_parallel rollout.enforce_eager
rollout.sleep rollout.image_cache_gib
tools.url tools.allowed tools.own tools.mcp
tools.sandbox tools.i_trust_the_model tools.container_memory_mib tools.sessions_per_container
tools.server_processes tools.picture_store_mib
tools.call_timeout_s tools.python_timeout_s tools.retries
tools.layout
tools.max_image_searches tools.search_provider tools.text_index tools.image_index tools.image_cache tools.search_results
reward.answer_weight reward.format_weight reward.rules reward.function
reward.function_timeout_s reward.tool_cost reward.judge reward.cross_check reward.max_unscored
judge.base_url judge.model judge.panel judge.concurrency judge.timeout_s judge.deadline_s judge.votes judge.cache
judge.max_prediction_chars judge.max_tokens judge.extra_body
hdpo.w_acc hdpo.w_tool hdpo.tool_estimator hdpo.scale hdpo.aggregation hdpo.clip_low hdpo.clip_high hdpo.dual_clip
hdpo.importance hdpo.importance_cap hdpo.importance_range hdpo.tool_norm hdpo.surrogate hdpo.entropy_coef
hdpo.kl_coef hdpo.mask_truncated
optim.steps optim.lr optim.schedule optim.warmup_steps optim.betas optim.weight_decay optim.grad_clip optim.reduce_dtype
optim.offload optim.max_skipped optim.epochs optim.rows_per_step optim.mini_batch_prompts optim.ppo_epochs
batch.tokens_per_micro_batch batch.patches_per_micro_batch batch.head_chunk_tokens batch.share_prompts
sync.group_mib sync.checksum_every sync.canary_every sync.parity_tolerance checkpoint.every_steps checkpoint.keep
checkpoint.weights_every_steps checkpoint.best
eval.every_steps eval.tasks eval.rows eval.before eval.after eval.label_before eval.label_after
log.tensorboard log.wandb log.rollouts_every log.rollouts_gib log.samples
curation.sources curation.out curation.chunk_rows curation.concurrency curation.execution.mismatch
curation.execution.search curation.execution.number_tolerance curation.execution.picture_tolerance
curation.necessity.samples curation.necessity.threshold curation.necessity.temperature curation.necessity.system
curation.necessity.tool_rows_only curation.judgement.visual_relevance curation.judgement.reasoning_coherence
curation.judgement.tool_rationale curation.judgement.attempts curation.judgement.send_images
curation.judgement.max_images curation.judgement.max_chars
curation.decontamination.data curation.decontamination.benchmarks curation.decontamination.action
curation.decontamination.unknown curation.decontamination.picture_bits curation.decontamination.picture_likeness
curation.decontamination.question_ngram curation.decontamination.question_share curation.decontamination.question_words
curation.prompts.count curation.prompts.shares curation.prompts.system
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
    (["rollout.group_size=1"], "rollout.group_size: Input should be greater than or equal to 2"),
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


# -- bounds --------------------------------------------------------------------------------------------------------------


def refused(*overrides: str, file: Path | str | None = None, **environment: str) -> str:
    """The one line with which a configuration is refused."""
    with pytest.raises(ConfigError) as error:
        load_config(file, overrides, environment=environment)
    assert "\n" not in str(error.value)
    return str(error.value)


NUMBERS = [path for path, kind in kinds().items() if kind in (int, float)]


@pytest.mark.parametrize("path", NUMBERS)
def test_no_number_is_without_bounds(path: str) -> None:
    """The smallest and the largest that a user could type by mistake, and what is no number at all."""
    for value in ("-1e-9", "-1", ".inf", ".nan", "1e400", "true", "[1]", "{a: 1}", "null", "x", ""):
        assert f"--set {path}={value}: {path}: " in refused(f"{path}={value}"), value
    if kinds()[path] is int:
        assert "1e30" in refused(f"{path}=1e30") and str(2**63) in refused(f"{path}={2**63}")


@pytest.mark.parametrize("edit", [
    "rollout.prompts_per_step=0", "optim.mini_batch_prompts=0", "rollout.max_num_seqs=0", "rollout.temperature=0",
    "rollout.temperature=2.5", "rollout.gpu_memory=70", "rollout.group_size=1", "hdpo.clip_low=1", "hdpo.dual_clip=0.5",
    "optim.betas=[0.9, 1.5]", "optim.betas=[0.9]", "hdpo.importance_range=[1.1, 1.2]", "optim.steps=0", "reward.max_unscored=2",
    "checkpoint.every_steps=0", "optim.lr=5", "run.seed=4294967296", "rollout.max_response_tokens=0", "run.name=a/b",
    "run.name=", "run.name=..", "judge.base_url=localhost:8000", "tools.url=x", "tools.allowed=[pyhton]",
    "reward.rules={'*': txt}", "model.path=a\0b", 'data.train=["a\\tb"]'])
def test_what_cannot_be_meant_is_refused_where_it_was_said(edit: str) -> None:
    assert refused(edit).startswith("--set {}: {}".format(edit.replace("\0", "\\x00"), edit.partition("=")[0]))


@pytest.mark.parametrize(("overrides", "problem"), [
    (["rollout.prompts_per_step=100"], "rollout.prompts_per_step (100) must be a multiple of optim.mini_batch_prompts (64)"),
    (["optim.steps=3", "model.min_pixels=9000", "model.max_pixels=8000"], "model.min_pixels (9000) must not exceed model.max"),
    (["eval.every_steps=5"], "eval.every_steps (5) needs data.val"),
    (["eval.tasks=[val.parquet]"], "eval.tasks: nothing says when"),
    (["data.mix=[1, 2]", "data.group_by_length=8"], "which data.group_by_length would undo"),
    (["hdpo.w_acc=0", "hdpo.w_tool=0"], "nothing would be trained")])
def test_a_contradiction_is_blamed_on_what_was_said_last(overrides: list[str], problem: str) -> None:
    line = refused(*overrides)
    assert line.startswith(f"--set {overrides[-1]}: ") and problem in line


@pytest.mark.parametrize("name", ["eval/sft_loss", "sft/loss", "actor/pg_loss/acc", "actor/ppo_kl", "eval/blind_call_rate",
                                  "eval/unscored", "time/step", "mismatch/k3", "actor/grad_norm"])
def test_the_best_checkpoint_has_the_highest_of_a_number_that_is_better_so_or_the_lowest_by_a_minus(name: str) -> None:
    assert f"checkpoint.best: {name} is better the lower it is" in refused(f"checkpoint.best={name}")
    assert load_config(None, [f"checkpoint.best=-{name}"], environment={}).checkpoint.best == f"-{name}"
    for good in ("eval/accuracy", "eval/visual_loss_detail_questions/accuracy", "reward/score/mean"):
        load_config(None, [f"checkpoint.best={good}"], environment={})


def test_each_problem_names_who_said_it(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("optim:\n  steps: 10\n  lr: -1\n")
    assert refused(file=file) == f"{file}: optim.lr: Input should be greater than or equal to 0 (got -1) (line 3)"
    assert refused("rollout.group_size=0", file=None).startswith("--set rollout.group_size=0: ")
    assert refused(JUDGE_BASE_URL="judge:8000").startswith("environment variable JUDGE_BASE_URL: judge.base_url: must begin with")
    file.write_text("rollout:\n  prompts_per_step: 100\n")
    assert refused(file=file).startswith(f"{file}: rollout.prompts_per_step (100) must be") and "(line 2)" in refused(file=file)
    other = tmp_path / "second.yaml"
    other.write_text("optim: {mini_batch_prompts: 30}\n")
    with pytest.raises(ConfigError, match=r"second.yaml: rollout.prompts_per_step \(100\) must"):
        load_config([file, other], environment={})


@pytest.mark.parametrize("word", ["1e5", "yes", "20261127", "2026-11-27", "null", "~", "0x10", "[x]", "a: b", "0.10", "on"])
def test_text_stays_the_text_that_was_written(word: str, tmp_path: Path) -> None:
    assert load_config(None, [f"run.name={word}"], {}).run.name == word
    assert load_config(None, [f'run.name="{word}"'], {}).run.name == word
    if word not in ("null", "~", "[x]", "a: b"):     # in a file these mean nothing, a list and a mapping
        (tmp_path / "run.yaml").write_text(
            f"run: {{name: {word}}}\ndata: {{train: [{word}, b]}}\nreward: {{rules: {{{word}: text}}}}")
        config = load_config(tmp_path / "run.yaml", (), {})
        assert (config.run.name, config.data.train, config.reward.rules) == (word, [word, "b"], {word: "text"})


def test_an_empty_text_a_section_without_fields_and_a_field_without_value_say_nothing(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("judge:\nmodel:\n  path:\n  dtype: float32\n")
    config = load_config(tmp_path / "run.yaml", ["judge.base_url="], {"MODEL_PATH": "/m", "JUDGE_BASE_URL": "http://j/v1"})
    assert (config.model.path, config.model.dtype, config.judge.base_url) == ("/m", "float32", "")
    (tmp_path / "empty.yaml").write_text("")
    assert load_config(tmp_path / "empty.yaml", (), {}) == Config()


@pytest.mark.parametrize(("text", "message"), [
    ("optim: {lr: 1.0e-4}\nrollout: {}\noptim: {lr: 1.0e-6}\n", "optim is given twice (lines 1 and 3)"),
    ("optim:\n  lr: 1.0e-4\n  steps: 2\n  lr: 1.0e-6\n", "optim.lr is given twice (lines 2 and 4)"),
    ("reward:\n  rules:\n    web: text\n    web: list\n", "web is given twice (lines 3 and 4)"),
    ("optim.lr: 1.0e-4\n", "optim.lr: in a file write it in its section, optim: {lr: ...} (line 1)"),
    ("model: /models/8b\n", "model is a section, expected a mapping (line 1)"),
    ("- a\n", "expected a mapping of sections (line 1)"),
    ("optim: {? [a] : 1}\n", "must be a word (line 1)"),
    ("a: &a {b: *a}\n", "unknown key a"),
    ("data: {train: &a [*a]}\n", "data.train.0: Input should be a valid string"),
    ("run: {seed: 2026-13-45}\n", "not valid YAML: month must be in 1..12"),
    ("data: {train: " + "[" * 3000, "not valid YAML: nested too deeply"),
    ("run:\n\tname: x\n", "not valid YAML: "), ("run: {name: x\n", "not valid YAML: "), ("a: 1\n---\nb: 2\n", "not valid YAML: "),
    ("run: {name: !!python/object:os.system x}", "not valid YAML: ")])
def test_a_file_that_says_it_wrongly_is_one_line_with_its_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    assert f"run.yaml: {message}" in refused(file=tmp_path / "run.yaml").replace("run.yaml: a key ", "run.yaml: ").replace(
        "optim. must", "must")


def test_a_later_file_wins_field_by_field_and_anchors_may_be_merged(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("optim: &o {lr: 0.1, steps: 7}\n")
    (tmp_path / "b.yaml").write_text("optim: {lr: 0.2}\nhdpo: {w_tool: 0.5}\n")
    config = load_config([tmp_path / "a.yaml", tmp_path / "b.yaml", "demo_sft"], ["optim.steps=9"], {})
    assert (config.optim.lr, config.optim.steps, config.hdpo.w_tool, config.optim.rows_per_step) == (6e-4, 9, 0.5, 64)
    (tmp_path / "c.yaml").write_text("optim: {<<: {lr: 0.1, steps: 7}, lr: 0.2}\n")
    assert load_config(tmp_path / "c.yaml", (), {}).optim.lr == 0.2


@pytest.mark.parametrize("name", [
    "metis_8b_rl", "metis_8b_rl.yaml", "launch/configs/metis_8b_rl.yaml", "configs/metis_8b_rl.yaml"])
def test_shipped_files_are_found_by_name_from_any_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config(name, (), {}).run.name == "metis-8b-rl"
    shipped = "demo_rl, demo_sft, metis_8b_paper, metis_8b_rl"
    assert f"metis_9b: no such configuration file; shipped ones are {shipped}" in refused(file="metis_9b")


@pytest.mark.parametrize(("overrides", "message"), [
    (["run.deterministic=true"], "where a step ends depends on time, which run.deterministic can't repeat"),
    (["rollout.dynamic_sampling=1"], "rollout.dynamic_sampling both start further prompts; set one of them to 0"),
    (["hdpo.importance=none"], "hdpo.importance must correct for; set it to token")])
def test_what_cannot_be_had_with_carried_rollouts_is_refused_in_one_line_that_names_both(
        overrides: list[str], message: str) -> None:
    line = refused("rollout.carry_over=0.5", *overrides)
    assert "rollout.carry_over" in line and message in line
    load_config(None, overrides, {})
    load_config(None, ["rollout.carry_over=0.5"], {})


# -- hints ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "meant"), [
    ("optim.learning_rate", "optim.lr"), ("learning_rate", "optim.lr"), ("rollout.lr", "optim.lr"), ("lr", "optim.lr"),
    ("optim.learningRate", "optim.lr"), ("optim.learning-rates", "optim.lr"), ("rollout.n", "rollout.group_size"),
    ("rollout.max_tokens", "rollout.max_turn_tokens"),
    ("num_generations", "rollout.group_size"), ("data.batch_size", "rollout.prompts_per_step"),
    ("max_length", "data.max_prompt_tokens"),
    ("hdpo.beta", "hdpo.kl_coef"), ("kl_coef", "hdpo.kl_coef"), ("ref_model", "there is none: the reference of hdpo.kl_coef is"),
    ("temperature", "rollout.temperature"), ("rollout.temprature", "rollout.temperature"), ("rollout.top_p", "there is none"),
    ("hdpo.wtool", "hdpo.w_tool"), ("optim.max_steps", "optim.steps"), ("optimizer.lr", "optim.lr"), ("optimiser", "optim"),
    ("rollout.gpu_memory_utilization", "rollout.gpu_memory"), ("checkpoint.save_steps", "checkpoint.every_steps"),
    ("rollout.zzzzzz", "rollout has engine, prompts_per_step"), ("zzzzzz", "sections are run, model"),
    ("optim", "optim has steps, lr")])
def test_a_wrong_name_leads_to_the_field_people_mean(key: str, meant: str) -> None:
    line = refused(f"{key}=1")
    assert line.startswith(f"--set {key}=1: unknown key {key}; ") and meant in line


def test_every_hint_leads_to_fields_that_exist_and_no_field_hides_behind_a_hint() -> None:
    known = {*field_paths(), *Config.model_fields}
    for meant, names in MEANT.items():
        assert set(re.findall(r"[a-z]+\.[a-z_]+|^[a-z]+$", meant)) <= known, meant
        assert not {path.rpartition(".")[2] for path in known} & set(names.split()), meant
