"""Time, memory and accuracy of the fused two-channel loss beside its peers. (goals L1 to L9)

    python benchmarks/bench_loss.py [--short] [--device cpu|cuda] [--json FILE]

The floor is the three bare matrix products with the same chunks. Peers compute the same two-channel objective:
`naive` log-softmax of all logits and one backward; `two_graphs` each channel on its own; `liger` one call per channel of
LigerFusedLinearGRPOLoss; `trl` ChunkedLogProbFunction followed by `hdpo_loss`. Liger and TRL are left out where they
can't be imported. Goals that need large shapes are unset in a short run. Memory is the peak
above the inputs, gradients included, each contender in a process of its own.
"""
from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from common import Figure, arguments, in_child, paired, peak_bytes, report
from torch import Tensor

from hdpo import fused_linear_hdpo_loss, hdpo_loss
from hdpo.fused_loss import default_chunk_tokens

ROWS = 8
WEIGHTS = (1.0, 0.15)
MIB = 2**20
SIZES = ("tokens", "hidden", "vocabulary", "memory_tokens", "memory_hidden", "memory_vocabulary", "rounds")


@dataclass(frozen=True)
class Inputs:
    hidden: Tensor      # [N, H]
    weight: Tensor      # [V, H]
    targets: Tensor     # [N]
    old: Tensor         # [N]
    advantages: Tensor  # [C, B]
    row: Tensor         # [N]
    mask: Tensor        # [N]
    keep: Tensor | None  # [K] the trained tokens; on CUDA known to whoever builds the batch, so finding them is not timed

    @property
    def chunk(self) -> int:
        return default_chunk_tokens(len(self.weight), 4, self.hidden.is_cuda)


def make_inputs(tokens: int, hidden: int, vocabulary: int, device: str, dtype: torch.dtype, density: float = 1.0,
                scale: float = 1.0) -> Inputs:
    """Strongly off-policy tokens. The logits' spread is `scale`, so log-probs lie near -log(vocabulary) at scale 1."""
    torch.manual_seed(0)
    h = torch.randn(tokens, hidden, device=device, dtype=dtype) * (scale * hidden ** -0.5)
    w = torch.randn(vocabulary, hidden, device=device, dtype=dtype)
    old = -torch.full((tokens,), float(vocabulary), device=device).log() - 0.5 + torch.randn(tokens, device=device)
    mask = (torch.rand(tokens, device=device) < density).float()
    keep = mask.nonzero().squeeze(1) if device == "cuda" and density < 1 else None
    return Inputs(h.requires_grad_(), w.requires_grad_(), torch.randint(0, vocabulary, (tokens,), device=device), old,
                  torch.randn(2, ROWS, device=device), torch.arange(tokens, device=device) * ROWS // tokens, mask, keep)


def gradients(loss: Tensor, x: Inputs) -> tuple[Tensor, Tensor]:
    return torch.autograd.grad(loss, (x.hidden, x.weight))


def run_floor(x: Inputs) -> object:
    """Three bare products of the inputs' type, nothing else."""
    with torch.no_grad():
        h, w = x.hidden.detach(), x.weight.detach()
        d_hidden, d_weight = torch.empty_like(h), torch.zeros_like(w)
        buffer = h.new_empty(x.chunk, len(w))
        for part, d_part in zip(h.split(x.chunk), d_hidden.split(x.chunk)):
            logits = torch.mm(part, w.t(), out=buffer[:len(part)])
            torch.mm(logits, w, out=d_part)
            d_weight.addmm_(logits.t(), part)
    return d_hidden, d_weight


def run_fused(x: Inputs, entropy: bool = True) -> object:
    loss, _ = fused_linear_hdpo_loss(x.hidden, x.weight, x.targets, x.old, x.advantages, x.mask, row=x.row, keep=x.keep,
                                     weights=WEIGHTS, entropy=entropy)
    return gradients(loss, x)


def log_probs_of(x: Inputs) -> Tensor:
    logits = x.hidden @ x.weight.t()
    return torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1).gather(
        1, x.targets.unsqueeze(1)).squeeze(1)


def run_naive(x: Inputs) -> object:
    return gradients(hdpo_loss(log_probs_of(x), x.old, x.advantages[:, x.row], x.mask, weights=WEIGHTS)[0], x)


def run_two_graphs(x: Inputs) -> object:
    parts = [gradients(hdpo_loss(log_probs_of(x), x.old, x.advantages[c:c + 1, x.row], x.mask, weights=(w,))[0], x)
             for c, w in enumerate(WEIGHTS)]
    return parts[0][0].add_(parts[1][0]), parts[0][1].add_(parts[1][1])


def run_liger(x: Inputs) -> object:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    rule = LigerFusedLinearGRPOLoss(beta=0.0, compiled=False, use_ref_model=False, loss_type="bnpo", delta=3.0)
    h, targets, mask, old = (t.view(ROWS, -1, *t.shape[1:]) for t in (x.hidden, x.targets, x.mask, x.old))
    loss = sum(w * rule(h, x.weight, targets, mask, x.advantages[c], old_per_token_logps=old)[0]
               for c, w in enumerate(WEIGHTS))
    return gradients(loss, x)


def run_trl(x: Inputs) -> object:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    log_probs = ChunkedLogProbFunction.apply(x.hidden, x.weight, None, x.targets, 1.0, 8192, None, 1.0, ())[0]
    return gradients(hdpo_loss(log_probs, x.old, x.advantages[:, x.row], x.mask, weights=WEIGHTS)[0], x)


