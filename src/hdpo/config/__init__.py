"""Settings: one frozen tree, one sentence and a unit per field. `file.py` reads and writes it.

Derived numbers are properties, never second fields. Every number has bounds, and fields that contradict each other are
refused. Unknown keys are errors that name the nearest key. A test holds the list of fields: a new knob edits that list in
the same commit. Imports pydantic only, so that the tool server can read settings without torch.
"""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, field_validator, model_validator

from hdpo.config.curation import CurationConfig
from hdpo.config.rules import rules
from hdpo.config.tools import ToolsConfig
from hdpo.config.types import LARGEST, Address, Beta, Count, Name, Number, RulePolicy, Section, Share


class RunConfig(Section):
    name: Name = Field("run", description="Name of the run; its folder is {folder}/{name}.")
    folder: str = Field("runs", min_length=1, description="Folder that holds all runs.")
    seed: int = Field(1, ge=0, lt=2**32, description="Seed of data order, sampling and initialisation.")
    deterministic: bool = Field(
        False, description="Step the engine only when no tool call is pending, so that a run repeats bit for bit (slower).")
    resume: bool = Field(True, description="Continue from the newest checkpoint in the run's folder; false puts those aside.")
    resume_from: str = Field(
        "", description="Continue from this checkpoint instead of the newest, a step of the run or a folder; later ones are put "
        "aside. Followed once: after the next save the run goes on from its newest.")
    allow: list[str] = Field(
        default_factory=list, description="Settings that may differ from the checkpoint's, for example optim.lr; recorded in the "
        "checkpoints that follow.")
    hang_timeout_s: NonNegativeFloat = Field(
        45.0, description="Silence of a rank after which the others name it and stop, seconds; 0 turns the watch off.")
    stuck_timeout_s: PositiveFloat = Field(
        5400.0, description="Time in which no rank finishes anything (a generation, a verdict, a micro-batch, a phase) "
        "after which the run stops, seconds.")

    spool_gib: NonNegativeFloat = Field(
        50.0, description="Size of the rollouts kept for a resume, GiB over all ranks; beyond it the run goes on and keeps none "
        "until the next checkpoint lets go of the steps it covers; 0 is no limit.")

    @property
    def path(self) -> Path:
        return Path(self.folder) / self.name


class ModelConfig(Section):
    path: str = Field("", description="Hugging Face folder of the starting weights (MODEL_PATH).")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Compute precision; auto is bfloat16 on CUDA and float32 on CPU.")
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = Field(
        "auto", description="Attention of the trainer; auto is flash_attention_2 on CUDA if installed, else sdpa.")
    gradient_checkpointing: bool = Field(True, description="Recompute activations in backward to save memory.")
    freeze: list[str] = Field(
        default_factory=list, description="Parameters that are not trained, by name pattern; model.visual.* is the vision tower.")
    lora_rank: Number = Field(0, description="Rank of low-rank adapters that are trained instead of the weights; 0 is off.")
    lora_alpha: Count = Field(32, description="Adapters are scaled by lora_alpha / lora_rank.")
    lora_targets: list[str] = Field(
        default_factory=lambda: ["*layers.*_proj"],
        description="Linear layers with adapters, as name patterns; the default is all of the language model.")
    min_pixels: Count = Field(4 * 32 * 32, description="Smallest image the model sees, pixels; smaller ones are enlarged.")
    max_pixels: Count = Field(
        16384 * 32 * 32, description="Largest image of a prompt as the model sees it, pixels; tools keep the original.")
    max_tool_pixels: Count = Field(
        5120 * 32 * 32, description="Largest image of a tool as the model sees it, pixels; max_pixels bounds it too.")
    tell_sizes: bool = Field(
        False, description="Write each image's original width and height behind it, in which the tools have it.")


