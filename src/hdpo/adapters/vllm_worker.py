"""What runs beside a vLLM model, in its worker: a reload that says what it missed, checksums, and what sleep may forget."""
from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from hdpo.checksums import Checksum, Comparison, compare

_RESENT = "resent"      # a tag of vLLM's allocator that sleep does not copy and that wakes with the weights


def reload(worker: Any, weights: Iterator[tuple[str, Any]]) -> list[str]:
    """vLLM's own layer by layer reload (`model_runner.reload_weights`), but the names it missed are returned, not logged."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    model = worker.get_model()
    expected = {name for name, _ in model.named_parameters()}
    if worker.device.type == "cpu":   # there vLLM packs experts for its kernel only when it makes the kernel: make it again
        for module in model.modules():
            if getattr(getattr(module, "quant_method", None), "moe_kernel", None) is not None:
                module.quant_method.moe_kernel = None
    with set_current_vllm_config(worker.vllm_config):    # kernels made anew read it
        initialize_layerwise_reload(model)
        loaded = model.load_weights(weights)
        finalize_layerwise_reload(model, worker.model_config)
    return sorted(expected - loaded)


def forget_weights(worker: Any) -> None:
    """Have the next sleep drop the parameters instead of copying them to the host. CUDA.

    vLLM's level 2 drops everything its loader allocated, also tensors that are neither parameters nor buffers and that no
    reload fills: Qwen3-VL's deepstack inputs. Here a segment is dropped only if parameters are all that lives in it.
    """
    from vllm.device_allocator.cumem import CuMemAllocator

    allocator = CuMemAllocator.get_instance()
    resent = {parameter.untyped_storage().data_ptr() for parameter in worker.get_model().parameters()}
    for pool, _ in allocator.allocator_and_pools.get("weights", ()):
        for address in droppable(pool.snapshot(include_traces=False), resent):
            if address in allocator.pointer_to_data:
                allocator.pointer_to_data[address].tag = _RESENT


def droppable(segments: Iterable[Mapping[str, Any]], resent: set[int]) -> list[int]:
    """Addresses of the segments of a torch memory snapshot in which every block in use begins at one of `resent`."""
    found = []
    for segment in segments:
        address, live = segment["address"], []
        for block in segment["blocks"]:
            live += [address] if block["state"] != "inactive" else []
            address += block["size"]
        if live and resent.issuperset(live):
            found.append(segment["address"])
    return found


def compare_sums(worker: Any, sent: dict[str, Checksum]) -> Comparison:
    """Fused names by the model's own tables; all of a layer's experts count as one tensor."""
    model = worker.get_model()
    fused = {part: whole for whole, parts in getattr(model, "packed_modules_mapping", {}).items() for part in parts}
    mapper = getattr(model, "hf_to_vllm_mapper", None)

    def key(name: str) -> str:
        before, experts, _ = name.partition(".experts.")
        return before + ".experts" if experts else ".".join(fused.get(part, part) for part in name.split("."))

    renamed = {(mapper.map_name(name) or name) if mapper else name: checksum for name, checksum in sent.items()}
    return compare(renamed, model.named_parameters(remove_duplicate=False), key, _sums_of_all_parts)


def _sums_of_all_parts(sums: dict[str, Checksum]) -> list[dict[str, Checksum]]:
    """What every rank of this engine holds."""
    import torch
    from vllm.distributed import get_tp_group

    group = get_tp_group()
    parts: list[Any] = [sums] * group.world_size
    if group.world_size > 1:
        torch.distributed.all_gather_object(parts, sums, group=group.cpu_group)
    return parts
