"""The ZeRO-3 policy: accelerate sets DeepSpeed up, this file steps it, gathers it and saves it.

DeepSpeed averages gradients over ranks and divides by accumulation steps; our norms are already global, so the loss is
multiplied by the world size and the accumulation boundary is set by hand. One process without a launcher works too: it
is a world of one.
"""
from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from hdpo.adapters import zero_shards
from hdpo.adapters.lora import ADAPTER_FOLDER, Merged, adapter_parameters, merged_parameters, write_adapter
from hdpo.adapters.policy_model import HeadJob, assert_rope_fp32, load_policy_model, model_inputs, resolve_dtype
from hdpo.adapters.zero3 import Parking, optimizer_tensors, zero3_config
from hdpo.agent.families import FAMILIES
from hdpo.config import ModelConfig, OptimConfig
from hdpo.errors import ModelError, boundary
from hdpo.ranks.world import World, join_after_restart
from hdpo.state.export import SHARD_BYTES, Entry, ShardWriter, split, write_index
from hdpo.state.shards import ShardReader, TrainingState
from hdpo.state.surroundings import config_text, read_side_files
from hdpo.types import MicroBatch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed  # noqa: E402
from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs  # noqa: E402
from accelerate.utils import set_seed  # noqa: E402

from hdpo.adapters.extension_lock import load_communication_extension  # noqa: E402

_SAVE_GROUP_BYTES = 1 << 29


def ensure_launched() -> None:
    """Give torch.distributed the variables a launcher would have set, when there is none."""
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def _entry(item: Merged, stored: Callable[[str, Tensor], Tensor]) -> Entry:
    shape = getattr(item.weight, "ds_shape", item.weight.shape)
    return Entry(item.name, item.weight.dtype, tuple(stored(item.name, torch.empty(shape, device="meta")).shape))


