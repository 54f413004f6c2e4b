"""Time, memory, accuracy and invariance of the fused two-channel loss beside its peers. (goals L1 to L10)

    python benchmarks/bench_loss.py [--short] [--part PART ...] [--device cpu|cuda] [--json FILE]

The floor is the three bare matrix products with the same chunks. Peers compute the same two-channel objective:
`naive` log-softmax of all logits and one backward; `two_graphs` each channel on its own; `liger` one call per channel of
LigerFusedLinearGRPOLoss (its memory: a single call); `trl` ChunkedLogProbFunction followed by `hdpo_loss`. Liger and TRL
come with `pip install -e .[bench]` and are left out where they can't be imported. Goals that need large shapes are unset
in a short run. Memory is the peak above the inputs, gradients included, each contender in a process of its own.

On CUDA: bf16, Qwen3-VL-8B's head, 8,192 and 40,960 tokens; a full run on a CPU takes a quarter of an hour and 10 GB.
"""
from __future__ import annotations

import functools
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from common import Figure, arguments, in_child, paired, peak_bytes, report
from loss_contenders import CONTENDERS, EXTRA, WEIGHTS, Inputs, log_probs_of, make_inputs, run_floor, run_fused, run_naive
from torch import Tensor

from hdpo import fused_linear_hdpo_loss

MIB = 2**20
PARTS = ("accuracy", "invariance", "memory", "time")
SIZES = ("tokens", "hidden", "vocabulary", "memory_tokens", "memory_hidden", "memory_vocabulary", "rounds")


def available(device: str) -> list[str]:
    """Contenders that run here and agree with the naive gradient."""
    x = make_inputs(64, 16, 500, device, torch.float32)
    expected, names = run_naive(x), []
    for name, run in CONTENDERS.items():
        try:
            got = run(x)
        except ImportError as exc:
            print(f"  without {name}: {exc}", file=sys.stderr)
            continue
        if name != "floor":
            for a, b in zip(got, expected):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6, msg=f"{name} computes something else")
        names.append(name)
    return names


def time_figures(args, names: list[str], tokens: int) -> tuple[dict[str, Figure], dict]:
    cuda = args.device == "cuda"
    shape = (tokens, args.hidden, args.vocabulary, args.device, args.dtype)
    x = make_inputs(*shape)
    sparse = make_inputs(*shape, density=0.25)
    quarter = replace(x, mask=sparse.mask, keep=sparse.keep)
    run = {name: functools.partial(CONTENDERS[name], x) for name in names}
    run |= {name: functools.partial(EXTRA[name], x) for name in ("on_policy", "on_policy_apart")}
    run["density_0.25"] = functools.partial(run_fused, quarter, entropy=False)
    times = paired(run, "floor", args.rounds, cuda=cuda)
    ratio = {name: value["ratio"] for name, value in times.items()}
    lean = ratio["fused_no_entropy"]   # the peers compute no entropy either
    at = f", {tokens} tokens" if cuda else ""
    figures = {
        f"L5 time: fused / floor{at}": Figure(lean, "x", "lower", 1.25),
        f"time: fused with entropy / floor{at}": Figure(ratio["fused"], "x", "lower"),
        f"time: on-policy, log-probs computed apart / in one pass{at}": Figure(
            ratio["on_policy_apart"] / ratio["on_policy"], "x", "higher"),
        f"L6 time: fused / naive{at}": Figure(lean / ratio["naive"], "x", "lower", 1.1),
        f"L7 time: two graphs / fused{at}": Figure(ratio["two_graphs"] / lean, "x", "higher", 1.7),
        f"L8 time: a quarter of the tokens / naive{at}": Figure(ratio["density_0.25"] / ratio["naive"], "x", "lower",
                                                                None if args.short else 0.35),
    }
    if "liger" in names:
        figures[f"L7 time: Liger, a call per channel / fused{at}"] = Figure(ratio["liger"] / lean, "x", "higher", 2.2)
    if "trl" in names:
        figures[f"time: TRL / fused{at}"] = Figure(ratio["trl"] / lean, "x", "higher")
    if cuda:   # three products of 2*N*H*V FLOPs at 600 TFLOP/s, and a quarter more
        goal = {8192: 65.0, 40960: 320.0}.get(tokens) if "H200" in torch.cuda.get_device_name() and not args.short else None
        figures[f"time: fused{at}"] = Figure(times["fused_no_entropy"]["seconds"] * 1e3, "ms", "lower", goal)
    return figures, times


