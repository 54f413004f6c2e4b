"""HDPO in TRL 1.16: `HDPOTrainer` is a GRPOTrainer with two channels, conditional advantages and unscored rows.

    HDPOTrainer(model, reward_funcs=[accuracy, tool_economy, correct], args=GRPOConfig(...), train_dataset=...)

accuracy: the accuracy reward, None where nothing is known (the row then leaves both channels and every statistic).
tool_economy: 1 / (tool calls + 1). correct: 1 or 0, who is compared in the tool channel. With accuracy alone it is GRPO.
TRL's loss types dapo, bnpo, grpo and dr_grpo say what is averaged; beta, epsilon, delta (the dual clip) and the vLLM
correction hold as in TRL. For dapo the norms are those of the generation batch, as TRL's own are.
"""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer

from hdpo.advantages import hdpo_advantages
from hdpo.losses import aggregation_token_weights, hdpo_loss
from hdpo.objective import WEIGHTS

LOSS_TYPES = ("dapo", "bnpo", "grpo", "dr_grpo")
FORWARD = ("pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles", "image_sizes",
           "token_type_ids", "mm_token_type_ids", "image_position_ids")


class HDPOTrainer(GRPOTrainer):
    """Raises ValueError for a loss type or number of reward functions that it doesn't know."""

    def __init__(self, *args: Any, channel_weights: tuple[float, ...] = WEIGHTS, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if len(self.reward_funcs) not in (1, 3):
            raise ValueError("reward_funcs must be [accuracy, tool_economy, correct], or [accuracy] for GRPO")
        if self.loss_type not in LOSS_TYPES or self.importance_sampling_level != "token" or self.top_entropy_quantile < 1.0:
            raise ValueError(f"loss_type must be one of {', '.join(LOSS_TYPES)}, per token and over all tokens")
        if self.beta and self.args.use_bias_correction_kl:
            raise ValueError("with beta, set use_bias_correction_kl=False: the pull to the reference is the plain k3 estimate")
        self.channel_weights = channel_weights

    def _calculate_rewards(self, *args: Any) -> Tensor:
        self._rewards: Tensor = super()._calculate_rewards(*args)     # [rows of all ranks, functions]
        return self._rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        rows, functions = self._rewards.shape
        channels = 2 if functions == 3 else 1
        accuracy, tool, correct = (self._rewards[:, min(k, functions - 1)] for k in range(3))
        generations = self.num_generations if self.model.training else self.num_generations_eval
        values, member = (x[:channels] for x in hdpo_advantages(
            accuracy, tool.nan_to_num(), correct > 0.5, torch.arange(rows, device=accuracy.device) // generations,
            scored=~accuracy.isnan(), eps=1e-4, scale="none" if self.scale_rewards == "none" else "std"))
        mine = slice(self.accelerator.process_index * len(inputs), (self.accelerator.process_index + 1) * len(inputs))
        output["advantages"], output["member"] = values.T[mine], member.T[mine]     # TRL splits every tensor by its rows
        tokens = output["member"].float().T @ self._mask(output).sum(1).float()
        for channel, norm in enumerate(self.accelerator.reduce(tokens, "sum")):
            output[f"norm_{channel}"] = norm                                        # 0-dim tensors travel whole
        return output

    def _mask(self, inputs: dict[str, Any]) -> Tensor:
        return inputs["completion_mask"] * inputs.get("tool_mask", 1)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        log_probs, entropies, _ = self._get_per_token_logps_and_entropies(
            model, ids, attention, inputs["completion_ids"].shape[1], compute_entropy=True,
            **{name: inputs.get(name) for name in FORWARD})
        mask, member = self._mask(inputs).float(), inputs["member"].T
        if self.loss_type == "grpo":
            mask = mask * aggregation_token_weights(mask.sum(1), "sequence_mean").unsqueeze(1)
        loss, stats = hdpo_loss(
            log_probs, inputs.get("old_per_token_logps"), inputs["advantages"], mask, member=inputs["member"], channels_last=True,
            norms=self._norms(inputs, mask, member), weights=self.channel_weights[:len(member)], clip_low=self.epsilon_low,
            clip_high=self.epsilon_high, dual_clip=self.args.delta, rollout_weights=inputs.get("importance_sampling_ratio"),
            reference_log_probs=inputs.get("ref_per_token_logps"), kl_coef=self.beta)
        mode = "train" if self.model.training else "eval"
        for name, value in (("entropy", (entropies * (mask != 0)).sum() / stats["num_tokens"].clamp(min=1)),
                            *((f"clip_ratio/channel_{c}", share) for c, share in enumerate(stats["clip_fraction"]))):
            self._metrics[mode][name].append(self.accelerator.gather(value.detach()).mean().item())
        return loss

    def _norms(self, inputs: dict[str, Any], mask: Tensor, member: Tensor) -> Tensor:
        """[C]: TRL averages over ranks and divides by nothing, so each loss type says what its sum is divided by."""
        accumulation = self.current_gradient_accumulation_steps if self.model.training else 1.0
        if self.loss_type == "dapo":
            norms = torch.stack([inputs[f"norm_{c}"] for c in range(len(member))]) / self.accelerator.num_processes
            return norms * accumulation / self.args.steps_per_generation if self.model.training else norms
        if self.loss_type == "bnpo":
            return (member.float() @ mask.sum(1)) * accumulation
        return member.float().sum(1) * accumulation * (self.max_completion_length if self.loss_type == "dr_grpo" else 1)
