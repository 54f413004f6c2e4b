"""Does weight sync take time in proportion to the model, and memory in proportion to one group? (Y1, Y2)

    python benchmarks/bench_sync.py [--short] [--json FILE]

Random Qwen3-VL models of growing size, each in processes of its own: a ZeRO-3 policy of one rank, then of two, sends its
weights to a transformers engine on each rank, in groups of GROUP_MIB. A group is one gathered buffer, and on CPU gloo's copy
of it; a single tensor may be larger than GROUP_MIB and is a group then. Time is compared with copying the same bytes once, in
the same process. Memory is measured apart, with an allocator that gives freed tensors back at once: glibc keeps them, and
what it keeps is not what a sync needs.
"""
from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import Figure, arguments, paired, peak_bytes, report

GROUP_MIB = 8
SIZES = {"short": [(128, 4), (256, 8), (512, 8)], "full": [(256, 4), (512, 8), (1024, 10)]}   # (hidden, layers)


def save_model(folder: Path, hidden: int, layers: int) -> None:
    """config.json, weights and image processor; the engine is only sent weights, so a tokenizer is not needed."""
    from hdpo.adapters.torchvision_shim import activate

    activate()
    import torch
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

    text = dict(hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers, num_attention_heads=4,
                num_key_value_heads=2, head_dim=hidden // 4, vocab_size=1024,
                rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [hidden // 32] * 3,
                                 "mrope_interleaved": True})
    vision = dict(depth=2, hidden_size=64, intermediate_size=128, num_heads=2, patch_size=8, out_hidden_size=hidden,
                  num_position_embeddings=64, deepstack_visual_indexes=[0])
    torch.manual_seed(0)
    Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False,
                                                  image_token_id=5)).save_pretrained(folder)
    Qwen2VLImageProcessor(patch_size=8, merge_size=2).save_pretrained(folder)


def measure(rank: int, ranks: int, port: int, hidden: int, layers: int, memory: bool, shared: str) -> None:
    """One rank, in a process of its own. Writes rank<N>.json: bytes sent, and either the peak of memory above what was
    resident or the time as a multiple of one copy."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import torch

    from hdpo.adapters.deepspeed_policy import DeepSpeedPolicy
    from hdpo.adapters.hf_engine import HfEngine
    from hdpo.checksums import Watch
    from hdpo.config import ModelConfig, OptimConfig, RolloutConfig

    model = Path(shared) / f"model{rank}"
    save_model(model, hidden, layers)
    policy = DeepSpeedPolicy(ModelConfig(path=str(model)), OptimConfig(), 5, seed=0)
    engine = HfEngine(str(model), config=RolloutConfig(), max_model_len=64, stop_token_ids=(1,), tool_call_end_id=1,
                      min_pixels=256, max_pixels=1024)
    sizes = [value.numel() * value.element_size() for _, value in policy.iter_weights(GROUP_MIB << 20)]

    def send(passing: Callable[[Any], Any] = lambda weights: weights) -> None:
        engine.load_weights(passing(policy.iter_weights(GROUP_MIB << 20)), 1)

    send()                        # the engine's own pages, mapped from its file until they are written
    found: dict[str, Any] = {"bytes": sum(sizes), "largest": max(sizes)}
    if memory:
        found["peak"] = peak_bytes(send, torch.cuda.is_available())
    else:
        found["times"] = beside_a_copy(sizes, {"sync": send, "with checksums": lambda: send(Watch().passing)}, policy.device)
    (Path(shared) / f"rank{rank}.json").write_text(json.dumps(found))
    policy.close()


def on_ranks(ranks: int, hidden: int, layers: int, memory: bool) -> dict[str, Any]:
    """What rank 0 found, or the rank with the highest peak."""
    from torch.multiprocessing import spawn

    if memory:
        os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 17)
    else:
        os.environ.pop("MALLOC_MMAP_THRESHOLD_", None)

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as shared:
        spawn(measure, (ranks, port, hidden, layers, memory, shared), nprocs=ranks)
        found = [json.loads((Path(shared) / f"rank{rank}.json").read_text()) for rank in range(ranks)]
    return max(found, key=lambda one: one.get("peak", 0))


def beside_a_copy(sizes: list[int], contenders: dict[str, Callable[[], object]], device: Any) -> dict[str, Any]:
    """Time the contenders in pairs with one copy of tensors of these sizes, bytes."""
    import torch

    source = [torch.ones(size, dtype=torch.uint8, device=device) for size in sizes]
    target = [torch.empty_like(part) for part in source]

    def copy() -> None:
        for a, b in zip(source, target):
            b.copy_(a)

    return paired({"copy": copy, **contenders}, "copy", 5, device.type == "cuda")


def main() -> int:
    args = arguments(__doc__).parse_args()
    figures: dict[str, Figure] = {}
    details: dict[str, Any] = {"group_mib": GROUP_MIB}
    for ranks in (1, 2):
        sizes, runs = SIZES["short" if args.short else "full"], []
        for hidden, layers in sizes:
            found = on_ranks(ranks, hidden, layers, memory=False)
            runs.append(found)
            details[f"ranks {ranks}, hidden {hidden}, layers {layers}"] = found
            print(f"  {ranks} rank(s), {found['bytes'] / 2**20:8.1f} MiB: sync {found['times']['sync']['seconds']:.3f} s, "
                  f"{found['times']['sync']['ratio']:.2f}x a copy", flush=True)
        peak = on_ranks(ranks, *sizes[-1], memory=True)["peak"]
        first, last = runs[0], runs[-1]
        group = max(GROUP_MIB << 20, last["largest"])
        per_byte = [run["times"]["sync"]["seconds"] / run["bytes"] for run in (first, last)]
        at = "one rank" if ranks == 1 else f"{ranks} ranks"
        figures |= {
            f"Y1 seconds per byte, largest / smallest model, {at}": Figure(per_byte[1] / per_byte[0], "x", "lower", 1.5, 2.0),
            f"Y2 peak memory above resident / one group, {at}": Figure(peak / group, "x", "lower", 2.5, 0.3),
            f"sync / copying the same bytes, {at}": Figure(last["times"]["sync"]["ratio"], "x", "lower", None, 0.5),
            f"the same with checksums, {at}": Figure(last["times"]["with checksums"]["ratio"], "x", "lower", None, 0.5),
            f"largest model, {at}": Figure(last["bytes"] / 2**20, "MiB", "higher"),
        }
    return 0 if report("sync", figures, details, args.json, args.short) else 1


if __name__ == "__main__":
    sys.exit(main())
