"""What a run will hold in device memory, by phase, from the model's config.json and the settings alone; and whether the
ranks can share engines as they are told to.

Weights, optimizer state, gradients, gathered layers, the loss's buffers and the KV cache are exact sums over shapes and
types. Activations and the engine's workspace are estimates that lean to the high side; `OVERHEAD` stands for what no
setting changes. All sizes are bytes per rank. No weight is read: parameters are counted on the meta device.
"""
from __future__ import annotations

import importlib.util
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hdpo.config import Config, ModelConfig
from hdpo.errors import ConfigError, ModelError

GIB = 2**30
OVERHEAD = int(2.5 * GIB)
"""CUDA context, NCCL buffers, kernels' workspaces and what a sleeping engine keeps."""


Change = dict[str, float | bool]
"""Settings and their values, section.field=value."""


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


def read_shapes(config: ModelConfig) -> Shapes:
    """Count the parameters of a Hugging Face folder from its config.json. Raises ModelError where that can't be read."""
    return shapes_of(_read_config(config.path), config)


def _read_config(path: str) -> Any:
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
        vision_mlp=getattr(vision, "intermediate_size", 0))


def _count(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes per rank: `phases[phase][part]`, what the host holds beside, and what the KV cache is good for."""

    phases: dict[str, dict[str, int]]
    host: dict[str, int]
    kv_bytes_per_token: int
    kv_bytes: int
    context: int
    ranks: int
    parameters: int
    device: int | None         # bytes of one device; None where there is none to fit

    def total(self, phase: str) -> int:
        return sum(self.phases[phase].values())

    @property
    def sequences(self) -> float:
        """Sequences of the full context that the KV cache holds at once."""
        return self.kv_bytes / (self.kv_bytes_per_token * self.context)

    def overfull(self) -> str | None:
        """The first phase that needs more than the device has; a rollout needs the KV cache of one sequence."""
        if self.sequences < 1:
            return "rollout"
        return next((p for p in self.phases if self.device is not None and self.total(p) > self.device), None)

    def lines(self) -> list[str]:
        """A table in GiB."""
        parts = list(dict.fromkeys(part for phase in self.phases.values() for part in phase))
        head = f"memory per rank, {self.ranks} rank{'s' * (self.ranks > 1)}, {self.parameters / 1e9:.3g} B parameters (GiB)"
        rows = [(head, list(self.phases))]
        for part in parts:
            sizes = [phase.get(part, 0) for phase in self.phases.values()]
            rows.append((part, [f"{size / GIB:.2f}" if size else "-" for size in sizes]))
        rows.append((f"total{f' of {self.device / GIB:.1f}' if self.device else ''}",
                     [f"{self.total(phase) / GIB:.2f}" for phase in self.phases]))
        width = max(len(name) for name, _ in rows)
        table = [f"{name:<{width}} " + " ".join(f"{cell:>9}" for cell in cells) for name, cells in rows]
        kept = ", ".join(f"{part} {size / GIB:.2f}" for part, size in self.host.items() if size)
        return [*table, f"KV cache: {self.kv_bytes_per_token / 1024:.4g} KiB a token, {self.sequences:.3g} sequences of "
                        f"{self.context} tokens at once", *([f"host memory per rank: {kept}"] if kept else [])]


def plan(config: Config, shapes: Shapes, ranks: int, device: int | None, dtype_bytes: int) -> MemoryPlan:
    """`dtype_bytes`: 2 in bf16, 4 in fp32. `device`: bytes of one device, None for CPU."""
    shard = math.ceil(shapes.parameters / ranks)
    trained = math.ceil(shapes.trained / ranks)
    master = trained * (12 if dtype_bytes < 4 else 8)    # fp32 weights (in fp32 they are the weights) and two moments
    split = shapes.parameters - shapes.vision_parameters    # the vision tower is whole on every rank
    engine = (math.ceil(split / config.rollout.tensor_parallel) + shapes.vision_parameters) * dtype_bytes
    weights = {"weights, shard": shard * dtype_bytes}
    overhead = {"CUDA, NCCL, workspaces": OVERHEAD if device else 0}
    update = weights | _update(config, shapes, trained, dtype_bytes) | overhead
    if not config.optim.offload:
        update["fp32 weights, moments"] = master
    sampling = weights | {"engine weights": engine, "engine workspace": _workspace(config, shapes, dtype_bytes)} | overhead
    kv_token = 2 * shapes.layers * max(1, shapes.kv_heads // config.rollout.tensor_parallel) * shapes.head_dim * dtype_bytes
    kv = int(config.rollout.kv_cache_gib * GIB)
    if not kv:
        kv = max(0, int(config.rollout.gpu_memory * device) - sum(sampling.values())) if device else GIB
    group = max(config.sync.group_mib << 20, shapes.vocabulary * shapes.hidden * dtype_bytes)
    sync = weights | {"engine weights": engine, "sync group, layer copies": group + 2 * shapes.largest_layer * dtype_bytes}
    host = {"sleeping engine": engine, "parked optimizer": master} if device else {}
    if config.optim.offload:
        host["parked optimizer"] = master + 4 * trained
    return MemoryPlan({"rollout": sampling | {"KV cache": kv}, "sync": sync | overhead, "update": update}, host, kv_token, kv,
                      config.max_model_len, ranks, shapes.parameters, device)


def _update(config: Config, shapes: Shapes, trained: int, size: int) -> dict[str, int]:
    from hdpo.adapters.zero3 import MAX_LIVE_PARAMETERS, REDUCE_BUCKET, SUB_GROUP
    from hdpo.fused_loss import default_chunk_tokens

    tokens = max(config.batch.tokens_per_micro_batch, config.max_model_len)   # a row is never cut
    patches = config.batch.patches_per_micro_batch
    text = size * tokens * shapes.hidden
    text_layer = size * tokens * (8 * shapes.hidden + 4 * (shapes.heads + 2 * shapes.kv_heads) * shapes.head_dim + 6 * shapes.mlp)
    seen = size * patches * shapes.vision_hidden
    vision_layer = size * patches * (20 * shapes.vision_hidden + 4 * shapes.vision_mlp)
    if config.model.gradient_checkpointing:   # the input of each layer, and one layer that is computed again
        activations = shapes.layers * text + shapes.vision_layers * seen + max(text_layer, vision_layer)
    else:
        activations = shapes.layers * text_layer + shapes.vision_layers * vision_layer
    attention = config.model.attention
    if attention == "auto":
        attention = "flash_attention_2" if importlib.util.find_spec("flash_attn") else "sdpa"
    if attention != "flash_attention_2":   # the mask of packed rows, or the scores themselves
        activations += tokens**2 * (1 if attention == "sdpa" else 3 * size * shapes.heads)
    if config.batch.share_prompts:   # a layer's keys and values of a prompt, and their gradients, once more for each rollout
        heads = shapes.kv_heads if attention == "flash_attention_2" else shapes.heads
        longest = min(tokens, config.data.max_prompt_tokens)
        activations += 4 * size * (config.rollout.group_size - 1) * longest * heads * shapes.head_dim
    chunk = config.batch.head_chunk_tokens or default_chunk_tokens(shapes.vocabulary, 4, True)
    loss = min(chunk, tokens) * shapes.vocabulary * (4 + size) + text
    loss += 4 * shapes.vocabulary * shapes.hidden if shapes.head_trained else 0
    reduced = 4 if config.optim.reduce_dtype == "float32" else size
    gradients = 0 if config.optim.offload else 4 * trained + 4 * min(trained, SUB_GROUP)   # the sum, and its copy in the step
    return {"gradients, shard": gradients, "gradient bucket": REDUCE_BUCKET * reduced,
            "gathered layers": min(shapes.parameters, MAX_LIVE_PARAMETERS) * size, "activations": activations,
            "loss chunk, dW": loss}


def _workspace(config: Config, shapes: Shapes, size: int) -> int:
    """One layer of one engine step without gradients, and the logits of every sequence in fp32, twice."""
    sequences = config.rollout.max_num_seqs * config.rollout.tensor_parallel
    tokens = max(config.rollout.max_batched_tokens, sequences)
    layer = size * tokens * (4 * shapes.hidden + 2 * (shapes.heads + 2 * shapes.kv_heads) * shapes.head_dim + 3 * shapes.mlp)
    return layer + 2 * 4 * sequences * shapes.vocabulary


def check(config: Config, shapes: Shapes, ranks: int, device: int | None, dtype_bytes: int) -> MemoryPlan:
    """The plan, or a ConfigError with one line that names a setting with which it fits."""
    made = plan(config, shapes, ranks, device, dtype_bytes)
    phase = made.overfull()
    if phase is None:
        return made
    needs = made.total(phase) + (made.kv_bytes_per_token * made.context - made.kv_bytes if made.sequences < 1 else 0)
    limit = "the engine's share" if made.sequences < 1 and made.total(phase) <= (made.device or needs) else "the device"
    for change in remedies(config, made, phase):
        changed = config
        for field, value in change.items():
            section, name = field.split(".")
            part = getattr(changed, section).model_copy(update={name: value})
            changed = changed.model_copy(update={section: part})
        if _unsplittable(shapes.heads, shapes.kv_heads, changed.rollout.tensor_parallel):
            continue
        if plan(changed, shapes, ranks, device, dtype_bytes).overfull() is None:
            way = ", ".join(f"{field}={value:g}" if not isinstance(value, bool) else f"{field}={str(value).lower()}"
                            for field, value in change.items())
            break
    else:
        way = "more GPUs, or a shorter context (data.max_prompt_tokens, rollout.max_response_tokens)"
    has = f"{made.device / GIB:.1f}" if made.device else "-"
    raise ConfigError(f"memory: the {phase} phase needs {needs / GIB:.1f} GiB per rank, more than {limit} ({has} GiB) has; "
                      f"it fits with {way}")


def remedies(config: Config, made: MemoryPlan, phase: str) -> list[Change]:
    """Settings worth trying, the least costly first."""
    rollout: list[Change] = []
    if config.rollout.kv_cache_gib and made.device:
        spare = (made.device - made.total("rollout") + made.kv_bytes) / GIB
        rollout.append({"rollout.kv_cache_gib": math.floor(10 * spare) / 10})
        rollout.append({"rollout.kv_cache_gib": math.ceil(10 * made.kv_bytes_per_token * made.context / GIB) / 10})
    else:
        rollout += [{"rollout.gpu_memory": share / 100} for share in range(int(config.rollout.gpu_memory * 100) + 5, 96, 5)]
    rollout += [{"rollout.tensor_parallel": n} for n in (2, 4, 8) if made.ranks % n == 0]
    update: list[Change] = []
    if not config.model.gradient_checkpointing:
        update.append({"model.gradient_checkpointing": True})
    budgets = [t for t in (config.batch.tokens_per_micro_batch * k // 8 for k in range(7, 0, -1)) if t >= config.max_model_len]
    update += [{"batch.tokens_per_micro_batch": t} for t in budgets]
    update.append({"optim.offload": True})
    update += [{"optim.offload": True, "batch.tokens_per_micro_batch": t} for t in budgets]
    sync: list[Change] = [{"sync.group_mib": mib} for mib in (256, 128, 64)]
    every = {"rollout": rollout, "sync": sync + rollout, "update": update}
    both = [a | b for a in rollout for b in update] if phase == "rollout" else [a | b for b in rollout for a in update]
    return every[phase] + both


def check_tensor_parallel(config: Config, ranks: int) -> None:
    """Whether rollout.tensor_parallel divides the ranks of a node and the model. Raises ConfigError where it doesn't."""
    ways = config.rollout.tensor_parallel
    if ways == 1:
        return
    setting = f"rollout.tensor_parallel ({ways})"
    if config.rollout.engine == "hf":
        raise ConfigError(f"{setting} needs vLLM; set it to 1 or use rollout.engine=vllm")
    of_node = min(ranks, int(os.environ.get("LOCAL_WORLD_SIZE", ranks)))
    if of_node % ways:
        raise ConfigError(f"{setting} must divide the {of_node} rank{'s' * (of_node > 1)} of a node, because an engine's ranks "
                          "are neighbours on one machine; set it to 1 or start more ranks")
    text = _read_config(config.model.path).get_text_config()
    width = getattr(text, "moe_intermediate_size", None) or text.intermediate_size
    if _unsplittable(text.num_attention_heads, text.num_key_value_heads, ways) or width % ways:
        raise ConfigError(f"{setting} can't split model.path: it has {text.num_attention_heads} attention heads, "
                          f"{text.num_key_value_heads} KV heads and MLPs of {width}; choose a number that divides these")


def _unsplittable(heads: int, kv_heads: int, ways: int) -> bool:
    """Heads are dealt out evenly; so are KV heads, or each is copied to equally many ranks."""
    return bool(heads % ways or max(kv_heads, ways) % min(kv_heads, ways))


def here(config: Config, ranks: int = 0, device_gib: float = 0.0) -> MemoryPlan:
    """The checked plan for this machine's devices and world, or for `ranks` devices of `device_gib`. Raises ConfigError."""
    import torch

    count = torch.cuda.device_count()
    device = int(device_gib * GIB) or (torch.cuda.get_device_properties(0).total_memory if count else None)
    ranks = ranks or int(os.environ.get("WORLD_SIZE", 0)) or max(1, count)
    check_tensor_parallel(config, ranks)
    dtype = config.model.dtype if config.model.dtype != "auto" else "bfloat16" if device else "float32"
    return check(config, read_shapes(config.model), ranks, device, getattr(torch, dtype).itemsize)
