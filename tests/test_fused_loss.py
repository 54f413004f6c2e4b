"""The fused loss: the same numbers as the readable one, whatever the shapes, chunks, types and splits."""
from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import (
    branches,
    fused,
    make_case,
    naive_log_probs,
    on,
    on_every_branch,
    readable,
    relative,
    run,
    sampled_everywhere,
)
from torch.utils.checkpoint import checkpoint

from hdpo.fused_loss import fused_linear_hdpo_loss, fused_linear_log_probs, fused_linear_nll_loss
from hdpo.losses import hdpo_loss, nll_loss

CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")])


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("chunk", [1, 7, 64, 1000, None, 0])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 5e-6)])
def test_equals_the_readable_loss_for_any_chunk_with_every_clip_branch_hit(dtype, tolerance, chunk, device):
    case = on(device, make_case(0, tokens=300, dtype=dtype))
    got, expected = run(fused, case, chunk_tokens=chunk), run(readable, case)
    assert (branches(naive_log_probs(case.hidden, case.weight, case.targets, case.temperature, case.bias), case) > 0).all()
    for a, b in zip(got[:3], expected[:3]):
        assert a.dtype == dtype and relative(a, b) < tolerance
    for name, value in expected[3].items():
        torch.testing.assert_close(got[3][name], value, rtol=tolerance * 10, atol=tolerance * 10, msg=name)


TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2e-2}   # bf16 rounds every logit and its gradient


@settings(max_examples=120, deadline=None)
@given(seed=st.integers(0, 10**6), tokens=st.integers(0, 40), hidden=st.integers(1, 9), vocabulary=st.integers(4, 60),
       channels=st.integers(1, 3), chunk=st.integers(1, 50), temperature=st.floats(0.3, 2.0), on_policy=st.booleans(),
       global_norms=st.booleans(), dual_clip=st.sampled_from([0, None, 1.2, 3.0]), dtype=st.sampled_from(list(TOLERANCE)))
def test_equals_the_readable_loss_on_random_shapes_and_types_with_every_clip_branch_hit(
        seed, tokens, hidden, vocabulary, channels, chunk, temperature, on_policy, global_norms, dual_clip, dtype):
    case = make_case(seed, tokens, hidden, vocabulary, channels, temperature=temperature, dtype=dtype)
    if tokens >= 8:
        case = on_every_branch(case, seed)
        log_probs = naive_log_probs(case.hidden, case.weight, case.targets, temperature, case.bias)
        assert (branches(log_probs, case, dual_clip=dual_clip or 3.0) > 0).all()
    if on_policy:
        case = replace(case, old_log_probs=None)
    options = {"weights": (1.0, 0.15, -0.4)[:channels], "dual_clip": dual_clip,
               "norms": torch.arange(1.0, 1 + channels) * 17 if global_norms else None}
    got, expected = run(fused, case, chunk_tokens=chunk, **options), run(readable, case, **options)
    terms = expected[3]["loss"].abs().sum()   # what the loss is a difference of
    assert (got[0] - expected[0]).abs() <= TOLERANCE[dtype] * (1 + terms)
    for a, b in zip(got[1:3], expected[1:3]):
        assert a.dtype == dtype and (a - b).double().norm() <= TOLERANCE[dtype] * b.double().norm() + 1e-7


def test_gradients_agree_with_finite_differences():
    case = make_case(1, tokens=14, hidden=5, vocabulary=11)
    _, d_hidden, d_weight, _ = run(fused, case, chunk_tokens=4)
    step = 1e-6
    for _ in range(20):
        h, w = torch.randn_like(case.hidden), torch.randn_like(case.weight)
        up, down = (fused(case, case.hidden + e * h, case.weight + e * w)[0] for e in (step, -step))
        assert float((up - down) / (2 * step)) == pytest.approx(float((d_hidden * h).sum() + (d_weight * w).sum()), rel=1e-6)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("scale", [1.0, 14.0], ids=["flat", "peaked"])
