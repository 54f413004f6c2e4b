"""What a run will hold in device and host memory, by phase, from the model's config.json and the settings alone; and whether the
ranks can share engines as they are told to.

Weights, optimizer state, gradients, gathered layers, the loss's buffers and the KV cache are exact sums over shapes and
types. Activations and the engine's workspace are estimates that lean to the high side; `OVERHEAD` stands for what no
setting changes. All sizes are bytes per rank. No weight is read: parameters are counted on the meta device.
"""
from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

from hdpo.config import Config
from hdpo.doctor.host_plan import GRAPHS, Phases, copies_reference, host_phases, machine_memory
from hdpo.doctor.shapes import Shapes, read_folder, read_shapes
from hdpo.doctor.training_plan import reference_parts, update_parts
from hdpo.errors import ConfigError

GIB = 2**30
OVERHEAD = int(2.5 * GIB)
"""CUDA context, NCCL buffers, kernels' workspaces and what a sleeping engine keeps."""


Change = dict[str, float | bool | str]
"""Settings and their values, section.field=value."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes: `phases[phase][part]` of a rank on its device, `host[phase][part]` of a node, and what the KV cache is good for."""

    phases: Phases
    host: Phases
    kv_bytes_per_token: int
    kv_bytes: int
    context: int
    ranks: int
    of_node: int
    parameters: int
    device: int | None         # bytes of one device; None where there is none to fit
    node: int | None           # bytes of one node's memory; None where it is not known

    def total(self, phase: str) -> int:
        return sum(self.phases[phase].values())

    def host_total(self, phase: str) -> int:
        return sum(self.host[phase].values())

    @property
    def sequences(self) -> float:
        """Sequences of the full context that the KV cache holds at once."""
        return self.kv_bytes / (self.kv_bytes_per_token * self.context)

    def overfull(self) -> str | None:
        """The first phase that needs more than the device has; a rollout needs the KV cache of one sequence."""
        if "rollout" in self.phases and self.sequences < 1:
            return "rollout"
        return next((p for p in self.phases if self.device is not None and self.total(p) > self.device), None)

    def host_overfull(self) -> str | None:
        """The first phase that needs more than the node has."""
        return next((p for p in self.host if self.node is not None and self.host_total(p) > self.node), None)

    def lines(self) -> list[str]:
        """Two tables in GiB."""
        head = f"memory per rank, {self.ranks} rank{'s' * (self.ranks > 1)}, {self.parameters / 1e9:.3g} B parameters (GiB)"
        table = _table(head, self.phases, self.device)
        if "rollout" in self.phases:
            table.append(f"KV cache: {self.kv_bytes_per_token / 1024:.4g} KiB a token, {self.sequences:.3g} sequences of "
                         f"{self.context} tokens at once")
        if self.host:
            head = f"host memory of a node with {self.of_node} rank{'s' * (self.of_node > 1)} (GiB)"
            table += _table(head, self.host, self.node)
        return table


def _table(head: str, phases: Phases, has: int | None) -> list[str]:
    parts = list(dict.fromkeys(part for phase in phases.values() for part in phase))
    rows = [(head, list(phases))]
    for part in parts:
        sizes = [phase.get(part, 0) for phase in phases.values()]
        rows.append((part, [f"{size / GIB:.2f}" if size else "-" for size in sizes]))
    totals = [f"{sum(phase.values()) / GIB:.2f}" for phase in phases.values()]
    rows.append((f"total{f' of {has / GIB:.1f}' if has else ''}", totals))
    width = max(len(name) for name, _ in rows)
    return [f"{name:<{width}} " + " ".join(f"{cell:>9}" for cell in cells) for name, cells in rows]


