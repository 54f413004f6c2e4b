"""The fused loss: three matrix products, one chunk of logits, no waiting for the device; exact counts, not timings."""
from __future__ import annotations

import pytest
import torch
from loss_cases import fused, make_case, on, relative, run, sampled_everywhere
from torch.utils._python_dispatch import TorchDispatchMode

from hdpo.fused_loss import default_chunk_tokens


class Products(TorchDispatchMode):
    """Records the work of every matrix product (FLOPs), the largest tensor made and every wait for a value."""

    def __init__(self):
        super().__init__()
        self.flops, self.largest, self.waits = 0, 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        if name in ("mm", "addmm", "addmm_"):
            a, b = args[-2:]
            self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        if name in ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "_unique2"):
            self.waits.append(name)
        if isinstance(out, torch.Tensor):
            self.largest = max(self.largest, out.numel())
        return out


def test_costs_exactly_three_products_and_never_holds_more_than_a_chunk_of_logits():
    case = sampled_everywhere(make_case(7, tokens=600, hidden=16, vocabulary=512))
    work = 2 * 600 * 16 * 512
    hidden, weight = case.leaves()
    with Products() as products:
        loss, _ = fused(case, hidden, weight, chunk_tokens=25)
        loss.backward()
    assert products.flops == 3 * work
    assert products.largest <= 25 * 512   # which is more than hidden and weight have
    for no_hidden, no_weight, expected in ((True, False, 2), (False, True, 2), (True, True, 1)):
        with Products() as products:
            loss, _ = fused(case, hidden.detach() if no_hidden else hidden, weight.detach() if no_weight else weight)
            if loss.requires_grad:
                loss.backward()
        assert products.flops == expected * work
    with Products() as products, torch.no_grad():
        assert not fused(case, hidden, weight)[0].requires_grad
    assert products.flops == work


def test_masked_tokens_cost_nothing_and_tokens_without_advantage_only_their_log_probs():
    case = sampled_everywhere(make_case(8, tokens=90, hidden=6, vocabulary=40))
    case.mask[:30] = 0
    case.advantages[:, 60:] = 0
    hidden, weight = case.leaves()
    with Products() as products:
        loss, stats = fused(case, hidden, weight, chunk_tokens=16)
        loss.backward()
    assert products.flops == 2 * 6 * 40 * (60 + 30 + 30)
    assert (stats["log_probs"][30:] < 0).all() and (stats["entropy"][30:] > 0).all()
    assert (stats["log_probs"][:30] == 0).all() and (hidden.grad[60:] == 0).all()


def test_a_caller_who_knows_the_tokens_makes_it_free_of_device_waits():
    case = make_case(9, tokens=80)
    keep = case.mask.nonzero().squeeze(1)
    expected = run(fused, case)
    hidden, weight = case.leaves()
    with Products() as products:
        loss, stats = fused(case, hidden, weight, keep=keep, norms=(case.member * case.mask).sum(1))
        loss.backward()
    assert products.waits == []
    assert relative(loss.detach(), expected[0]) < 1e-12 and relative(weight.grad, expected[2]) < 1e-12
    torch.testing.assert_close(stats["log_probs"], expected[3]["log_probs"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_never_waits_for_the_device(dtype):
    case = on("cuda", make_case(9, tokens=512, hidden=64, vocabulary=1000, dtype=dtype))
    norms, keep = torch.ones(2, device="cuda"), case.mask.nonzero().squeeze(1)
    hidden, weight = case.leaves()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for chosen in (None, keep):
            fused(case, hidden, weight, norms=norms, keep=chosen)[0].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_chunks_follow_the_vocabulary_within_bounds():
    assert default_chunk_tokens(1_000) == 512 and default_chunk_tokens(10**7) == 128
    assert default_chunk_tokens(1_000, on_cuda=True) == 2048
    assert default_chunk_tokens(151_936) * 151_936 * 4 <= 2**28 < (default_chunk_tokens(151_936) + 1) * 151_936 * 4
    assert default_chunk_tokens(151_936, on_cuda=True) > 1024
