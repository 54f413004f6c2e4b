"""The other surrogates, the pull towards a reference and the entropy bonus against their definitions; the layouts others hold."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from loss_cases import make_case, naive_log_probs, readable, relative, run

from hdpo.advantages import hdpo_advantages
from hdpo.fused_loss import fused_linear_hdpo_loss
from hdpo.losses import aggregation_token_weights, hdpo_loss

CLIP = {"clip_low": 0.2, "clip_high": 0.28}


def batch(seed=0, rows=6, tokens=9, channels=2):
    """log_probs and old [B, T], advantages [C, B], member [C, B], mask [B, T]; float64, off-policy."""
    g = torch.Generator().manual_seed(seed)
    log_probs = -torch.rand(rows, tokens, generator=g, dtype=torch.float64) * 3
    old = log_probs + 0.4 * torch.randn(rows, tokens, generator=g, dtype=torch.float64)
    mask = (torch.rand(rows, tokens, generator=g) < 0.7).double()
    mask[:, 0] = 1.0
    advantages = torch.randn(channels, rows, generator=g, dtype=torch.float64)
    member = torch.rand(channels, rows, generator=g) < 0.8
    return log_probs, old, advantages, member, mask


def value_and_gradient(loss_of, log_probs):
    x = log_probs.clone().requires_grad_()
    loss = loss_of(x)
    return loss.detach(), torch.autograd.grad(loss, x)[0]


@pytest.mark.parametrize("seed", range(5))
def test_gspo_with_rows_as_norms_is_the_papers_objective_in_every_channel(seed):
    log_probs, old, advantages, member, mask = batch(seed)
    counts = mask.sum(1)
    token_weight = mask * aggregation_token_weights(counts, "sequence_mean").double().unsqueeze(1)

    def defined(x):
        ratio = (((x - old) * mask).sum(1) / counts).exp()
        total = x.new_zeros(())
        for c, w in enumerate((1.0, 0.15)):
            surrogate = torch.minimum(ratio * advantages[c], ratio.clamp(0.8, 1.28) * advantages[c])
            total = total - w * (surrogate * member[c]).sum() / member[c].sum()
        return total

    def ours(x):
        return hdpo_loss(x, old, advantages, token_weight, member=member, norms=member.sum(1), surrogate="gspo", dual_clip=0,
                         **CLIP)[0]

    (a, da), (b, db) = value_and_gradient(defined, log_probs), value_and_gradient(ours, log_probs)
    assert relative(b, a) < 1e-6 and relative(db, da) < 1e-6      # the token weights are float32


@pytest.mark.parametrize("seed", range(5))
def test_cispo_weighs_the_log_prob_with_a_clipped_constant_in_every_channel(seed):
    log_probs, old, advantages, member, mask = batch(seed)

    def defined(x):
        constant = (x.detach() - old).exp().clamp(0.8, 1.28)
        return sum(-w * (constant * advantages[c].unsqueeze(1) * x * mask * member[c].unsqueeze(1)).sum()
                   / (mask * member[c].unsqueeze(1)).sum() for c, w in enumerate((1.0, 0.15)))

    (a, da), (b, db) = value_and_gradient(defined, log_probs), value_and_gradient(
        lambda x: hdpo_loss(x, old, advantages, mask, member=member, surrogate="cispo", **CLIP)[0], log_probs)
    assert relative(b, a) < 1e-12 and relative(db, da) < 1e-12


def test_the_pull_towards_a_reference_is_k3_over_the_accuracy_channels_norm_and_its_gradient_agrees_with_differences():
    log_probs, old, advantages, member, mask = batch(3)
    reference = log_probs + 0.3

    def ours(x, kl_coef):
        return hdpo_loss(x, old, advantages, mask, member=member, reference_log_probs=reference, kl_coef=kl_coef, **CLIP)[0]

    counted = mask * member[0].unsqueeze(1)
    k3 = (reference - log_probs).exp() - (reference - log_probs) - 1
    assert torch.allclose(ours(log_probs, 0.7) - ours(log_probs, 0.0), 0.7 * (k3 * counted).sum() / counted.sum(), atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: ours(x, 0.7), log_probs.clone().requires_grad_())
    with pytest.raises(ValueError, match="kl_coef needs reference_log_probs"):
        hdpo_loss(log_probs, old, advantages, mask, kl_coef=0.1)


@pytest.mark.parametrize("surrogate", ["ppo", "gspo", "cispo"])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_the_fused_loss_equals_the_readable_one_with_every_surrogate_and_a_reference(surrogate, chunk):
    case = make_case(5, tokens=61)
    row = torch.arange(61) // 9
    options = {"surrogate": surrogate, "reference_log_probs": case.old_log_probs + 0.2, "kl_coef": 0.3}

    def fused(case, hidden, weight):
        return fused_linear_hdpo_loss(
            hidden, weight, case.targets, case.old_log_probs, case.advantages[:, :7], case.mask, bias=case.bias, row=row,
            temperature=case.temperature, chunk_tokens=chunk, **{**case.kwargs(), "member": case.member[:, :7]}, **options)

    def plain(case, hidden, weight):
        log_probs = naive_log_probs(hidden, weight, case.targets, case.temperature, case.bias)
        return hdpo_loss(log_probs, case.old_log_probs, case.advantages[:, :7], case.mask, row=row,
                         **{**case.kwargs(), "member": case.member[:, :7]}, **options)

    for ours, theirs in zip(run(fused, case)[:3], run(plain, case)[:3]):
        assert relative(ours, theirs) < 1e-10


def test_the_entropy_bonus_has_the_entropys_value_and_gradient():
    case = make_case(2, tokens=23)

    def fused(case, hidden, weight, **options):
        return fused_linear_hdpo_loss(hidden, weight, case.targets, case.old_log_probs, case.advantages, case.mask,
                                      bias=case.bias, temperature=case.temperature, chunk_tokens=5, **case.kwargs(), **options)

    def with_bonus(case, hidden, weight):
        loss, stats = readable(case, hidden, weight)
        logits = (hidden @ weight.T + case.bias) / case.temperature
        p = torch.softmax(logits, -1)
        entropy = -torch.where(p > 0, p * torch.log_softmax(logits, -1).clamp(min=-1e30), 0.0).sum(-1)
        counted = case.mask * case.member[0]
        return loss - 0.4 * (entropy * counted).sum() / counted.sum(), stats

    finite = case.bias.clamp(min=-1e4)      # autograd of a naive softmax can't take -inf times 0
    ours = run(lambda c, h, w: fused(c, h, w, entropy_coef=0.4), case)
    from dataclasses import replace
    theirs = run(with_bonus, replace(case, bias=finite))
    for a, b in zip(ours[:3], theirs[:3]):
        assert relative(a, b) < 1e-9
    off = run(fused, case)
    assert all(torch.equal(a, b) for a, b in zip(off[:3], run(lambda c, h, w: fused(c, h, w, entropy_coef=0.0), case)[:3]))


def test_every_layout_that_other_trainers_hold_is_the_same_loss():
    log_probs, old, advantages, member, mask = batch(1)
    expected = hdpo_loss(log_probs, old, advantages, mask, member=member, norms=[11.0, 5.0])[0]
    rows, tokens = mask.shape
    per_token = advantages.unsqueeze(-1).expand(2, rows, tokens)
    row = torch.arange(rows).repeat_interleave(tokens)
    members = member.unsqueeze(-1).expand(2, rows, tokens)
    layouts = [
        hdpo_loss(log_probs, old, advantages.T, mask, member=member.T, norms=[11.0, 5.0], channels_last=True),
        hdpo_loss(log_probs, old, per_token.movedim(0, -1), mask, member=members.movedim(0, -1),
                  norms=[11.0, 5.0], channels_last=True),
        hdpo_loss(log_probs.reshape(1, -1), old.reshape(1, -1), per_token.reshape(2, -1), mask.reshape(1, -1),
                  member=members.reshape(2, -1), norms=torch.tensor([11.0, 5.0])),
        hdpo_loss(log_probs.flatten(), old.flatten(), advantages, mask.flatten(), member=member, norms=[11.0, 5.0], row=row),
    ]
    for loss, _ in layouts:
        torch.testing.assert_close(loss, expected)


def test_one_channel_needs_neither_its_axis_nor_a_weight_nor_a_list():
    log_probs, old, advantages, _, mask = batch(2, channels=1)
    expected = hdpo_loss(log_probs, old, advantages, mask, weights=(1.0,), norms=[7.0])[0]
    row_weights = torch.rand(len(mask), dtype=torch.float64)
    for given in (advantages, advantages[0], advantages[0].unsqueeze(1).expand_as(mask)):
        torch.testing.assert_close(hdpo_loss(log_probs, old, given, mask, norms=7.0)[0], expected)
    packed = [x.reshape(1, -1) for x in (log_probs, old, advantages[0].unsqueeze(1).expand_as(mask), mask)]
    torch.testing.assert_close(hdpo_loss(*packed, norms=7.0)[0], expected)
    weighted = hdpo_loss(log_probs, old, advantages, mask, rollout_weights=row_weights.unsqueeze(1).expand_as(mask))[0]
    for given in (row_weights, row_weights.unsqueeze(1)):
        torch.testing.assert_close(hdpo_loss(log_probs, old, advantages, mask, rollout_weights=given)[0], weighted)


def test_arrays_and_lists_are_refused_in_one_sentence_that_names_the_argument():
    log_probs, old, advantages, _, mask = batch()
    for function, message in (
            (lambda: hdpo_loss(log_probs, old, advantages.numpy(), mask), "advantages must be a torch.Tensor, not numpy.ndarray"),
            (lambda: hdpo_loss(log_probs, old, advantages, mask.tolist()), "mask must be a torch.Tensor, not builtins.list"),
            (lambda: hdpo_advantages(np.ones(2), torch.ones(2), torch.ones(2), torch.zeros(2).long()), "accuracy_reward must be"),
            (lambda: hdpo_advantages(torch.ones(2), torch.ones(2), torch.ones(2), np.array(["a", "b"])), "group must be")):
        with pytest.raises(TypeError, match=message):
            function()
    with pytest.raises(ValueError, match="one number per channel, 2, not 1"):
        hdpo_loss(log_probs, old, advantages, mask, norms=3.0)
    with pytest.raises(ValueError, match="surrogate must be"):
        hdpo_loss(log_probs, old, advantages, mask, surrogate="grpo")
    with pytest.raises(ValueError, match="needs row"):
        hdpo_loss(log_probs.flatten(), old.flatten(), advantages.repeat_interleave(9, 1), mask.flatten(), surrogate="gspo")


def test_the_effective_tool_norm_counts_the_rows_that_differ_and_changes_nothing_else():
    accuracy, correct = torch.ones(8), torch.ones(8, dtype=torch.bool)
    tool = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 0.5, 1.0, 1.0])
    group = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    usual = hdpo_advantages(accuracy, tool, correct, group)
    effective = hdpo_advantages(accuracy, tool, correct, group, tool_norm="effective")
    assert torch.equal(usual.values, effective.values) and torch.equal(usual.member[0], effective.member[0])
    assert usual.member[1].all() and effective.member[1].tolist() == [False] * 4 + [True] * 4