def plan(config: Config, shapes: Shapes, ranks: int, device: int | None, dtype_bytes: int, *, sft: bool = False,
         of_node: int = 0, node: int | None = None) -> MemoryPlan:
    """`dtype_bytes`: 2 in bf16, 4 in fp32. `device`: bytes of one device, None for CPU. `of_node`: ranks of a node, 0 is all;
    `node`: bytes of its memory."""
    of_node = of_node or min(ranks, 8)
    shard = math.ceil(shapes.parameters / ranks)
    trained = math.ceil(shapes.trained / ranks)
    weights = {"weights, shard": shard * dtype_bytes}
    overhead = {"CUDA, NCCL, workspaces": OVERHEAD if device else 0}
    update = weights | update_parts(config, shapes, ranks, dtype_bytes, sft) | overhead
    if not config.optim.offload:    # fp32 weights (in fp32 they are the weights) and two moments
        update["fp32 weights, moments"] = trained * (12 if dtype_bytes < 4 else 8)
    training = {"update": update}
    if copies_reference(config) and not sft:
        training = {"reference": weights | reference_parts(config, shapes, ranks, dtype_bytes) | overhead} | training
    host = host_phases(config, shapes, ranks, of_node, dtype_bytes, sft) if device else {}
    if sft and not config.eval.tasks:
        return MemoryPlan({"update": update}, host, 0, 0, config.max_model_len, ranks, of_node, shapes.parameters, device, node)
    split = shapes.parameters - shapes.vision_parameters    # the vision tower is whole on every rank
    engine = {"engine weights": (math.ceil(split / config.rollout.tensor_parallel) + shapes.vision_parameters) * dtype_bytes,
              "engine workspace": _workspace(config, shapes, dtype_bytes),
              "engine graphs": GRAPHS if device and not config.rollout.enforce_eager else 0}
    kv_token = 2 * shapes.layers * max(1, shapes.kv_heads // config.rollout.tensor_parallel) * shapes.head_dim * dtype_bytes
    kv = int(config.rollout.kv_cache_gib * GIB)
    if not kv:    # vLLM's share of the device, less what vLLM holds of it: what the trainer keeps there is beside that share
        kv = max(0, int(config.rollout.gpu_memory * device) - sum(engine.values())) if device else GIB
    group = max(config.sync.group_mib << 20, shapes.vocabulary * shapes.hidden * dtype_bytes)
    sync = weights | {"engine weights": engine["engine weights"], "engine graphs": engine["engine graphs"],
                      "sync group, layer copies": group + 2 * shapes.largest_layer * dtype_bytes}
    return MemoryPlan({"rollout": weights | engine | overhead | {"KV cache": kv}, "sync": sync | overhead} | training,
                      host, kv_token, kv, config.max_model_len, ranks, of_node, shapes.parameters, device, node)


def _workspace(config: Config, shapes: Shapes, size: int) -> int:
    """One layer of an engine step without gradients, what vision adds to later ones, and all sequences' logits in fp32, twice."""
    sequences = config.rollout.max_num_seqs * config.rollout.tensor_parallel
    tokens = max(config.rollout.max_batched_tokens, sequences)
    layer = size * tokens * (4 * shapes.hidden + 2 * (shapes.heads + 2 * shapes.kv_heads) * shapes.head_dim + 3 * shapes.mlp)
    return layer + size * tokens * shapes.deepstack * shapes.hidden + 2 * 4 * sequences * shapes.vocabulary


def check(config: Config, shapes: Shapes, ranks: int, device: int | None, dtype_bytes: int, *, sft: bool = False,
          of_node: int = 0, node: int | None = None) -> MemoryPlan:
    """The plan, or a ConfigError with one line that names a setting with which it fits."""
    def planned(settings: Config) -> MemoryPlan:
        return plan(settings, shapes, ranks, device, dtype_bytes, sft=sft, of_node=of_node, node=node)

    made = planned(config)
    phase, host = made.overfull(), made.host_overfull()
    if phase is None and host is None:
        return made
    for change in remedies(config, made, phase) if phase else host_remedies(config, sft):
        changed = with_change(config, change)
        if _unsplittable(shapes.heads, shapes.kv_heads, changed.rollout.tensor_parallel):
            continue
        after = planned(changed)
        if after.overfull() is None and (phase or after.host_overfull() is None):
            way = ", ".join(f"{field}={written(value)}" for field, value in change.items())
            break
    else:
        way = "more GPUs, or a shorter context (data.max_prompt_tokens, rollout.max_response_tokens)" if phase else (
            "more memory, or a tool server on another machine (tools.url)")
    if phase is None:
        assert host is not None
        raise ConfigError(f"host memory: the {host} phase needs {made.host_total(host) / GIB:.0f} GiB of a node with "
                          f"{made.of_node} ranks, which has {(made.node or 0) / GIB:.0f} GiB; it fits with {way}")
    needs = made.total(phase)
    limit = "the device"
    if phase == "rollout" and made.sequences < 1:
        needs += made.kv_bytes_per_token * made.context - made.kv_bytes
        limit = "the engine's share" if made.total(phase) <= (made.device or needs) else limit
    has = f"{made.device / GIB:.1f}" if made.device else "-"
    raise ConfigError(f"memory: the {phase} phase needs {needs / GIB:.1f} GiB per rank, more than {limit} ({has} GiB) has; "
                      f"it fits with {way}")


def with_change(config: Config, change: Change) -> Config:
    """The configuration with other settings; nothing is checked."""
    for field, value in change.items():
        section, name = field.split(".")
        part = getattr(config, section).model_copy(update={name: value})
        config = config.model_copy(update={section: part})
    return config


def written(value: float | bool | str) -> str:
    """As --set takes it."""
    return str(value).lower() if isinstance(value, bool | str) else f"{value:g}"


def host_remedies(config: Config, sft: bool) -> list[Change]:
    """Settings that need less of a node's memory, the least costly first."""
    if sft and not config.eval.tasks:
        return [{"optim.offload": False}]
    drop: Change = {"rollout.sleep": "drop"} if config.rollout.sleep == "copy" else {}
    caches: list[Change] = [{"rollout.image_cache_gib": gib} for gib in (2.0, 1.0, 0.5) if gib < config.rollout.image_cache_gib]
    lives: list[Change] = [{"rollout.max_num_seqs": n} for n in (128, 64, 32) if n < config.rollout.max_num_seqs]
    kept: Change = {"optim.offload": False} if config.optim.offload else {}
    steps = [drop, *(drop | cache for cache in caches), *(drop | caches[-1] | live for live in lives if caches),
             drop | kept, *(drop | kept | cache for cache in caches)]
    if copies_reference(config):
        without: Change = {"hdpo.kl_coef": 0.0}
        steps += [without, *(change | without for change in steps)]
    return [change for change in steps if change]


def remedies(config: Config, made: MemoryPlan, phase: str) -> list[Change]:
    """Settings worth trying, the least costly first."""
    rollout: list[Change] = []
    if "rollout" not in made.phases:      # an SFT run without an engine
        pass
    elif config.rollout.kv_cache_gib and made.device:
        spare = (made.device - made.total("rollout") + made.kv_bytes) / GIB
        rollout.append({"rollout.kv_cache_gib": math.floor(10 * spare) / 10})
        rollout.append({"rollout.kv_cache_gib": math.ceil(10 * made.kv_bytes_per_token * made.context / GIB) / 10})
    else:    # a larger share where the KV cache is too small, a smaller one where the trainer has no room beside it
        share = round(config.rollout.gpu_memory * 100)
        rollout += [{"rollout.gpu_memory": n / 100} for n in (*range(share + 5, 96, 5), *range(share - 5, 9, -5))]
    rollout += [{"rollout.tensor_parallel": n} for n in (2, 4, 8) if made.ranks % n == 0]
    update: list[Change] = []
    if not config.model.gradient_checkpointing:
        update.append({"model.gradient_checkpointing": True})
    budgets = [t for t in (config.batch.tokens_per_micro_batch * k // 8 for k in range(7, 0, -1)) if t >= config.max_model_len]
    update += [{"batch.tokens_per_micro_batch": t} for t in budgets]
    update.append({"optim.offload": True})
    update += [{"optim.offload": True, "batch.tokens_per_micro_batch": t} for t in budgets]
    sync: list[Change] = [{"sync.group_mib": mib} for mib in (256, 128, 64)]
    reference: list[Change] = [{"batch.tokens_per_micro_batch": t} for t in budgets]
    reference.append({"hdpo.kl_coef": 0.0})
    every = {"rollout": rollout, "sync": sync + rollout, "update": update, "reference": reference}
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
    text = read_folder(config.model.path).get_text_config()
    width = getattr(text, "moe_intermediate_size", None) or text.intermediate_size
    if _unsplittable(text.num_attention_heads, text.num_key_value_heads, ways) or width % ways:
        raise ConfigError(f"{setting} can't split model.path: it has {text.num_attention_heads} attention heads, "
                          f"{text.num_key_value_heads} KV heads and MLPs of {width}; choose a number that divides these")


def _unsplittable(heads: int, kv_heads: int, ways: int) -> bool:
    """Heads are dealt out evenly; so are KV heads, or each is copied to equally many ranks."""
    return bool(heads % ways or max(kv_heads, ways) % min(kv_heads, ways))


def here(config: Config, ranks: int = 0, device_gib: float = 0.0, *, sft: bool = False, node_gib: float = 0.0) -> MemoryPlan:
    """The checked plan for this machine's devices, memory and world, or for `ranks` devices of `device_gib` on nodes of
    `node_gib`. Raises ConfigError."""
    import torch

    count = torch.cuda.device_count()
    device = int(device_gib * GIB) or (torch.cuda.get_device_properties(0).total_memory if count else None)
    elsewhere = ranks or device_gib
    node = int(node_gib * GIB) or (None if elsewhere or device is None else machine_memory())
    ranks, of_node = ranks_of_run(ranks)
    if not sft:
        check_tensor_parallel(config, ranks)
    return check(config, read_shapes(config.model), ranks, device, weight_dtype(config, bool(device)).itemsize, sft=sft,
                 of_node=of_node, node=node)


def ranks_of_run(ranks: int = 0) -> tuple[int, int]:
    """(ranks, those of them on a node) of the run that is planned here: `ranks` of them, or the launcher's, or one a device."""
    import torch

    count = max(1, torch.cuda.device_count())
    if ranks:
        return ranks, min(ranks, 8)
    return int(os.environ.get("WORLD_SIZE", 0)) or count, int(os.environ.get("LOCAL_WORLD_SIZE", 0)) or count


def weight_dtype(config: Config, on_device: bool | None = None) -> Any:
    """The torch dtype of the weights; `on_device`: whether on GPUs, None asks this machine."""
    import torch

    if config.model.dtype != "auto":
        return getattr(torch, config.model.dtype)
    return torch.bfloat16 if (torch.cuda.is_available() if on_device is None else on_device) else torch.float32
