"""The state of a ZeRO-3 engine by parameter name: fp32 master weights, optimizer moments and step counts.

DeepSpeed keeps each rank's ranges of many parameters in a few flat buffers ("sub-groups"), each parameter padded to a
multiple of the world size, and the optimizer's state is keyed by those buffers. Here the padding is left out and every
range gets its parameter's name, so that the state does not depend on the number of ranks or the order of buffers.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hdpo.errors import CheckpointError
from hdpo.state.shards import ShardReader, TrainingState, part_of

MASTER = "master"
COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")


@dataclass(frozen=True, slots=True)
class _Piece:
    """Where this rank's range of one parameter lies."""

    name: str
    group: int       # index of the flat buffer
    offset: int      # of the range in the buffer
    start: int       # of the range in the parameter
    end: int
    numel: int       # of the whole parameter


def _pieces(zero: Any, names: Mapping[int, str]) -> Iterator[_Piece]:
    world, rank = dist.get_world_size(zero.dp_process_group), dist.get_rank(zero.dp_process_group)
    for group, params in enumerate(zero.fp16_groups):
        offset = 0
        for param in params:
            start, end = part_of(param.ds_numel, world, rank)
            yield _Piece(names[id(param)], group, offset, start, end, param.ds_numel)
            offset += param.partition_numel()


def snapshot(engine: Any, names: Mapping[int, str], on_host: Callable[[Tensor], Tensor | None]) -> TrainingState:
    """This rank's part on the host. `names`: id(parameter) -> name, for every trainable parameter.

    `on_host` gives what is on the host already, which is not copied again; the rest is copied.
    """
    zero = engine.optimizer
    state = TrainingState({}, {}, {name: int(getattr(engine, name)) for name in COUNTERS})
    for piece in _pieces(zero, names):
        state.numel[piece.name] = piece.numel
        for kind, flat in _buffers(zero, piece.group).items():
            held = on_host(flat)
            part = (flat.detach() if held is None else held).narrow(0, piece.offset, piece.end - piece.start)
            state.tensors[f"{kind}/{piece.name}"] = part.to("cpu", copy=True) if held is None else part
    steps = {int(zero.optimizer.state.get(flat, {}).get("step", 0)) for flat in zero.fp32_partitioned_groups_flat}
    if len(steps) != 1:
        raise RuntimeError(f"the optimizer has taken different numbers of steps for different parameters: {sorted(steps)}")
    state.counters["optimizer_steps"] = steps.pop()
    return state


def restore(engine: Any, names: Mapping[int, str], reader: ShardReader) -> None:
    """Load this rank's part into an engine that has not stepped yet. Collective. Raises CheckpointError."""
    zero = engine.optimizer
    zero.checkpoint_event_prologue()
    steps = reader.counters["optimizer_steps"]
    for flat in zero.fp32_partitioned_groups_flat if steps else []:
        moments = {kind: torch.zeros_like(flat) for kind in reader.kinds if kind != MASTER}
        zero.optimizer.state[flat] = {"step": _step_count(zero.optimizer, flat, steps), **moments}
    for piece in _pieces(zero, names):
        if reader.numel.get(piece.name) != piece.numel:
            raise CheckpointError(f"{reader.folder} holds {reader.numel.get(piece.name, 'no')} elements of {piece.name}, the "
                                  f"model has {piece.numel}; set run.name to a new name, or run.resume=false")
        for kind, flat in _buffers(zero, piece.group).items():
            part = flat.detach().narrow(0, piece.offset, piece.end - piece.start)
            part.copy_(reader.read(kind, piece.name, piece.start, piece.end))
    for group in range(len(zero.fp16_groups)):
        zero._reassign_or_swap_out_partitioned_parameters(group)   # compute weights from master weights, as after a step
    zero.checkpoint_event_epilogue()
    for name in COUNTERS:
        setattr(engine, name, reader.counters[name])


def _buffers(zero: Any, group: int) -> dict[str, Tensor]:
    """The flat buffers of one sub-group by kind: master weights, and the optimizer's per-element state if there is any."""
    flat = zero.fp32_partitioned_groups_flat[group]
    state = zero.optimizer.state.get(flat, {})
    return {MASTER: flat, **{kind: value for kind, value in state.items()
                             if isinstance(value, Tensor) and value.dim() and value.numel() == flat.numel()}}


def _step_count(optimizer: Any, flat: Tensor, steps: int) -> Tensor | int:
    """As the optimizer keeps it: torch's own count in a tensor, DeepSpeed's in an integer."""
    if not isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
        return steps
    group = optimizer.param_groups[0]
    on_device = group.get("fused") or group.get("capturable")
    return torch.tensor(float(steps), dtype=torch.float32, device=flat.device if on_device else "cpu")
