"""What somebody meant who named a setting that isn't there: names that other trainers use, then spelling."""
from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

_PROMPTS = "rollout.prompts_per_step (RL), optim.rows_per_step (SFT)"
_MICRO = "batch.tokens_per_micro_batch (micro-batches are packed by tokens)"
_TOKENS = "data.max_prompt_tokens, rollout.max_response_tokens"
_NO_REFERENCE = "there is none: the reference of hdpo.kl_coef is model.path, where the run begins"
_NO_CUT = "there is none: cut sampling would falsify the log-probs that are trained on"

MEANT = {
    "optim.lr": "learning_rate actor_lr base_lr peak_lr max_lr step_size",
    "optim.steps": "max_steps num_steps total_steps training_steps total_training_steps iterations",
    "optim.epochs": "num_epochs num_train_epochs total_epochs",
    "optim.schedule": "lr_scheduler lr_scheduler_type lr_schedule scheduler scheduler_type",
    "optim.warmup_steps": "warmup warmup_ratio lr_warmup lr_warmup_steps num_warmup_steps lr_warmup_steps_ratio",
    "optim.betas": "adam_beta1 adam_beta2 adam_betas beta1 beta2",
    "optim.weight_decay": "wd decay adamw_weight_decay",
    "optim.grad_clip": "max_grad_norm gradient_clipping clip_grad grad_norm clip_grad_norm max_norm",
    "optim.ppo_epochs": "num_iterations update_epochs mu inner_epochs",
    "optim.mini_batch_prompts": "ppo_mini_batch_size mini_batch_size minibatch_size num_minibatches mini_batch",
    "optim.offload": "offload_optimizer optimizer_offload cpu_offload param_offload offload_param",
    _PROMPTS: "batch_size train_batch_size global_batch_size rollout_batch_size effective_batch_size generation_batch_size",
    _MICRO: "micro_batch_size per_device_train_batch_size micro_batch_size_per_gpu ppo_micro_batch_size "
            "ppo_micro_batch_size_per_gpu gradient_accumulation_steps gradient_accumulation ppo_max_token_len_per_gpu",
    "rollout.group_size": "n g num_generations rollout_n num_samples samples_per_prompt n_samples_per_prompt group "
                          "num_rollouts rollouts_per_prompt num_return_sequences",
    "rollout.temperature": "temp sampling_temperature",
    _TOKENS: "max_length max_len max_seq_len max_seq_length max_model_len context_length max_context_length cutoff_len",
    "data.max_prompt_tokens": "max_prompt_length max_prompt_len max_input_length",
    "rollout.max_response_tokens": "max_response_length max_response_len max_completion_length max_new_tokens "
                                   "max_output_tokens",
    "rollout.max_turn_tokens": "rollout.max_tokens max_tokens_per_turn tokens_per_turn",
    "rollout.max_turns": "max_tool_calls max_iterations max_calls turns",
    "rollout.gpu_memory": "gpu_memory_utilization vllm_gpu_memory_utilization gpu_mem gpu_utilization",
    "rollout.tensor_parallel": "tensor_parallel_size tensor_model_parallel_size tp tp_size vllm_tensor_parallel_size",
    "rollout.engine": "backend use_vllm inference_engine",
    "hdpo.w_tool": "tool_weight w_tools tool_coef lambda_tool tool_reward_weight",
    "hdpo.w_acc": "acc_weight accuracy_weight w_accuracy",
    "hdpo.clip_low, hdpo.clip_high": "epsilon clip_ratio cliprange clip_range clip eps_clip clip_eps",
    "hdpo.clip_low": "epsilon_low clip_ratio_low eps_low",
    "hdpo.clip_high": "epsilon_high clip_ratio_high eps_high",
    "hdpo.dual_clip": "clip_ratio_c delta",
    "hdpo.aggregation": "loss_type loss_agg_mode loss_aggregation",
    "hdpo.scale": "scale_rewards norm_adv_by_std_in_grpo normalize_advantages",
    "hdpo.importance_cap": "tis_imp_ratio_cap importance_sampling_cap vllm_importance_sampling_cap",
    "hdpo.entropy_coef": "entropy_coeff entropy_bonus entropy_weight ent_coef",
    "hdpo.kl_coef": "beta kl kl_beta kl_loss_coef kl_penalty kl_weight use_kl_loss init_kl_coef kl_ctrl",
    "hdpo.mask_truncated": "mask_truncated_completions overlong_filtering",
    "model.path": "model_path model_name model_name_or_path pretrained checkpoint_path base_model",
    "model.dtype": "bf16 fp16 torch_dtype precision mixed_precision",
    "model.attention": "attn_implementation attn flash_attention use_flash_attn",
    "model.gradient_checkpointing": "enable_gradient_checkpointing activation_checkpointing",
    "model.freeze": "freeze_vision_tower freeze_vit freeze_vision freeze_layers",
    "model.lora_rank": "lora_r r use_lora use_peft lora",
    "model.lora_targets": "target_modules lora_target lora_target_modules",
    "data.train": "train_files train_file dataset train_data train_dataset train_path data_path",
    "data.val": "val_files val_file val_data eval_dataset validation test_files eval_data",
    "run.name": "experiment_name run_name exp_name project_name",
    "run.folder": "output_dir default_local_dir out_dir save_dir output_folder checkpoint_dir",
    "run.resume": "resume_from_checkpoint resume_mode resume_path",
    "checkpoint.every_steps": "save_steps save_freq save_interval save_every",
    "checkpoint.keep": "save_total_limit max_ckpt_to_keep keep_last max_to_keep",
    "eval.every_steps": "eval_steps test_freq eval_interval eval_every eval_freq",
    "eval.before": "val_before_train eval_on_start",
    "log.wandb": "use_wandb report_to loggers logger",
    "reward.function": "reward_fn reward_func reward_funcs compute_score custom_reward_function reward_function",
    "reward.tool_cost": "tool_costs call_cost tool_penalty cost_per_call",
    "tools.own": "custom_tools tool_config tool_config_path functions user_tools",
    "tools.mcp": "mcp_servers mcpservers mcp_server",
    "judge.base_url": "judge_url judge_base_url api_base openai_api_base endpoint",
    "judge.model": "judge_model",
    "tools.url": "tool_server_url tool_url remote_tool_server_url",
    "optim": "optimizer optimization training trainer",
    "log": "logging", "eval": "evaluation", "tools": "tool", "hdpo": "algorithm loss grpo",
    "rollout": "rollouts sampling generation",
}
"""Fields, and the names under which people look for them; a name with its section goes before a field of that name elsewhere."""

