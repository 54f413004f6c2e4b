"""Does weight sync take time in proportion to the model, and memory in proportion to one group? (Y1, Y2)

    python benchmarks/bench_sync.py [--short] [--json FILE]

Random Qwen3-VL models of growing size, each in a process of its own: a ZeRO-3 policy of one rank sends its weights to the
transformers engine in groups of GROUP_MIB. One rank holds whole parameters and gathers by reference, so that Y2 bounds
what sending and the engine add; the group itself comes on top from two ranks on. Time is compared with copying the same
bytes once, in the same process.
"""
from __future__ import annotations

import argparse
import ctypes
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import Figure, arguments, in_child, paired, peak_bytes, report

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


def measure(hidden: int, layers: int) -> dict[str, Any]:
    """Runs in a child: bytes sent, time as a multiple of one copy, peak memory above what was resident."""
    import torch

    from hdpo.adapters.deepspeed_policy import DeepSpeedPolicy
    from hdpo.adapters.hf_engine import HfEngine
    from hdpo.checksums import Watch
    from hdpo.config import ModelConfig, OptimConfig, RolloutConfig

    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), hidden, layers)
        policy = DeepSpeedPolicy(ModelConfig(path=folder), OptimConfig(), 5, seed=0)
        engine = HfEngine(folder, config=RolloutConfig(), max_model_len=64, stop_token_ids=(1,), tool_call_end_id=1,
                          min_pixels=256, max_pixels=1024)
    cuda = torch.cuda.is_available()
    sizes = [value.numel() * value.element_size() for _, value in policy.iter_weights(GROUP_MIB << 20)]

    def send(passing: Callable[[Any], Any] = lambda weights: weights) -> None:
        engine.load_weights(passing(policy.iter_weights(GROUP_MIB << 20)), 1)

    send()                        # the engine's own pages, mapped from its file until they are written
    if not cuda:
        ctypes.CDLL("libc.so.6").malloc_trim(0)   # what the allocator kept of it would hide the next one's
    peak = peak_bytes(send, cuda)
    times = beside_a_copy(sizes, {"sync": send, "with checksums": lambda: send(Watch().passing)}, policy.device)
    policy.close()
    return {"bytes": sum(sizes), "largest": max(sizes), "peak": peak, "times": times}


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
    parser = arguments(__doc__)
    parser.add_argument("--child", nargs=2, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(*args.child)))
        return 0
    details: dict[str, Any] = {"group_mib": GROUP_MIB}
    for hidden, layers in SIZES["short" if args.short else "full"]:
        found = in_child(__file__, ["--child", str(hidden), str(layers)])
        if found is None:
            return 1
        details[f"hidden {hidden}, layers {layers}"] = found
        print(f"  {found['bytes'] / 2**20:8.1f} MiB: sync {found['times']['sync']['seconds']:.3f} s, "
              f"{found['times']['sync']['ratio']:.2f}x a copy, peak {found['peak'] / 2**20:.1f} MiB")
    _, first, *_, last = details.values()
    group = max(GROUP_MIB << 20, last["largest"])
    per_byte = [run["times"]["sync"]["seconds"] / run["bytes"] for run in (first, last)]
    figures = {
        "Y1 seconds per byte, largest / smallest model": Figure(per_byte[1] / per_byte[0], "x", "lower", 1.5, 0.3),
        "Y2 peak memory above resident / one group, largest model": Figure(last["peak"] / group, "x", "lower", 2.5, 0.3),
        "sync / copying the same bytes, largest model": Figure(last["times"]["sync"]["ratio"], "x", "lower", None, 0.5),
        "the same with checksums": Figure(last["times"]["with checksums"]["ratio"], "x", "lower", None, 0.5),
        "largest model": Figure(last["bytes"] / 2**20, "MiB", "higher"),
    }
    return 0 if report("sync", figures, details, args.json, args.short) else 1


if __name__ == "__main__":
    sys.exit(main())