def memory_figures(args, names: list[str], tokens: int) -> tuple[dict[str, Figure], dict]:
    def peak(name: str, tokens: int) -> float:
        child = in_child(__file__, ["--child", name, "--device", args.device, "--tokens", str(tokens), "--hidden",
                                    str(args.memory_hidden), "--vocabulary", str(args.memory_vocabulary)])
        return float("nan") if child is None else child["peak_bytes"] / MIB

    cuda = args.device == "cuda"
    peaks = {name: peak(name, tokens) for name in ("floor", "fused", "naive", "naive_held", "liger_one", "trl")
             if name.removesuffix("_one").removesuffix("_held") in names}
    element = torch.finfo(args.dtype).bits // 8
    growth = 3 * tokens / 4 * args.memory_hidden * element / MIB   # of the hidden states' gradient from a quarter of the tokens
    quarter = peak("fused", tokens // 4)
    at = f", {tokens} tokens" if cuda else ""
    less = None if args.short else {40960: 12.0}.get(tokens) if cuda else 10.0
    figures = {
        f"memory: fused{at}": Figure(peaks["fused"], "MiB", "lower", 5000 if cuda and not args.short else None, 0.05),
        f"L2 memory: naive, logits held by the model's output / fused{at}": Figure(
            peaks["naive_held"] / peaks["fused"], "x", "higher", less, 0.05),
        f"memory: naive, logits dropped before backward / fused{at}": Figure(
            peaks["naive"] / peaks["fused"], "x", "higher", None, 0.05),
        f"L3 memory: fused / floor{at}": Figure(peaks["fused"] / peaks["floor"], "x", "lower", None if cuda else 1.15, 0.05),
    }
    if not args.short:   # small shapes grow by less than an allocator's noise
        figures[f"L3 memory: growth from a quarter of the tokens / growth of dH{at}"] = Figure(
            (peaks["fused"] - quarter) / growth, "x", "lower", None if cuda else 1.1, 0.3)
    if "liger" in names:
        figures[f"L4 memory: Liger, one channel / fused{at}"] = Figure(peaks["liger_one"] / peaks["fused"], "x", "higher",
                                                                       None if cuda else 1.5, 0.05)
    if "trl" in names:
        figures[f"memory: TRL / fused{at}"] = Figure(peaks["trl"] / peaks["fused"], "x", "higher", None, 0.05)
    return figures, {**peaks, "fused at a quarter of the tokens": quarter}


def part_gradient(x: Inputs, index: Tensor, norms: Tensor) -> Tensor:
    """[V, H] of some of the tokens, with the norms of all."""
    loss, _ = fused_linear_hdpo_loss(x.hidden[index], x.weight, x.targets[index], x.old[index], x.advantages, x.mask[index],
                                     row=x.row[index], weights=WEIGHTS, norms=norms)
    return torch.autograd.grad(loss, x.weight)[0]


def _rank(rank: int, x: Inputs, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    mine = torch.arange(len(x.targets))[rank::2] if rank else torch.arange(0, len(x.targets), 2)[:-40]   # unequal shares
    if rank:
        mine = torch.cat([mine, torch.arange(0, len(x.targets), 2)[-40:]])
    norms = x.mask[mine].sum().expand(2).clone()
    torch.distributed.all_reduce(norms)
    gradient = part_gradient(x, mine, norms)
    torch.distributed.all_reduce(gradient)
    if rank == 0:
        torch.save(gradient, f"{folder}/gradient.pt")
    torch.distributed.destroy_process_group()


def invariance_figures(args) -> dict[str, Figure]:
    """Relative L2 change of the weight's gradient when the batch is shuffled and split, and when two ranks share it."""
    figures = {}
    for dtype, goal in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        x = make_inputs(512, 64, 2000, "cpu", dtype, density=0.7)
        norms, everything = x.mask.sum().expand(2), torch.arange(512)
        whole = part_gradient(x, everything, norms)
        shuffled = everything[torch.randperm(512)]
        split = sum(part_gradient(x, piece, norms) for piece in shuffled.split(37))
        frozen = replace(x, hidden=x.hidden.detach(), weight=x.weight.detach().requires_grad_())
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(_rank, (frozen, folder), nprocs=2)
            ranks = torch.load(Path(folder) / "gradient.pt")
        bits = f"fp{torch.finfo(dtype).bits}"
        for name, other in (("shuffled micro-batches", split), ("two ranks with unequal shares", ranks)):
            figures[f"L10 {bits} gradient change, {name}"] = Figure(
                float((other - whole).norm() / whole.norm()), "", "lower", goal, 10.0)
    return figures


def accuracy_figures(args) -> dict[str, Figure]:
    """Relative L2 errors of the gradients against float64 autograd of the naive loss on the same (rounded) inputs."""
    def errors(got, truth) -> list[float]:
        return [float((a.double() - b).norm() / b.norm()) for a, b in zip(got, truth)]

    figures = {}
    for name, scale in (("flat", 1.0), ("peaked", 14.0)):
        for dtype in (torch.float32, torch.bfloat16):
            x = make_inputs(512, 64, 32_768, args.device, dtype, scale=scale)
            double = replace(x, hidden=x.hidden.detach().double().requires_grad_(),
                             weight=x.weight.detach().double().requires_grad_())
            # ratios on every piece of the surrogate, but none so near a kink that rounding could carry it across
            ratio = torch.tensor([0.5, 0.9, 1.0, 1.1, 1.5, 4.0], device=args.device)[torch.arange(512) % 6]
            x, double = (replace(y, old=log_probs_of(double).detach().float() - ratio.log()) for y in (x, double))
            truth = run_naive(double)
            fused, naive = errors(run_fused(x), truth), errors(run_naive(x), truth)
            if dtype is torch.float32:
                # a peaked distribution magnifies the rounding of the logits themselves, which the naive loss shares
                goal = 5e-6 if name == "flat" else 1.25 * max(naive)
                figures[f"L1 fp32 gradient error, {name}"] = Figure(max(fused), "", "lower", goal, 1.0)
                exact = max(errors(run_fused(double), truth))
                figures[f"L1 fp64 gradient error, {name}"] = Figure(exact, "", "lower", 1e-12, 10.0)
            else:
                worst = max(a / b for a, b in zip(fused, naive))
                figures[f"L9 bf16 gradient error, {name}: fused / naive"] = Figure(worst, "x", "lower", 1.25, 0.1)
                if name == "flat":
                    coarse = min(a / b for a, b in zip(errors(run_naive(x, coarse=True), truth), fused))
                    figures["bf16 gradient error, flat: bf16 softmax / fused"] = Figure(coarse, "x", "higher", None, 0.2)
    return figures


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name in SIZES:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    parser.add_argument("--part", choices=PARTS, action="append", help="measure only this; other figures in FILE stay")
    parser.add_argument("--child", choices=[*CONTENDERS, *EXTRA], help="measure one peak of memory, print it and exit")
    args = parser.parse_args()
    args.dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    small, full = (128, 1024, 16_384, 2048, 512, 65_536, 3), (2048, 1024, 32_768, 4096, 1024, 151_936, 3)
    sizes = small if args.short else (8192, 4096, 151_936, 8192, 4096, 151_936, 5) if args.device == "cuda" else full
    for key, value in zip(SIZES, sizes, strict=True):
        setattr(args, key, getattr(args, key) or value)
    if args.child:
        x = make_inputs(args.tokens, args.hidden, args.vocabulary, args.device, args.dtype)
        run_floor(make_inputs(64, 64, 64, args.device, args.dtype))   # the BLAS library's own buffers
        run = {**CONTENDERS, **EXTRA}[args.child]
        print(json.dumps({"peak_bytes": peak_bytes(lambda: run(x), args.device == "cuda")}))
        return 0
    parts = args.part or PARTS
    names, figures = available(args.device), {}
    details = {"sizes": {key: getattr(args, key) for key in SIZES}}
    if "accuracy" in parts:
        figures |= accuracy_figures(args)
    if "invariance" in parts:
        figures |= invariance_figures(args)
    longer = [40_960] if args.device == "cuda" and not args.short else []
    for what, measure in (("memory", memory_figures), ("time", time_figures)):
        for tokens in [args.memory_tokens if what == "memory" else args.tokens, *longer] if what in parts else []:
            found, details[f"{what}, {tokens} tokens"] = measure(args, names, tokens)
            figures |= found
    return not report("loss", figures, details, args.json, args.short, keep=bool(args.part))


if __name__ == "__main__":
    sys.exit(main())
