"""Where does a step's time go, and what does it hold in memory, phase by phase? (Z1)

    python benchmarks/bench_step.py [--short] [--json FILE] [--model toy|tiny|8b] [--ranks N]

Runs the real RL loop on the toy world (tool server, sandbox, ZeRO-3 ranks, engine) and reads its metrics: seconds and GiB
of each phase, median over the steps after the first. On CPU the model is the shipped toy base, on CUDA random weights of
Qwen3-VL-8B's shapes (`8b`), which never answer and so sample up to the budget of every turn; `tiny` does the same on CPU.
The rate of weight sync, its checks included, stands beside that of one copy on the same device.
"""
from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import Figure, arguments, in_child, paired, report

import hdpo

ROOT = Path(__file__).resolve().parents[1]
TOY = Path(hdpo.__file__).parent / "toyworld" / "assets" / "toy-base"
SHAPES: dict[str, dict[str, dict[str, Any]]] = {
    "tiny": {"text": dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, head_dim=32,
                          num_key_value_heads=2, vocab_size=2048),
             "vision": dict(depth=2, hidden_size=64, intermediate_size=128, num_heads=2, out_hidden_size=128,
                            deepstack_visual_indexes=[0])},
    "8b": {"text": dict(hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32, head_dim=128,
                        num_key_value_heads=8, vocab_size=151936),
           "vision": dict(depth=27, hidden_size=1152, intermediate_size=4304, num_heads=16, out_hidden_size=4096,
                          deepstack_visual_indexes=[8, 16, 24])},
}
SMALL = {"rollout.prompts_per_step": 4, "optim.mini_batch_prompts": 2, "rollout.group_size": 4}
FULL = {"rollout.prompts_per_step": 16, "optim.mini_batch_prompts": 8, "rollout.group_size": 8}


def run(folder: Path, model: str, ranks: int, steps: int, cuda: bool, load: dict[str, int]) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl."""
    from hdpo.toyworld.demo import cpu_environment
    from hdpo.toyworld.world import make_world
    from hdpo.train.jsonl import read_metrics

    world = make_world(folder / "world", train_rows=200, val_rows=8, demos=20)
    import torch

    from hdpo.doctor.random_model import random_model
    path = TOY if model == "toy" else random_model(
        folder / "model", SHAPES[model]["text"], SHAPES[model]["vision"], torch.bfloat16 if cuda else torch.float32,
        torch.device("cuda" if cuda else "cpu"))
    settings: dict[str, Any] = {
        "run.folder": folder, "run.name": "bench", "model.path": path, "data.train": f"[{world.train}]",
        "tools.text_index": world.text_index, "tools.image_index": world.image_index, "optim.steps": steps,
        "eval.before": False, "eval.after": False, "checkpoint.every_steps": 0, "reward.max_unscored": 1.0,
        "log.tensorboard": False, **load}
    if cuda:
        settings |= {"model.dtype": "bfloat16", "model.gradient_checkpointing": True, "optim.offload": ranks < 4}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file",
               str(ROOT / "launch/accelerate" / ("zero3.yaml" if cuda else "cpu2.yaml")), "--num_processes", str(ranks),
               "--main_process_port", "0", str(ROOT / "launch/train_rl.py"),
               "--config", str(ROOT / "launch/configs/demo_rl.yaml")]
    for name, value in settings.items():
        command += ["--set", f"{name}={value}"]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | ({} if cuda else cpu_environment(ranks)))
    return read_metrics(folder / "bench" / "metrics.jsonl")


def copy_rate(cuda: bool) -> float:
    """GiB per second of copying 1 GiB (CPU: 128 MiB) from one place of the device's memory to another."""
    import torch

    source = torch.ones((1 << 30) if cuda else (1 << 27), dtype=torch.uint8, device="cuda" if cuda else "cpu")
    target = torch.empty_like(source)
    return source.numel() / 2**30 / paired({"copy": lambda: target.copy_(source)}, "copy", 5, cuda)["copy"]["seconds"]


def reduced_bytes(dtype: str) -> None:
    """In a process of its own: bytes that a micro-batch's gradients send per parameter, with optim.reduce_dtype, as JSON."""
    from hdpo.doctor.gpu_check import Lines
    from hdpo.doctor.gpu_run import Run
    from hdpo.doctor.random_model import TOY

    run = Run(TOY, Lines(io.StringIO()), {"model": {"dtype": "bfloat16"}, "optim": {"reduce_dtype": dtype}})
    from deepspeed.runtime.comm import coalesced_collectives

    sent, real = [], coalesced_collectives._torch_reduce_scatter_fn
    coalesced_collectives._torch_reduce_scatter_fn = lambda whole, part, group: (
        sent.append(whole.nbytes), real(whole, part, group))[1]
    batches = run.step()
    print(json.dumps({"bytes": sum(sent) / batches / run.shapes.trained}))
    run.policy.close()


def main() -> int:
    import torch

    cuda = torch.cuda.is_available()
    parser = arguments(__doc__)
    parser.add_argument("--model", choices=["toy", *SHAPES], default="8b" if cuda else "toy")
    parser.add_argument("--ranks", type=int, default=max(1, torch.cuda.device_count()))
    parser.add_argument("--reduced-bytes", metavar="DTYPE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.reduced_bytes:
        reduced_bytes(args.reduced_bytes)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        rows = run(Path(folder), args.model, args.ranks, 3 if args.short else 6, cuda, SMALL if args.short else FULL)[1:]
    seconds = {name[5:]: statistics.median(row[name] for row in rows) for name in rows[0] if name.startswith("time/")}
    memory = {name[7:-3]: max(row[name] for row in rows) for name in rows[0] if name.startswith("memory/")}
    step = seconds.pop("step")
    figures = {"step": Figure(step, "s", "lower", tolerance=0.5)}
    for phase, value in sorted(seconds.items(), key=lambda item: -item[1]):
        figures[f"{phase}, share of the step"] = Figure(value / step, "", "lower", tolerance=1.0)
    rate = statistics.median(row["sync/gb"] for row in rows) / seconds["sync"]
    figures |= {"sync": Figure(rate, "GiB/s", "higher", tolerance=1.0),
                "copy / sync, per byte": Figure(copy_rate(cuda) / rate, "x", "lower", tolerance=1.0)}
    figures |= {f"{phase}, memory at its end": Figure(value, "GiB", "lower") for phase, value in memory.items()}
    for dtype in ("float32", "bfloat16"):
        if found := in_child(__file__, ["--reduced-bytes", dtype]):
            figures[f"gradients sent, bytes per parameter, {dtype}"] = Figure(found["bytes"], "B", "lower")
    details = {"model": args.model, "ranks": args.ranks, "rows": rows}
    return 0 if report("step", figures, details, args.json, args.short) else 1


if __name__ == "__main__":
    sys.exit(main())
