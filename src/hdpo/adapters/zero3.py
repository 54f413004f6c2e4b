"""DeepSpeed's configuration, and what of its state needs no device memory while the engine samples.

Imports no vendor, so that a memory plan can be made of the same numbers without starting DeepSpeed.
"""
from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

REDUCE_BUCKET = 200_000_000        # elements of the buffer in which gradients wait for their reduce-scatter
SUB_GROUP = 1_000_000_000          # elements of a shard that the optimizer updates at a time
MAX_LIVE_PARAMETERS = 1_000_000_000   # elements that may be gathered at once, prefetched layers included
PREFETCH = 50_000_000              # elements gathered ahead of their use


def zero3_config(dtype: torch.dtype, grad_clip: float, offload: bool = False, reduce_dtype: str = "float32") -> dict[str, Any]:
    """ZeRO-3 with fp32 master weights, moments and gradient sums behind weights of `dtype`.

    `keep_in_fp32_modules` guards the rotary frequencies (see policy_model.assert_rope_fp32). A step's gradients are summed
    over dozens of micro-batches: in bf16 the later ones would round away. Ranks add theirs up in `reduce_dtype`; DeepSpeed
    itself would do it in bf16. `offload` keeps optimizer state on the host.
    """
    cuda = torch.cuda.is_available()
    zero: dict[str, Any] = {
        "stage": 3, "overlap_comm": cuda, "contiguous_gradients": True, "stage3_gather_16bit_weights_on_model_save": True,
        "reduce_bucket_size": REDUCE_BUCKET, "sub_group_size": SUB_GROUP, "stage3_prefetch_bucket_size": PREFETCH,
        "stage3_max_live_parameters": MAX_LIVE_PARAMETERS,
    }
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": cuda}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,   # boundaries are set by hand; our norms replace DeepSpeed's division
        "gradient_clipping": grad_clip,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "communication_data_type": {"float32": "fp32", "bfloat16": "bf16"}[reduce_dtype],
        "data_types": {"keep_in_fp32_modules": ["inv_freq"], "grad_accum_dtype": "fp32"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,   # theirs is compiled at run time; torch's fused AdamW runs on CPU too
        "steps_per_print": 1 << 30,
        "wall_clock_breakdown": False,
    }


def optimizer_tensors(zero: Any) -> tuple[list[Tensor], list[Tensor]]:
    """(tensors whose values an update needs, buffers it only writes) of a DeepSpeedZeroOptimizer_Stage3.

    Master weights that are the weights themselves (training in fp32) belong to neither.
    """
    weights = {flat.untyped_storage().data_ptr() for flat in zero.fp16_partitioned_groups_flat}
    masters = [flat for flat in zero.fp32_partitioned_groups_flat if flat.untyped_storage().data_ptr() not in weights]
    moments = [value for state in zero.optimizer.state.values() for value in state.values()
               if isinstance(value, Tensor) and value.dim()]
    scratch = [zero.grad_partitions_flat_buffer, *(b.buffer for b in zero.ipg_buckets.values() if b.buffer is not None)]
    return masters + moments, scratch


class Parking:
    """Takes tensors out of device memory and puts them back, in place: every view of them stays valid.

    Scratch comes back as zeros: DeepSpeed never writes the padding of a gradient's shards, and counts it in the norm.
    Their storages shrink to nothing meanwhile, so a use while they are away fails loudly. Host buffers are pinned and
    allocated once. DeepSpeed's own `offload_states` accepts its FusedAdam only, which needs a CUDA compiler on every node.
    """

    def __init__(self) -> None:
        self._host: dict[int, Tensor] = {}     # by place among those kept
        self._away: dict[int, tuple[torch.UntypedStorage, int, Tensor | None]] = {}
        self._lent: threading.Event | None = None

    @property
    def parked(self) -> bool:
        return bool(self._away)

    @torch.no_grad()
    def park(self, kept: Sequence[Tensor], scratch: Sequence[Tensor]) -> None:
        """Copy the storages of `kept` to the host and free them; free those of `scratch`, which return as zeros."""
        if self._lent is not None:
            self._lent.wait()      # a checkpoint is still written from these buffers
            self._lent = None
        for index, tensor in enumerate(kept):
            storage = tensor.untyped_storage()
            host = self._host.get(index)
            if host is None or len(host) != storage.nbytes():
                host = self._host[index] = _host_buffer(storage.nbytes(), tensor.is_cuda)
            host.copy_(_bytes(storage), non_blocking=True)
            self._away[id(tensor)] = storage, storage.nbytes(), host
        self._away |= {id(t): (t.untyped_storage(), t.untyped_storage().nbytes(), None) for t in scratch}
        _finish()
        for storage, _, _ in self._away.values():
            storage.resize_(0)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def on_host(self, tensor: Tensor) -> Tensor | None:
        """What a parked tensor holds, as a view of the host buffer; None for one that is not parked."""
        _, _, host = self._away.get(id(tensor), (None, 0, None))
        return None if host is None else host.view(tensor.dtype)[tensor.storage_offset():][:tensor.numel()].view(tensor.shape)

    def lend(self, returned: threading.Event) -> None:
        """The buffers are read by others: the next `park` waits until they are returned."""
        self._lent = returned

    @torch.no_grad()
    def unpark(self) -> None:
        for storage, size, host in self._away.values():
            storage.resize_(size)
            if host is None:
                _bytes(storage).zero_()
            else:
                _bytes(storage).copy_(host, non_blocking=True)
        _finish()
        self._away = {}


def _host_buffer(size: int, pinned: bool) -> Tensor:
    """Bytes that a device copies to and from at full speed. torch's own pinned memory comes in powers of two: up to twice it."""
    buffer = torch.empty(size, dtype=torch.uint8)
    if pinned:
        torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), size, 0)))
    return buffer


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