class DeepSpeedPolicy:
    """Trainable weights. Every method is a collective: all ranks call it in the same order."""

    def __init__(self, model: ModelConfig, optim: OptimConfig, image_token_id: int | None, seed: int,
                 world: World | None = None) -> None:
        ensure_launched()
        self.dtype = resolve_dtype(model.dtype)
        self.image_token_id = image_token_id
        on_cpu = not torch.cuda.is_available()
        # Without an explicit gloo backend two CPU processes both believe they are rank 0.
        handlers = [InitProcessGroupKwargs(backend="gloo")] if on_cpu else []
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"           # also without `accelerate launch`
        os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)       # the launcher's fields give way to ours
        load_communication_extension()
        join_after_restart("gloo" if on_cpu else "nccl")
        plugin = DeepSpeedPlugin(hf_ds_config=zero3_config(self.dtype, optim.grad_clip, optim.offload, optim.reduce_dtype),
                                 zero3_init_flag=True)
        self.accelerator = Accelerator(deepspeed_plugin=plugin, kwargs_handlers=handlers)
        self.world = (world or World()).connect()
        set_seed(seed)   # the same on every rank; what must differ is seeded per rollout
        module = load_policy_model(model, self.dtype)
        parameters = [p for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay,
                                      fused=optim.offload or not on_cpu)   # unfused it needs the weights' size again
        self.engine, _ = self.accelerator.prepare(module, optimizer)
        assert_rope_fp32(self.engine)
        self._source = model.path
        self._around = self._read_around(Path(model.path))
        self.device = self.engine.device
        self._parking = Parking()
        self.parks = self.device.type == "cuda"

    # -- training ------------------------------------------------------------------------------------------------

    def run(self, micro: MicroBatch, job: HeadJob) -> tuple[Tensor, ...]:
        """One forward; returns what the job returns. Use under torch.no_grad() for log-probs."""
        return self.engine(job=job, **model_inputs(micro, self.image_token_id, self.device, self.dtype))

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate gradients of a loss whose norms are global; `last` closes the optimizer step."""
        self.engine.set_gradient_accumulation_boundary(is_boundary=last)
        self.engine.backward(loss * self.world.size, scale_wrt_gas=False)
        if not last:
            self.engine.step()   # advances DeepSpeed's micro-step counter; nothing is updated

    def step(self, lr: float) -> float:
        """Clip and update. Returns the global gradient norm before clipping.

        DeepSpeed looks at the norm before it touches a weight: one that is not finite clears the gradients on every rank
        and changes nothing else, and infinity is returned.
        """
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        return float(norm) if norm is not None else 0.0

    # -- memory ---------------------------------------------------------------------------------------------------

    def park(self) -> None:
        """Move optimizer state and fp32 weights to host memory and drop gradient buffers, while the engine is awake.

        Weights stay on the device, sharded, for the sync. Nothing happens on CPU, and the second call of two is free.
        """
        if self.parks and not self._parking.parked:
            self.engine.empty_partition_cache()
            here = [[t for t in tensors if t.device.type == self.device.type]
                    for tensors in optimizer_tensors(self.engine.optimizer)]
            self._parking.park(*here)

    def unpark(self) -> None:
        self._parking.unpark()

    # -- weights -------------------------------------------------------------------------------------------------

    def iter_weights(self, group_bytes: int) -> Iterator[tuple[str, Tensor]]:
        """All parameters in full, by Hugging Face name, gathered in groups of at most `group_bytes` (sized by ds_numel).

        Frozen parameters come too, tied ones under each of their names, adapters merged into their weights. A tensor is
        valid until the iterator advances.
        """
        group: list[Merged] = []
        size = 0
        for item in merged_parameters(self.engine.module.model):
            nbytes = sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in item.parameters)
            if group and size + nbytes > group_bytes:
                yield from self._gathered(group)
                group, size = [], 0
            group.append(item)
            size += nbytes
        yield from self._gathered(group)

    def _gathered(self, group: list[Merged]) -> Iterator[tuple[str, Tensor]]:
        unique = list({id(p): p for item in group for p in item.parameters}.values())
        with torch.no_grad(), deepspeed.zero.GatheredParameters(unique):
            for item in group:
                value = item.value()
                yield item.name, value
                value.data = value.new_empty(0)   # the receiver's variable would hold this group while the next is gathered

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def export_model(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> Callable[[], list[Path]]:
        """Write a plain Hugging Face folder: plain names, adapters merged, tied parameters once, experts as published.

        Every rank writes its share of the shard files (see state/export.py). The weights are gathered here; the returned
        function waits, on any thread, until this rank's files are written, and returns them.
        """
        model = self.engine.module.model
        stored = FAMILIES[model.config.model_type].as_stored
        first: dict[int, Merged] = {}
        for item in merged_parameters(model):
            first.setdefault(id(item.weight), item)      # a tied one under the first of its names
        files = split([_entry(item, stored) for item in first.values()], shard_bytes)
        writer = ShardWriter(folder, files, self.world.rank, self.world.size, shard_bytes)
        for name, value in self.iter_weights(_SAVE_GROUP_BYTES):
            writer.put(name, stored(name, value))
        adapter = self._adapter()
        if not self.world.is_main:
            return writer.finish
        return lambda: [*writer.finish(), *self._write_around(folder, files), *(
            write_adapter(folder / ADAPTER_FOLDER, model, adapter, self._source) if adapter else [])]

    def _adapter(self) -> dict[str, Tensor]:
        """The low-rank adapters by peft's names, on the host of rank 0; empty where there are none. Collective."""
        values = dict[str, Tensor]()
        for name, parameter in adapter_parameters(self.engine.module.model).items():
            with torch.no_grad(), deepspeed.zero.GatheredParameters([parameter]):
                if self.world.is_main:
                    values[name] = parameter.detach().cpu().clone()
        return values

    def _read_around(self, source: Path) -> dict[str, bytes]:
        """What stands around the weights in every folder this run writes. Raises ModelError: no save could succeed."""
        model = self.engine.module.model
        model.config.architectures, model.config.dtype = [type(model).__name__], str(self.dtype).removeprefix("torch.")
        with boundary(ModelError, f"model.path: {source} can't be saved again", OSError, ValueError, TypeError):
            text = config_text(source, model.config.to_diff_dict(), model.config.to_dict())
            return {"config.json": text.encode(), **read_side_files(source)}

    def _write_around(self, folder: Path, files: Mapping[str, Sequence[Entry]]) -> list[Path]:
        """What a folder holds besides its weights; returns the files."""
        write_index(folder, files)
        for name, data in self._around.items():
            (folder / name).write_bytes(data)
        return [path for path in folder.iterdir() if path.is_file() and path.suffix != ".safetensors"]

    def snapshot_state(self) -> TrainingState:
        """This rank's master weights and optimizer moments on its host. Where they are parked there, that is the snapshot: the
        next `park` waits until it is written."""
        self.park()
        state = zero_shards.snapshot(self.engine, self._trainable(), self._parking.on_host)
        if self._parking.parked:
            self._parking.lend(state.written)
        return state

    def restore_state(self, reader: ShardReader) -> None:
        """Continue from a state that any number of ranks wrote. Raises CheckpointError when it is of another model."""
        self.unpark()
        zero_shards.restore(self.engine, self._trainable(), reader)

    def _trainable(self) -> dict[int, str]:
        return {id(p): name.removeprefix("model.") for name, p in self.engine.module.named_parameters() if p.requires_grad}

    def close(self) -> None:
        """Leave the process group. No barrier: after an error on one rank the others would never come."""
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