def test_bf16_gradients_are_as_good_as_the_naive_ones_with_a_float32_softmax(scale, device):
    exact = make_case(2, tokens=256, hidden=64, vocabulary=997, scale=scale / 8, dtype=torch.bfloat16, temperature=1.0)
    case = on(device, replace(exact, bias=torch.zeros_like(exact.bias)))
    truth = run(readable, replace(case, hidden=case.hidden.double(), weight=case.weight.double()))
    got, naive = run(fused, case, chunk_tokens=50), run(readable, case)

    def coarse(case, hidden, weight):   # all in bf16, as a warning
        log_probs = torch.log_softmax(hidden @ weight.T, -1).gather(1, case.targets.unsqueeze(1)).squeeze(1)
        return hdpo_loss(log_probs, case.old_log_probs, case.advantages, case.mask, **case.kwargs())

    worst = run(coarse, case)
    assert got[0].dtype == torch.float32 and got[1].dtype == got[2].dtype == torch.bfloat16
    for i in (1, 2):
        assert relative(got[i], truth[i]) <= 1.25 * relative(naive[i], truth[i])
        assert relative(got[i], truth[i]) < relative(worst[i], truth[i])


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_bf16_weight_gradients_do_not_lose_accuracy_with_the_number_of_chunks(device):
    case = on(device, make_case(2, 256, 64, 499, scale=1 / 8, dtype=torch.bfloat16, temperature=1.0))
    truth = run(readable, replace(case, hidden=case.hidden.double(), weight=case.weight.double()))[2]
    one, many = (relative(run(fused, case, chunk_tokens=chunk)[2], truth) for chunk in (256, 2))
    assert many <= 1.05 * one


def _rank(rank, world, cases, meeting, queue):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    for case in cases:
        part = case.part(slice(1, None, 3) if rank else torch.arange(len(case.mask)) % 3 != 1)   # unequal shares
        norms = (part.member * part.mask).sum(1)
        torch.distributed.all_reduce(norms)
        _, _, d_weight, stats = run(fused, part, norms=norms)
        for tensor in (d_weight, stats["loss"]):
            torch.distributed.all_reduce(tensor)
        if rank == 0:
            queue.put((d_weight.numpy(), stats["loss"].numpy()))
    torch.distributed.destroy_process_group()