ABSENT = {
    _NO_REFERENCE: "use_kl_in_reward ref_model reference_model ref_model_path ref_path",
    _NO_CUT: "top_p top_k min_p repetition_penalty presence_penalty frequency_penalty",
    "there is none: advantages are relative to the group, no critic": "critic value_model vf_coef gamma lam gae_lambda",
    "there is none: accelerate's file says how many ranks (launch/accelerate)": "num_gpus n_gpus_per_node nnodes num_processes",
}

_NAMES = {name: f"did you mean {meant}?" for meant, names in MEANT.items() for name in names.split()} | {
    name: sentence for sentence, names in ABSENT.items() for name in names.split()}
_CLOSE = 0.7          # similarity below which a name is not taken for a misspelt one
_SAME_SECTION = 0.05  # how much nearer a name is that stands in the section that was named


def hint(path: str, fields: Sequence[str], sections: Sequence[str]) -> str:
    """What follows "unknown key {path}": "; did you mean optim.lr?", why there is none, or what there is."""
    *parents, leaf = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", path).lower().replace("-", "_").split(".")
    section = parents[0] if parents else leaf
    inside = f"{section} has {', '.join(field.split('.', 1)[1] for field in fields if field.split('.')[0] == section)}"
    if leaf in sections and not parents:
        return f"; {inside}"
    if f"{section}.{leaf}" in _NAMES:
        return f"; {_NAMES[f'{section}.{leaf}']}"
    same = [field for field in fields if field.rsplit(".", 1)[-1] == leaf]
    if same:
        return f"; did you mean {' or '.join(same)}?"
    if leaf in _NAMES:
        return f"; {_NAMES[leaf]}"
    known = {field: f"did you mean {field}?" for field in (*fields, *sections)} | _NAMES

    def similarity(name: str) -> float:
        ratio = difflib.SequenceMatcher(None, leaf, name.rsplit(".", 1)[-1]).ratio()
        return ratio + _SAME_SECTION * (name.split(".")[0] == section)
    best = max(known, key=similarity)
    if similarity(best) >= _CLOSE:
        return f"; {known[best]}"
    return f"; {inside}" if section in sections else f"; sections are {', '.join(sections)}"
