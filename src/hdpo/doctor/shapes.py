"""Sizes of a model, from its config.json alone: parameters are counted on the meta device, no weight is read."""
from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hdpo.config import ModelConfig
from hdpo.errors import ModelError


@dataclass(frozen=True, slots=True)
class Shapes:
    """Sizes of a model: counts of parameters (tied ones once) and the axes that activations have."""

    parameters: int            # of the merged model, which the engine holds
    trained: int               # of these or of adapters beside them
    head_trained: bool
    largest_layer: int         # parameters of the largest repeated block
    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int                   # columns of an MLP as seen by one token: a mixture's active experts together
    vision_parameters: int = 0
    vision_layers: int = 0
    vision_hidden: int = 0
    vision_mlp: int = 0
    deepstack: int = 0         # tensors in which vLLM keeps vision features of a step, each as long as a step
    row_by_row: bool = False   # torch's SDPA goes through a pack row by row and needs no mask
    pinned_parameters: int = 0   # after rounding to the blocks that pinned host memory comes in


def read_shapes(config: ModelConfig) -> Shapes:
    """Count the parameters of a Hugging Face folder from its config.json. Raises ModelError where that can't be read."""
    return shapes_of(read_folder(config.path), config)


def read_folder(path: str) -> Any:
    from transformers import AutoConfig
    if not path:
        raise ModelError("model.path is not set: give --set model.path=FOLDER or MODEL_PATH=FOLDER")
    if not (Path(path) / "config.json").is_file():
        raise ModelError(f"model.path: {path} is no model folder: it holds no config.json")
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as exc:
        raise ModelError(f"model.path: {path}: config.json can't be read: {' '.join(str(exc).split())}") from exc


def shapes_of(found: Any, config: ModelConfig) -> Shapes:
    """The same of a transformers configuration object."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    from hdpo.adapters.lora import choose_trainable
    from hdpo.adapters.packed_attention import applies

    auto = AutoModelForImageTextToText if hasattr(found, "vision_config") else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(found)
        model.tie_weights()
        parameters = _count(model)
        blocks = [block for module in model.modules() if isinstance(module, torch.nn.ModuleList) for block in module]
        largest = max(map(_count, blocks))
        choose_trainable(model, config)
    text, vision = found.get_text_config(), getattr(found, "vision_config", None)
    experts = getattr(text, "num_experts_per_tok", None)
    return Shapes(
        parameters=parameters, trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        head_trained=model.get_output_embeddings().weight.requires_grad, largest_layer=largest, vocabulary=text.vocab_size,
        hidden=text.hidden_size, layers=text.num_hidden_layers, heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        mlp=experts * text.moe_intermediate_size if experts else text.intermediate_size,
        vision_parameters=sum(p.numel() for name, p in model.named_parameters() if ".visual." in name),
        vision_layers=getattr(vision, "depth", 0), vision_hidden=getattr(vision, "hidden_size", 0),
        vision_mlp=getattr(vision, "intermediate_size", 0),
        deepstack=len(getattr(vision, "deepstack_visual_indexes", None) or ()), row_by_row=applies(found),
        pinned_parameters=_pinned_elements(model))


def _count(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _pinned_elements(model: Any) -> int:
    """vLLM's engine fuses q, k, v and gate, up. A tensor of 5 M elements or more has blocks of its own, of the next power of
    two; smaller ones share blocks of 10 M elements, of which 16 M are taken."""
    fused: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        name = re.sub(r"\b[qkv]_proj\b", "qkv", re.sub(r"\b(gate|up)_proj\b", "gate_up", name))
        fused[name] = fused.get(name, 0) + parameter.numel()
    small = sum(count for count in fused.values() if count < 5 * 2**20)
    return sum(1 << (count - 1).bit_length() for count in fused.values() if count >= 5 * 2**20) + small * 16 // 10