def test_two_ranks_with_unequal_shares_give_the_gradient_of_one(tmp_path):
    tolerances = {torch.float64: 1e-12, torch.float32: 1e-5}
    cases = [make_case(19, tokens=100, dtype=dtype) for dtype in tolerances]
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    ranks = [context.Process(target=_rank, args=(rank, 2, cases, tmp_path / "rendezvous", queue)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0, 0]
    for case, tolerance in zip(cases, tolerances.values()):
        d_weight, losses = map(torch.from_numpy, queue.get())
        _, _, expected, stats = run(fused, case)
        assert relative(d_weight, expected) < tolerance and relative(losses, stats["loss"]) < tolerance


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_any_split_into_micro_batches_gives_the_same_gradient(dtype, tolerance):
    case = make_case(3, tokens=120, dtype=dtype)
    norms = (case.member * case.mask).sum(1)
    whole = run(fused, case, norms=norms, chunk_tokens=32)
    shuffled = torch.randperm(120, generator=torch.Generator().manual_seed(0))
    hidden, weight = case.leaves()
    for piece in [shuffled[:0], *shuffled.split(23)]:   # the first is an empty micro-batch
        loss, _ = fused(case.part(piece), hidden[piece], weight, norms=norms, chunk_tokens=8)
        loss.backward()
    assert relative(hidden.grad, whole[1]) < tolerance and relative(weight.grad, whole[2]) < tolerance


def test_channels_must_not_be_added_before_clipping_and_a_tool_weight_of_zero_is_grpo():
    case = sampled_everywhere(make_case(4, tokens=150))
    case = replace(case, advantages=make_case(4, tokens=150).advantages)
    norms = torch.tensor([60.0, 60.0])
    summed = replace(case, advantages=case.advantages[:1] + 0.15 * case.advantages[1:], member=case.member[:1])
    both, one = run(fused, case, norms=norms), run(fused, summed, norms=norms[:1], weights=(1.0,))
    assert relative(one[2], both[2]) > 1e-2
    on_policy = [run(fused, replace(c, old_log_probs=None), norms=norms[:n], weights=(1.0, 0.15)[:n])
                 for c, n in ((case, 2), (summed, 1))]
    assert relative(on_policy[1][2], on_policy[0][2]) < 1e-12
    zero = run(fused, case, weights=(1.0, 0.0))
    grpo = run(fused, replace(case, advantages=case.advantages[:1], member=case.member[:1]), weights=(1.0,))
    assert all(relative(a, b) < 1e-14 for a, b in zip(zero[:3], grpo[:3]))


def test_a_tied_weight_gets_the_sum_of_both_gradients():
    case = make_case(5, tokens=64)
    ids = torch.randint(0, len(case.weight), (64,), generator=torch.Generator().manual_seed(0))
    gradients = []
    for function in (fused, readable):
        weight = case.weight.clone().requires_grad_()
        hidden = torch.tanh(torch.nn.functional.embedding(ids, weight))
        gradients.append(torch.autograd.grad(function(case, hidden, weight)[0], weight)[0])
    assert relative(*gradients) < 1e-12


def test_works_behind_checkpointed_layers_and_scales_with_the_incoming_gradient():
    case = make_case(6, tokens=50)
    gradients = []
    for function in (fused, readable):
        x, weight = case.leaves()
        hidden = checkpoint(lambda y: torch.tanh(y) * 2, x, use_reentrant=False)
        gradients.append(torch.autograd.grad(function(case, hidden, weight)[0] * -3.0, (x, weight)))
    for a, b in zip(*gradients):
        assert relative(a, b) < 1e-12


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_masked_tokens_may_hold_nan_and_ignored_targets(device):
    case = on(device, make_case(10, tokens=70))
    out = case.mask == 0
    clean = run(fused, case)
    dirty = run(fused, replace(case, hidden=case.hidden.masked_fill(out.unsqueeze(1), torch.nan),
                               targets=case.targets.masked_fill(out, -100),
                               old_log_probs=case.old_log_probs.masked_fill(out, torch.nan),
                               rollout_weights=case.rollout_weights.masked_fill(out, torch.inf),
                               rollout_log_probs=case.rollout_log_probs.masked_fill(out, torch.nan),
                               advantages=case.advantages.masked_fill(out, torch.nan)))
    assert all(torch.equal(a, b) for a, b in zip(clean[:3], dirty[:3]))
    assert (dirty[1][out] == 0).all()


def test_one_scalar_per_row_expands_over_packed_tokens():
    case = make_case(11, tokens=60)
    row = torch.arange(60) // 13
    advantages, member = torch.randn(2, 5, dtype=torch.float64), torch.tensor([[True] * 5, [True, False, True, True, False]])
    hidden, weight = case.leaves()
    tokens = (hidden, weight, case.targets, case.old_log_probs)
    short = fused_linear_hdpo_loss(*tokens, advantages, case.mask, member=member, row=row)
    long = fused_linear_hdpo_loss(*tokens, advantages[:, row], case.mask, member=member[:, row])
    assert torch.equal(short[0], long[0])


@pytest.mark.parametrize("tokens, masked", [(0, False), (9, True)])
def test_an_empty_micro_batch_is_zero_and_attached(tokens, masked):
    case = make_case(12, tokens=tokens)
    if masked:
        case = replace(case, mask=torch.zeros_like(case.mask))
    loss, d_hidden, d_weight, stats = run(fused, case, norms=torch.tensor([3.0, 0.0]))
    assert loss.item() == 0.0 and (d_weight == 0).all() and (d_hidden == 0).all()
    assert all(torch.isfinite(value).all() for value in stats.values())


def test_a_second_backward_is_refused_instead_of_doubling():
    case = make_case(13)
    loss, _ = fused(case, *case.leaves())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        loss.backward()


def test_autocast_changes_nothing():
    case = make_case(14, dtype=torch.float32)
    plain = run(fused, case)
    with torch.autocast("cpu", torch.bfloat16):
        cast = run(fused, case)
    assert all(torch.equal(a, b) for a, b in zip(plain[:3], cast[:3]))


def test_a_float32_weight_may_meet_bf16_hidden_states():
    case = make_case(15)
    hidden, weight = case.hidden.bfloat16().requires_grad_(), case.weight.float().requires_grad_()
    fused(case, hidden, weight)[0].backward()
    assert hidden.grad.dtype == torch.bfloat16 and weight.grad.dtype == torch.float32


@pytest.mark.parametrize("scale", [1.0, 300.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_log_probs_and_entropy_are_exact_with_banned_ids_and_extreme_logits(dtype, scale):
    case = make_case(16, tokens=40, scale=scale, dtype=dtype)
    logits = ((case.hidden @ case.weight.T).double() + case.bias) / case.temperature
    full = torch.log_softmax(logits, -1)
    entropy = -(full.exp() * full.clamp(min=-1e9)).sum(-1)
    log_probs, got = fused_linear_log_probs(case.hidden, case.weight, case.targets, temperature=case.temperature,
                                            bias=case.bias, chunk_tokens=7)
    tolerance = 1e-12 if dtype == torch.float64 else 5e-6   # of the logits' magnitude
    torch.testing.assert_close(log_probs.double(), full.gather(1, case.targets.unsqueeze(1)).squeeze(1), rtol=tolerance,
                               atol=tolerance * scale)
    torch.testing.assert_close(got.double(), entropy, rtol=tolerance * 10, atol=tolerance * scale)
    same, none = fused_linear_log_probs(case.hidden, case.weight, case.targets, temperature=case.temperature, bias=case.bias,
                                        entropy=False)
    torch.testing.assert_close(same, log_probs)
    assert (none == 0).all() and not log_probs.requires_grad


def test_statistics_hold_log_probs_and_entropy_without_a_graph():
    case = make_case(17)
    loss, stats = fused(case, *case.leaves())
    log_probs, entropy = fused_linear_log_probs(case.hidden, case.weight, case.targets, temperature=case.temperature,
                                                bias=case.bias)
    sampled = case.mask != 0
    torch.testing.assert_close(stats["log_probs"][sampled], log_probs[sampled])
    torch.testing.assert_close(stats["entropy"][sampled], entropy[sampled])
    assert loss.requires_grad and not any(value.requires_grad for value in stats.values())


@pytest.mark.parametrize("chunk", [1, 13, None])
@pytest.mark.parametrize("norm", [None, 40.0, torch.tensor(40.0), 0.0])
def test_the_sft_loss_equals_nll_of_the_log_softmax(norm, chunk):
    case = make_case(18)

    def plain(case, hidden, weight):
        log_probs = naive_log_probs(hidden, weight, case.targets, case.temperature, case.bias)
        return nll_loss(log_probs, case.mask, norm), {}

    def chunked(case, hidden, weight):
        return fused_linear_nll_loss(hidden, weight, case.targets, case.mask, norm=norm, temperature=case.temperature,
                                     bias=case.bias, chunk_tokens=chunk)

    for a, b in zip(run(chunked, case)[:3], run(plain, case)[:3]):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("change, message", [
    ({"hidden": torch.zeros(4, 3)}, "hidden must be"), ({"targets": torch.zeros(3, dtype=torch.long)}, "targets must be"),
    ({"mask": torch.zeros(3)}, "mask must be"), ({"bias": torch.zeros(3)}, "bias must be"),
    ({"chunk_tokens": -1}, "chunk_tokens"), ({"advantages": torch.zeros(2, 2)}, "advantages"),
])
def test_shapes_that_do_not_fit_are_named(change, message):
    good = {"hidden": torch.zeros(4, 2), "weight": torch.zeros(5, 2), "targets": torch.zeros(4, dtype=torch.long),
            "old_log_probs": torch.zeros(4), "advantages": torch.ones(2, 4), "mask": torch.ones(4)}
    with pytest.raises(ValueError, match=message):
        fused_linear_hdpo_loss(**{**good, **change})