CONTENDERS: dict[str, Callable[[Inputs], object]] = {
    "floor": run_floor, "fused": run_fused, "fused_no_entropy": functools.partial(run_fused, entropy=False),
    "naive": run_naive, "two_graphs": run_two_graphs, "liger": run_liger, "trl": run_trl,
}


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


def time_figures(args, names: list[str]) -> tuple[dict[str, Figure], dict]:
    shape = (args.tokens, args.hidden, args.vocabulary, args.device, args.dtype)
    x = make_inputs(*shape)
    sparse = make_inputs(*shape, density=0.25)
    quarter = replace(x, mask=sparse.mask, keep=sparse.keep)
    run = {name: functools.partial(CONTENDERS[name], x) for name in names}
    run["density_0.25"] = functools.partial(run_fused, quarter, entropy=False)
    times = paired(run, "floor", args.rounds, cuda=args.device == "cuda")
    ratio = {name: value["ratio"] for name, value in times.items()}
    lean = ratio["fused_no_entropy"]   # the peers compute no entropy either
    figures = {
        "L5 time: fused / floor": Figure(lean, "x", "lower", 1.25),
        "time: fused with entropy / floor": Figure(ratio["fused"], "x", "lower"),
        "L6 time: fused / naive": Figure(lean / ratio["naive"], "x", "lower", 1.1),
        "L7 time: two graphs / fused": Figure(ratio["two_graphs"] / lean, "x", "higher", 1.7),
        "L8 time: a quarter of the tokens / naive": Figure(ratio["density_0.25"] / ratio["naive"], "x", "lower",
                                                           None if args.short else 0.35),
    }
    if "liger" in names:
        figures["L7 time: Liger, a call per channel / fused"] = Figure(ratio["liger"] / lean, "x", "higher", 2.2)
    if "trl" in names:
        figures["time: TRL / fused"] = Figure(ratio["trl"] / lean, "x", "higher")
    return figures, times


def memory_figures(args, names: list[str]) -> tuple[dict[str, Figure], dict]:
    def peak(name: str, tokens: int) -> float:
        child = in_child(__file__, ["--child", name, "--device", args.device, "--tokens", str(tokens), "--hidden",
                                    str(args.memory_hidden), "--vocabulary", str(args.memory_vocabulary)])
        return float("nan") if child is None else child["peak_bytes"] / MIB

    tokens = args.memory_tokens
    peaks = {name: peak(name, tokens) for name in names if name in ("floor", "fused", "naive", "liger", "trl")}
    element = torch.finfo(args.dtype).bits // 8
    growth = 3 * tokens * args.memory_hidden * element / MIB   # of the hidden states' gradient at four times the tokens
    four = peak("fused", 4 * tokens)
    figures = {
        "memory: fused": Figure(peaks["fused"], "MiB", "lower", None, 0.05),
        "L2 memory: naive / fused": Figure(peaks["naive"] / peaks["fused"], "x", "higher", None if args.short else 10, 0.05),
        "L3 memory: fused / floor": Figure(peaks["fused"] / peaks["floor"], "x", "lower", 1.15, 0.05),
        "L3 memory: growth at 4x tokens / growth of dH": Figure((four - peaks["fused"]) / growth, "x", "lower", 1.1, 0.3),
    }
    if "liger" in names:
        figures["L4 memory: Liger / fused"] = Figure(peaks["liger"] / peaks["fused"], "x", "higher", 1.5, 0.05)
    if "trl" in names:
        figures["memory: TRL / fused"] = Figure(peaks["trl"] / peaks["fused"], "x", "higher", None, 0.05)
    return figures, {**peaks, "fused at 4x tokens": four}


def accuracy_figures(args) -> dict[str, Figure]:
    """Relative L2 errors of the gradients against float64 autograd of the naive loss on the same (rounded) inputs."""
    def errors(got, truth) -> list[float]:
        return [float((a.double() - b).norm() / b.norm()) for a, b in zip(got, truth)]

    figures = {}
    for name, scale in (("flat", 1.0), ("peaked", 14.0)):
        for dtype in (torch.float32, torch.bfloat16):
            x = make_inputs(512, 64, 2000, args.device, dtype, scale=scale)
            double = replace(x, hidden=x.hidden.detach().double().requires_grad_(),
                             weight=x.weight.detach().double().requires_grad_())
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
    return figures


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name in SIZES:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    parser.add_argument("--child", choices=CONTENDERS, help="measure one contender's peak memory, print it and exit")
    args = parser.parse_args()
    args.dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    sizes = {"short": (128, 1024, 16_384, 1024, 256, 32_768, 3), "full": (2048, 1024, 32_768, 4096, 1024, 151_936, 5),
             "cuda": (8192, 4096, 151_936, 8192, 4096, 151_936, 5)}[
                 "cuda" if args.device == "cuda" else "short" if args.short else "full"]
    for key, value in zip(SIZES, sizes, strict=True):
        setattr(args, key, getattr(args, key) or value)
    if args.child:
        x = make_inputs(args.tokens, args.hidden, args.vocabulary, args.device, args.dtype)
        run_floor(make_inputs(64, 64, 64, args.device, args.dtype))   # the BLAS library's own buffers
        print(json.dumps({"peak_bytes": peak_bytes(lambda: CONTENDERS[args.child](x), args.device == "cuda")}))
        return 0
    names = available(args.device)
    figures = accuracy_figures(args)
    memory, peaks = memory_figures(args, names)
    timed, times = time_figures(args, names)
    details = {"sizes": {key: getattr(args, key) for key in SIZES}, "times": times, "peak_mib": peaks}
    return not report("loss", {**figures, **memory, **timed}, details, args.json, args.short)


if __name__ == "__main__":
    sys.exit(main())
