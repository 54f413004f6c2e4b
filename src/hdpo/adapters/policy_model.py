"""A transformers model as the policy sees it: packed rows in, a head job out.

`PolicyModel.forward` runs the backbone once and hands the hidden states of the trained positions to `lm_head`, whose
forward is replaced by one that runs a *job* on (hidden, weight): a fused loss or a log-prob computation. The job runs
inside lm_head's own forward because that is where ZeRO-3 has the weight gathered and its reduction hook armed; read
anywhere else, `lm_head.weight` is an empty shard.
"""
from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hdpo.adapters import torchvision_shim
from hdpo.adapters.lora import choose_trainable
from hdpo.adapters.model_folder import raise_for, read_config
from hdpo.config import ModelConfig
from hdpo.errors import ModelError
from hdpo.types import MicroBatch

torchvision_shim.activate()

from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

from hdpo.adapters import packed_attention  # noqa: E402

HeadJob = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
"""(hidden [M, H], weight [V, H]) -> tensors; runs inside lm_head's forward."""


def resolve_dtype(setting: str) -> torch.dtype:
    """model.dtype: auto is bfloat16 on CUDA and float32 on CPU."""
    if setting == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return getattr(torch, setting)


def resolve_attention(setting: str, folder: PreTrainedConfig) -> str:
    """model.attention as transformers' name; sdpa goes row by row where the model allows it."""
    from transformers.utils import is_flash_attn_2_available
    if setting == "auto":
        setting = "flash_attention_2" if torch.cuda.is_available() and is_flash_attn_2_available() else "sdpa"
    return packed_attention.SDPA if setting == "sdpa" and packed_attention.applies(folder) else setting


def can_share_prompts(config: ModelConfig) -> bool:
    """Whether the model's attention can have rows of a pack share their prompt: full causal attention, and not eager."""
    folder = read_config(config.path)
    return packed_attention.applies(folder) and resolve_attention(config.attention, folder) in packed_attention.IMPLEMENTATIONS


class PolicyModel(nn.Module):
    """Wraps the model; parameters keep the names of the Hugging Face folder behind the prefix `model.`."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.sees = hasattr(model.config, "vision_config")
        self.takes_layout = model.config.get_text_config()._attn_implementation in packed_attention.IMPLEMENTATIONS
        model.lm_head.forward = types.MethodType(_head_forward, model.lm_head)

    def forward(self, input_ids: Tensor, position_ids: Tensor, trained: Tensor, layout: packed_attention.PackLayout,
                vision: dict[str, Tensor], job: HeadJob) -> tuple[Tensor, ...]:
        """`position_ids` [4, 1, N]; a text-only model takes the first row alone. Other attention than ours finds the row
        boundaries where that is 0."""
        position_ids = position_ids if self.sees else position_ids[0]
        assert self.takes_layout or not layout.shared, "rows share a prompt, which this attention cannot do"
        rows = {"layout": layout} if self.takes_layout else {}
        out = self.model.model(input_ids=input_ids, position_ids=position_ids, use_cache=False, **vision, **rows)
        hidden = out.last_hidden_state[0].index_select(0, trained)
        return self.model.lm_head(hidden, job)


def _head_forward(self: nn.Linear, hidden: Tensor, job: HeadJob | None = None) -> Any:
    if job is None:
        return nn.functional.linear(hidden, self.weight, self.bias)
    return job(hidden, self.weight)


def load_policy_model(config: ModelConfig, dtype: torch.dtype, frozen: bool = False) -> PolicyModel:
    """Read the folder's weights (sharded at once when a ZeRO-3 configuration is active) and prepare it for packing.
    `frozen`: nothing is trained, and there are no adapters.

    Raises ModelError for a weight that the folder lacks; `check_model_folder` finds more, and before anything is loaded.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)   # first choice on Hopper, and plans 23 to 37 ms for every new length of a row
    folder = read_config(config.path)
    auto: Any = AutoModelForImageTextToText if hasattr(folder, "vision_config") else AutoModelForCausalLM
    model, found = auto.from_pretrained(config.path, config=folder, dtype=dtype, output_loading_info=True,
                                        attn_implementation=resolve_attention(config.attention, folder))
    raise_for(Path(config.path), found["missing_keys"], [], [])    # of .bin files, which say so only now
    model.config.get_text_config().output_router_logits = False   # no load-balancing loss: HDPO's is the only one
    if frozen:
        model.eval().requires_grad_(False)
        assert_rope_fp32(model)
        return PolicyModel(model)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    assert_rope_fp32(model)
    choose_trainable(model, config)
    return PolicyModel(model)


def assert_rope_fp32(model: nn.Module) -> None:
    """Rotary frequencies must be fp32: `zero.Init` casts them to bf16 unless told otherwise, and nothing reports it.

    In bf16 the worst frequency is off by tens of radians at 16k tokens, so trainer and engine become different models.
    """
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq") and buffer.dtype != torch.float32:
            raise ModelError(f"{name} is {buffer.dtype}, must be float32: keep data_types.keep_in_fp32_modules in the "
                             "DeepSpeed configuration")


def model_inputs(micro: MicroBatch, image_token_id: int | None, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Keyword arguments of PolicyModel.forward but for the job, on the device."""
    vision: dict[str, Tensor] = {}
    if micro.vision is not None:
        assert image_token_id is not None, "a row with images for a text-only model"
        vision = {
            "pixel_values": micro.vision.expand(device, dtype),
            "image_grid_thw": micro.vision.grid_thw.to(device, non_blocking=True),
            "mm_token_type_ids": torch.eq(micro.input_ids, image_token_id).int().to(device, non_blocking=True),
        }
    return {"input_ids": micro.input_ids.to(device, non_blocking=True),
            "layout": packed_attention.PackLayout(micro.spans, device),
            "position_ids": micro.position_ids.to(device, non_blocking=True),
            "trained": micro.trained.to(device, non_blocking=True), "vision": vision}