class DataConfig(Section):
    train: list[str] = Field(
        default_factory=list, description="Training rows (TRAIN_DATA): Parquet, JSON, JSON lines, Arrow, CSV or TSV files, "
        "patterns or folders of them, or datasets as owner/name:split.")
    val: list[str] = Field(default_factory=list, description="Held-out rows (VAL_DATA), in the same forms.")
    mix: list[NonNegativeFloat] = Field(
        default_factory=list, description="Weight of each entry of data.train in every step; empty takes each row once an epoch.")
    cache: str = Field(
        "", description="Folder on a disk of the node for memory-mapped copies of the data; empty is one of the user's own in "
        "TMPDIR, /var/tmp or /tmp.")
    image_root: str = Field(
        "", description="Folder in which the data's relative picture paths start, tried before that of their file.")
    insert_markers: bool = Field(
        False, description="Put an <image> marker for each picture before the first user message where a text has none.")
    max_prompt_tokens: Count = Field(24576, description="Longest prompt, tokens with images expanded.")
    bad_row: Literal["skip", "stop"] = Field(
        "skip", description="A row with a broken image or an over-long prompt: skip (named and counted) or stop.")
    shuffle: bool = Field(True, description="Shuffle rows each epoch, from run.seed.")
    group_by_length: Number = Field(
        0, description="Steps whose rows are sorted by length together, so that each has rows of like lengths, in seeded order "
        "(SFT only); 0 is off.")


class RolloutConfig(Section):
    engine: Literal["auto", "vllm", "hf"] = Field("auto", description="Generation engine; auto is vllm if installed.")
    prompts_per_step: Count = Field(128, description="Prompts of one step over all ranks.")
    group_size: int = Field(16, ge=2, le=LARGEST, description="G, rollouts of a prompt.")
    temperature: float = Field(1.0, ge=0.01, le=2, description="Sampling temperature of training rollouts, from 0.01 to 2.")
    dynamic_sampling: Number = Field(
        0, description="Rounds in which groups without any advantage are replaced by further prompts; 0 is off.")
    carry_over: Share = Field(
        0.0, description="Share of further prompts that a step has open: it ends when prompts_per_step groups are "
        "complete, and what is unfinished goes on in the next with its weights; 0 waits for the longest rollout.")
    carry_max_versions: int = Field(
        2, ge=2, le=LARGEST, description="Versions of weights that tokens of a step's groups may come from, its own included; "
        "the step waits for groups that would exceed it (carry_over only).")
    max_turns: Number = Field(10, description="Tool calls a trajectory may make; the generation after the last must answer.")
    max_response_tokens: Count = Field(16384, description="Tokens after the prompt, over all turns and observations.")
    max_turn_tokens: Count = Field(16384, description="Tokens of one generation.")
    max_observation_tokens: Count = Field(8192, description="Tokens of one observation, images expanded; the rest is cut.")
    max_images: Number = Field(32, description="Images in one trajectory, prompt and tools together.")
    max_seconds: PositiveFloat = Field(1800.0, description="Wall clock of one trajectory, seconds; later it is aborted.")
    max_num_seqs: Count = Field(
        256, description="Sequences the engine runs at once, per rank; up to half as many trajectories wait for tools besides.")
    max_batched_tokens: Count = Field(8192, description="Tokens of one engine step.")
    kv_cache_gib: NonNegativeFloat = Field(0.0, description="KV cache per rank, GiB; 0 lets gpu_memory decide.")
    gpu_memory: float = Field(
        0.7, gt=0, lt=1, description="Fraction of device memory for the engine while it is awake (CUDA).")
    tensor_parallel: Count = Field(
        1, description="Ranks of a node that share one vLLM engine, each with a part of its weights; 1 unless a model "
        "and its KV cache don't fit on one device.")
    enforce_eager: bool = Field(
        False, description="Run the engine without CUDA graphs of its decode steps: slower, and 1 to 2 GiB less (CUDA).")
    sleep: Literal["drop", "copy"] = Field(
        "drop", description="What the engine does with its weights while the policy trains: drop them, as each sync sends them "
        "anew, or copy them to the host and back (CUDA).")
    image_cache_gib: NonNegativeFloat = Field(
        4.0, description="Processed images that the engine keeps, GiB of host memory per rank; one of 5 megapixels has "
        "0.06.")


