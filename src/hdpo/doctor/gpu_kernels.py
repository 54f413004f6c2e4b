"""`kernels` of the GPU check: the products that mix precisions, the fused loss, attention of packed rows, parking."""
from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

from hdpo.doctor.gpu_check import Lines
from hdpo.fused_loss import fused_linear_hdpo_loss
from hdpo.losses import hdpo_loss
from hdpo.types import Span

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32
GIB = 2**30
ROUNDS = 5


def relative(found: Tensor, wanted: Tensor) -> float:
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-30))


def normal(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator(device=DEVICE).manual_seed(seed)
    return (torch.randn(*shape, device=DEVICE, generator=generator) * scale).to(DTYPE)


def seconds(run: Callable[[], object]) -> float:
    """Median of some runs after one that does not count, to the end of the device's work."""
    clock = time.perf_counter if CUDA else time.process_time
    taken = []
    for _ in range(ROUNDS + 1):
        _finish()
        start = clock()
        run()
        _finish()
        taken.append(clock() - start)
    return statistics.median(taken[1:])


def _finish() -> None:
    if CUDA:
        torch.cuda.synchronize()


def peak_gib(run: Callable[[], object]) -> float | None:
    """Device memory that `run` holds at most above what was held before; None on a CPU."""
    if not CUDA:
        run()
        return None
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    _finish()
    return (torch.cuda.max_memory_allocated() - before) / GIB


def check_products(lines: Lines) -> None:
    """What the fused loss and vLLM's head rely on: bf16 in, fp32 out, and a sum into a buffer that is not copied."""
    if not CUDA:
        return lines.add("mixed products (CUDA only)", None)
    tokens, hidden, vocabulary = 1024, 4096, 151936
    a, w, d = normal(tokens, hidden, seed=0), normal(vocabulary, hidden, seed=1), normal(tokens, vocabulary, seed=2)
    out = torch.full((tokens, vocabulary), math.nan, device=DEVICE)
    torch.mm(a, w.t(), out_dtype=torch.float32, out=out)
    lines.add("logits in fp32 of bf16, relative error", relative(out[:8], a[:8].double() @ w.double().t()), "", 1e-3)
    total = torch.zeros(vocabulary, hidden, device=DEVICE)
    extra = peak_gib(lambda: torch.addmm(total, d.t(), a, out_dtype=torch.float32, out=total))
    lines.add("gradient added up in fp32, relative error", relative(total[:64], d[:, :64].double().t() @ a.double()), "", 1e-3)
    lines.add("gradient added up in fp32, memory", extra, "GiB", 0.1)


def check_loss(lines: Lines) -> None:
    """The fused loss against its definition, its three products, and the memory it may hold."""
    tokens, hidden, vocabulary = (16384, 4096, 151936) if CUDA else (256, 128, 2000)
    few = 1024 if CUDA else 64
    states, weight = normal(tokens, hidden, seed=3), normal(vocabulary, hidden, seed=4, scale=0.06)
    targets = torch.arange(tokens, device=DEVICE) * 7919 % vocabulary
    advantages, mask = normal(2, tokens, seed=5).float(), torch.ones(tokens, device=DEVICE)
    old = torch.full((tokens,), -math.log(vocabulary), device=DEVICE)
    norms = torch.full((2,), float(tokens), device=DEVICE, dtype=torch.float64)

    a, b = states[:few].clone().requires_grad_(), weight.clone().requires_grad_()
    fused_linear_hdpo_loss(a, b, targets[:few], old[:few], advantages[:, :few], mask[:few], norms=norms)[0].backward()
    ra, rb = states[:few].float().requires_grad_(), weight.float().requires_grad_()
    log_probs = torch.log_softmax(ra @ rb.t(), -1).gather(1, targets[:few, None])[:, 0]
    hdpo_loss(log_probs, old[:few], advantages[:, :few], mask[:few], norms=norms)[0].backward()
    assert a.grad is not None and b.grad is not None and ra.grad is not None and rb.grad is not None
    bound = 2e-2 if CUDA else 1e-4
    lines.add("fused loss, relative error of dH", relative(a.grad, ra.grad), "", bound)
    lines.add("fused loss, relative error of dW", relative(b.grad, rb.grad), "", bound)
    del a, b, ra, rb, log_probs

    hid, wei = states.requires_grad_(), weight.requires_grad_()
    chunk = min(2048, tokens)
    products = [wei.new_empty(chunk, vocabulary), torch.empty_like(wei), wei.new_empty(chunk, hidden)]

    def whole() -> None:
        hid.grad = wei.grad = None
        fused_linear_hdpo_loss(hid, wei, targets, old, advantages, mask, norms=norms)[0].backward()

    def floor() -> None:
        with torch.no_grad():
            for rows in states.detach().split(chunk):
                torch.mm(rows, weight.detach().t(), out=products[0][:len(rows)])
                torch.mm(products[0][:len(rows)].t(), rows, out=products[1])
                torch.mm(products[0][:len(rows)], weight.detach(), out=products[2][:len(rows)])

    lines.add("fused loss, memory above its inputs", peak_gib(whole), "GiB", 5.0 if CUDA else None)
    hid.grad = wei.grad = None
    lines.add("fused loss / its three products, time", seconds(whole) / seconds(floor), "x", 1.25 if CUDA else None)


def check_attention(lines: Lines) -> None:
    """Rows of a pack, some of which share their prompt, against the maths in fp32; and the price of a length never seen."""
    torch.backends.cuda.enable_cudnn_sdp(False)    # as a run has it
    heads, kv, dim = 4, 2, 64
    bound = 2e-2 if CUDA else 1e-4
    for name, spans in (("rows", [Span(300), Span(77), Span(1)]),
                        ("shared prompt", [Span(200), Span(40, 0), Span(1, 0), Span(99, 0)])):
        states = [normal(1, h, sum(s.length for s in spans), dim, seed=i).requires_grad_() for i, h in enumerate((heads, kv, kv))]
        found = _attend(states, spans, heads // kv)
        wanted = _by_definition(states, spans, heads // kv)
        grad = normal(*found.shape, seed=9)
        errors = [relative(found, wanted)] + [relative(x, y) for x, y in zip(
            torch.autograd.grad(found, states, grad), torch.autograd.grad(wanted, states, grad.to(wanted.dtype)), strict=True)]
        lines.add(f"attention of {name}, relative error", max(errors), "", bound)
    first: list[float] = []
    again: list[float] = []
    for length in range(501, 521):
        states = [normal(1, h, length, dim, seed=i) for i, h in enumerate((heads, kv, kv))]
        for times in (first, again):
            _finish()
            start = time.perf_counter()
            _attend(states, [Span(length)], heads // kv)
            _finish()
            times.append(time.perf_counter() - start)
    price = statistics.median(first) - statistics.median(again)
    lines.add("attention, price of a new length", 1e3 * price, "ms", 3.0 if CUDA else None)


def _attend(states: Sequence[Tensor], spans: Sequence[Span], groups: int) -> Tensor:
    from hdpo.adapters.packed_attention import PackLayout, attend

    module = SimpleNamespace(num_key_value_groups=groups, is_causal=True, training=True, config=SimpleNamespace())
    return attend(module, *states, None, layout=PackLayout(spans, DEVICE),   # type: ignore[arg-type, misc]
                  scaling=states[0].shape[-1] ** -0.5, dropout=0.0)[0]


def _by_definition(states: Sequence[Tensor], spans: Sequence[Span], groups: int) -> Tensor:
    query, key, value = (s.float() for s in states)
    key, value = (s.repeat_interleave(groups, 1) for s in (key, value))
    starts = [0]
    for span in spans:
        starts.append(starts[-1] + span.length)
    seen = torch.zeros(starts[-1], starts[-1], dtype=torch.bool, device=DEVICE)
    for span, start, end in zip(spans, starts, starts[1:]):
        seen[start:end, start:end] = torch.ones(end - start, end - start, dtype=torch.bool, device=DEVICE).tril()
        if span.prompt >= 0:
            seen[start:end, starts[span.prompt]:starts[span.prompt + 1]] = True
    scores = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).masked_fill(~seen, -math.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


def check_parking(lines: Lines) -> None:
    """What is parked leaves the device and comes back whole; what was scratch comes back as zeros, whatever was there."""
    from hdpo.adapters.zero3 import Parking

    size = 1 << (28 if CUDA else 18)
    kept, scratch = [torch.randn(size, device=DEVICE) for _ in range(3)], torch.ones(size, device=DEVICE)
    copies, parking = [tensor.cpu() for tensor in kept], Parking()
    held = torch.cuda.mem_get_info()[0] if CUDA else 0
    for _ in range(2):     # the second time the host's buffers are there
        start = time.perf_counter()
        parking.park(kept, [scratch])
        away = time.perf_counter() - start
        freed = torch.cuda.mem_get_info()[0] - held if CUDA else 16 * size
        if CUDA:
            torch.full((4 * size,), 3.0, device=DEVICE)
            torch.cuda.empty_cache()
        start = time.perf_counter()
        parking.unpark()
        back = time.perf_counter() - start
    lines.add("parking, share of memory that left", freed / (16 * size), "", 0.99, at_least=True)
    lines.add("parking, elements that came back changed", sum(float((k.cpu() != c).sum()) for k, c in zip(kept, copies)), "", 0)
    lines.add("parking, scratch not zero afterwards", float((scratch != 0).sum()), "", 0)
    lines.add("parking, to the host", 12 * size / GIB / away, "GiB/s", 10.0 if CUDA else None, at_least=True)
    lines.add("parking, to the device", 12 * size / GIB / back, "GiB/s", 10.0 if CUDA else None, at_least=True)


def main() -> None:
    lines = Lines()
    for name, step in (("mixed products", check_products), ("fused loss", check_loss), ("attention", check_attention),
                       ("parking", check_parking)):
        with lines.step(name):
            step(lines)
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