class RewardConfig(Section):
    answer_weight: NonNegativeFloat = Field(0.9, description="Weight of a right answer in the accuracy reward.")
    format_weight: NonNegativeFloat = Field(0.1, description="Weight of a well-formed response in the accuracy reward.")
    rules: dict[str, RulePolicy] = Field(
        default_factory=lambda: dict[str, RulePolicy]({"*": "auto"}),
        description="Rule policy per data_source, '*' for the rest: auto, text, number, choice, yesno, maths, list or judge.")
    function: str = Field(
        "", description="module:name or file.py:name of a function that says what is right, in place of rules and judge.")
    function_timeout_s: PositiveFloat = Field(60.0, description="Wall clock of one call of reward.function, seconds.")
    tool_cost: dict[str, NonNegativeFloat] = Field(
        default_factory=dict, description="What a call of each tool adds to T in 1/(T+1), '*' for the rest; the paper's is 1.")
    judge: bool = Field(True, description="Ask the judge where rules can't say; without it such rollouts are unscored.")
    cross_check: Share = Field(
        0.02, description="Share of answers decided by rules that the judge is asked about too, for the audit file only.")
    max_unscored: Share = Field(0.1, description="Share of unscored rollouts in a step above which the run stops.")


class JudgeConfig(Section):
    base_url: Address = Field("", description="OpenAI-compatible endpoint (JUDGE_BASE_URL).")
    model: str = Field("", description="Model name (JUDGE_MODEL); empty takes the first that /models lists.")
    panel: list[str] = Field(
        default_factory=list, description="Further judges as MODEL@URL, keys in JUDGE_API_KEY_2, _3, ...; the majority counts.")
    concurrency: Count = Field(128, description="Requests in flight per rank and judge.")
    timeout_s: PositiveFloat = Field(30.0, description="Deadline of one request, seconds.")
    deadline_s: PositiveFloat = Field(300.0, description="Deadline of one verdict with all retries, seconds.")
    votes: Count = Field(1, description="Verdicts asked per question; the majority counts.")
    cache: str = Field("", description="SQLite file of verdicts; empty puts it into the run's folder.")
    max_prediction_chars: Count = Field(
        4000, description="Longest prediction shown to the judge, characters; less where its context is shorter.")
    max_tokens: Count = Field(2048, description="Longest reply of the judge with its thinking, tokens.")
    extra_body: dict[str, Any] = Field(
        default_factory=dict,
        description="Further fields of each request, such as {chat_template_kwargs: {enable_thinking: false}}.")

    @field_validator("extra_body")
    @classmethod
    def _leaves_the_question_alone(cls, extra: dict[str, Any]) -> dict[str, Any]:
        taken = sorted(set(extra) & {"model", "messages", "stream", "n", "seed"})
        if taken:
            raise ValueError(f"{', '.join(taken)} can't be set here")
        try:
            json.dumps(extra, allow_nan=False)
        except (TypeError, ValueError) as exc:
            raise ValueError(f"must be what JSON can say: {exc}") from None
        return extra


class HdpoConfig(Section):
    w_acc: NonNegativeFloat = Field(1.0, description="Weight of the accuracy channel.")
    w_tool: NonNegativeFloat = Field(0.15, description="Weight of the tool channel.")
    tool_estimator: Literal["conditional", "unconditional", "coupled"] = Field(
        "conditional", description="conditional is HDPO, unconditional GDPO, coupled one channel on the summed reward.")
    scale: Literal["std", "none"] = Field("std", description="Divide advantages by the group's std, or only centre them.")
    aggregation: Literal["token_mean", "sequence_mean", "dr_grpo"] = Field(
        "token_mean", description="What a channel's norm counts: trained tokens, rows, or rows times the response budget.")
    clip_low: float = Field(0.2, ge=0, lt=1, description="Lower clip range of the ratio.")
    clip_high: NonNegativeFloat = Field(0.2, description="Upper clip range of the ratio.")
    dual_clip: NonNegativeFloat = Field(3.0, description="Bound on the ratio for negative advantages, above 1; 0 turns it off.")
    importance: Literal["token", "sequence", "none"] = Field(
        "token", description="Correction for engine versus trainer log-probs: truncated weights per token; sequence also drops "
                             "rows outside importance_range, for one more head product in the first mini-batch; or none.")
    importance_cap: PositiveFloat = Field(2.0, description="Upper bound of a token's importance weight.")
    importance_range: tuple[float, float] = Field(
        (0.99, 1.01), description="Geometric mean ratio of trainer to engine outside which a row is dropped (sequence).")
    tool_norm: Literal["global", "effective"] = Field(
        "global", description="Rows that the tool channel's norm counts: all compared ones, or (as the reference does within a "
                              "micro-batch) only those whose tool advantage is not zero.")
    surrogate: Literal["ppo", "gspo", "cispo"] = Field(
        "ppo", description="ppo clips each token's ratio, gspo the row's, cispo uses the clipped ratio as a constant weight.")
    entropy_coef: NonNegativeFloat = Field(
        0.0, description="Weight of an entropy bonus over trained tokens; 0, the paper's, turns it off.")
    kl_coef: NonNegativeFloat = Field(
        0.0, description="Weight of the KL divergence to the starting policy, model.path, over trained tokens; 0, the paper's, "
        "turns it off. Costs a forward a step and, without LoRA, a copy of the weights in host memory.")
    mask_truncated: bool = Field(
        False, description="Leave trajectories cut by a budget out of the loss; their rewards still count in the group.")

    @property
    def every_row(self) -> bool:
        """Whether rows without any advantage have a gradient too."""
        return bool(self.entropy_coef or self.kl_coef)


class OptimConfig(Section):
    steps: Count = Field(200, description="Optimizer (SFT) or rollout (RL) steps of the run.")
    lr: Share = Field(1e-6, description="Peak learning rate.")
    schedule: Literal["constant", "cosine", "linear"] = Field("constant", description="Learning rate after warm-up.")
    warmup_steps: Number = Field(0, description="Steps of linear warm-up.")
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="AdamW betas.")
    weight_decay: Share = Field(0.01, description="AdamW weight decay.")
    grad_clip: NonNegativeFloat = Field(1.0, description="Largest global gradient norm; 0 clips nothing.")
    reduce_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Precision in which ranks add up a micro-batch's gradients; bfloat16 halves the bytes sent.")
    offload: bool = Field(False, description="Keep optimizer state and fp32 weights in host memory for good (slower updates).")
    max_skipped: Number = Field(3, description="Optimizer steps in a row that may be skipped for a loss or gradient not finite.")
    epochs: NonNegativeFloat = Field(
        0.0, description="Passes over the training rows, in place of optim.steps (SFT only); 0 leaves it to optim.steps.")
    rows_per_step: Count = Field(256, description="Demonstrations of one SFT step over all ranks (SFT only).")
    mini_batch_prompts: Count = Field(64, description="Prompts of one optimizer step over all ranks (RL only).")
    ppo_epochs: Count = Field(1, description="Passes over one rollout batch (RL only).")


class BatchConfig(Section):
    tokens_per_micro_batch: Count = Field(40960, description="Largest packed micro-batch, tokens per rank.")
    patches_per_micro_batch: Count = Field(163840, description="Largest packed micro-batch, image patches per rank.")
    head_chunk_tokens: Number = Field(0, description="Tokens per chunk of the fused loss; 0 chooses by memory.")
    share_prompts: bool = Field(
        True, description="Compute a prompt once for all rollouts of it in a micro-batch, with the same gradients (RL only); "
        "pays the more, the longer the prompts with their images are beside the responses; eager attention cannot.")


class EngineSyncConfig(Section):
    group_mib: Count = Field(512, description="Largest gathered parameter group during weight sync, MiB.")
    checksum_every: Number = Field(
        50, description="Syncs between checksums of the engine's weights; the first has one; 0 is never.")
    canary_every: Number = Field(
        50, description="RL steps between comparisons of log-probs with the engine's; 0 only at the start.")
    parity_tolerance: NonNegativeFloat = Field(
        0.0, description="Largest |log-prob difference| of trainer and engine, nat: in fp32 of any token (0 is 1e-4), in bf16 "
        "of the mean (0 is 0.06); twice that with images.")


class CheckpointConfig(Section):
    every_steps: Count = Field(50, description="Steps between checkpoints; the last step is always saved.")
    keep: Number = Field(2, description="Newest checkpoints kept; 0 keeps all.")
    weights_every_steps: Number = Field(
        0, description="Steps between model folders in weights/, never removed and not to be resumed from; 0 is never.")
    best: str = Field("", description="Logged number, for example eval/accuracy, whose highest checkpoint is kept besides; with "
                      "a minus, as in -eval/sft_loss, its lowest.")


class EvalConfig(Section):
    every_steps: Number = Field(0, description="Steps between evaluations; in SFT of the loss on data.val (messages as in "
                                "data.train), which has one at start and end too, and of eval.tasks; 0 is never.")
    tasks: list[str] = Field(
        default_factory=list, description="Held-out rows as RL has them, which SFT answers with engine and tools when an "
        "evaluation is due (SFT only); empty opens no engine.")
    rows: Number = Field(0, description="Held-out rows used, from the front; 0 is all.")
    before: bool = Field(False, description="Roll out held-out rows before the first step too.")
    after: bool = Field(False, description="Roll out held-out rows after the last step.")
    label_before: Name = Field("sft", description="Name of the evaluation before RL in summary.json and eval/.")
    label_after: Name = Field("rl", description="Name of the evaluation after RL, and of `hdpo eval`.")


class LogConfig(Section):
    tensorboard: bool = Field(True, description="Write TensorBoard files.")
    wandb: bool = Field(False, description="Log to Weights & Biases too (WANDB_API_KEY).")
    rollouts_every: Number = Field(1, description="Steps between rollout dumps; 0 writes none.")
    rollouts_gib: NonNegativeFloat = Field(
        50.0, description="Size of all rollout dumps, GiB, shared equally by the dumps to come; where a dump's share is too "
        "small, later groups go without pictures, then altogether, and the run goes on; 0 is no limit.")
    samples: Number = Field(4, description="Trajectories shown in TensorBoard and in the report per step.")


class Config(Section):
    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    tools: ToolsConfig = ToolsConfig()
    reward: RewardConfig = RewardConfig()
    judge: JudgeConfig = JudgeConfig()
    hdpo: HdpoConfig = HdpoConfig()
    optim: OptimConfig = OptimConfig()
    batch: BatchConfig = BatchConfig()
    sync: EngineSyncConfig = EngineSyncConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()
    curation: CurationConfig = CurationConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        """Raises ValueError for fields that contradict each other, named in full: the message's reader looks for them."""
        known = {f"{section}.{field}" for section, info in type(self).model_fields.items() for field in info.default.model_dump()}
        allowed = [(name in known, f"run.allow: there is no setting {name} (`hdpo settings`)") for name in self.run.allow]
        for holds, problem in (*rules(self), *allowed):
            if not holds:
                raise ValueError(problem)
        return self

    def rolls_out(self, command: str) -> bool:
        """Whether the command needs engine, tools and judge."""
        return command != "sft" or bool(self.eval.tasks)

    @property
    def max_model_len(self) -> int:
        return self.data.max_prompt_tokens + self.rollout.max_response_tokens
