"""The readable loss: against the definition, its invariances, and what must not leak in."""
from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import CAP, CLIPS, branches, defined_loss, make_case, naive_log_probs, relative

from hdpo.losses import aggregation_norms, aggregation_token_weights, hdpo_loss, nll_loss, rows_within


def log_probs_of(case):
    return naive_log_probs(case.hidden, case.weight, case.targets, case.temperature, case.bias).requires_grad_()


def loss_and_gradient(log_probs, *args, **kwargs):
    loss, stats = hdpo_loss(log_probs, *args, **kwargs)
    return loss.detach(), torch.autograd.grad(loss, log_probs)[0], stats


@pytest.mark.parametrize("seed", range(4))
def test_equals_the_definition_in_value_and_gradient_on_every_piece_of_the_surrogate(seed):
    case = make_case(seed, tokens=300)
    log_probs = log_probs_of(case)
    assert (branches(log_probs, case) > 0).all(), "a piece of the surrogate is not exercised"
    assert ((case.advantages[0] * case.advantages[1] < 0) & case.member.all(0)).any()
    loss, gradient, _ = loss_and_gradient(log_probs, case.old_log_probs, case.advantages, case.mask, **case.kwargs())
    expected = defined_loss(log_probs, case)
    assert relative(loss, expected) < 1e-12
    assert relative(gradient, torch.autograd.grad(expected, log_probs)[0]) < 1e-12


def test_gradient_agrees_with_finite_differences():
    case = make_case(3, tokens=40)
    start = log_probs_of(case).detach().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: hdpo_loss(x, case.old_log_probs, case.advantages, case.mask, **case.kwargs())[0], start)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(0, 4), min_size=60, max_size=60))
def test_any_split_with_global_norms_adds_up_to_the_whole(seed, owner):
    case = make_case(seed % 50, tokens=60)
    whole = log_probs_of(case).detach().requires_grad_()
    norms = (case.member * case.mask).sum(1)
    total, gradient, stats = loss_and_gradient(whole, case.old_log_probs, case.advantages, case.mask, norms=norms,
                                               **case.kwargs())
    pieces = torch.zeros_like(whole)
    losses, per_channel = [], []
    for part in range(5):   # some of them empty
        index = torch.tensor([i for i in range(60) if owner[i] == part], dtype=torch.long)
        piece = case.part(index)
        x = whole.detach()[index].requires_grad_()
        loss, pieces[index], part_stats = loss_and_gradient(x, piece.old_log_probs, piece.advantages, piece.mask,
                                                            norms=norms, **piece.kwargs())
        losses.append(loss)
        per_channel.append(part_stats["loss"])
    torch.testing.assert_close(sum(losses), total, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(sum(per_channel), stats["loss"], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(pieces, gradient, rtol=1e-12, atol=1e-14)


def test_rows_of_scalars_tokens_of_advantages_and_flat_tokens_are_the_same():
    torch.manual_seed(0)
    log_probs, old, mask = -torch.rand(5, 7), -torch.rand(5, 7), (torch.rand(5, 7) < 0.6).float()
    advantages, member = torch.randn(2, 5), torch.rand(2, 5) < 0.7
    wide, wide_member = (x.unsqueeze(-1).expand(2, 5, 7) for x in (advantages, member))
    rows = hdpo_loss(log_probs, old, advantages, mask, member=member)[0]
    tokens = hdpo_loss(log_probs, old, wide, mask, member=wide_member)[0]
    flat = hdpo_loss(log_probs.flatten(), old.flatten(), wide.flatten(1), mask.flatten(), member=wide_member.flatten(1))[0]
    torch.testing.assert_close(tokens, rows)
    torch.testing.assert_close(flat, rows)


def test_channels_must_not_be_added_before_clipping_unless_on_policy():
    case = make_case(1, tokens=200)
    log_probs, everyone = log_probs_of(case), torch.ones_like(case.member)
    norms, w = torch.tensor([50.0, 50.0]), 0.15
    summed = case.advantages[:1] + w * case.advantages[1:]

    def gradients(old):
        both = hdpo_loss(log_probs, old, case.advantages, case.mask, member=everyone, norms=norms, **CLIPS)[0]
        one = hdpo_loss(log_probs, old, summed, case.mask, weights=(1.0,), norms=norms[:1], **CLIPS)[0]
        return [torch.autograd.grad(x, log_probs)[0] for x in (both, one)]

    assert relative(*gradients(case.old_log_probs)) > 1e-2
    assert relative(*gradients(log_probs.detach())) < 1e-12
    assert relative(*gradients(None)) < 1e-12


def test_truncated_importance_of_engine_and_trainer_is_a_constant_weight_that_leaves_the_norms_alone():
    case = make_case(6, tokens=200)
    weight = (case.old_log_probs - case.rollout_log_probs).exp()
    assert ((weight > CAP) & (case.mask != 0)).any() and ((weight < 1) & (case.mask != 0)).any()
    plain = {"member": case.member, **CLIPS}
    for old in (case.old_log_probs, None):   # None: on-policy, the log-probs are the old ones, and are not differentiated as such
        log_probs = log_probs_of(case)
        seen = log_probs.detach() if old is None else old
        got = loss_and_gradient(log_probs, old, case.advantages, case.mask, rollout_log_probs=case.rollout_log_probs,
                                importance_cap=CAP, **plain)
        by_hand = loss_and_gradient(log_probs, seen, case.advantages, case.mask,
                                    rollout_weights=(seen - case.rollout_log_probs).exp().clamp(max=CAP), **plain)
        for a, b in zip(got[:2], by_hand[:2]):
            assert relative(a, b) < 1e-14
        torch.testing.assert_close(got[2]["norm"], (case.member * case.mask).sum(1))


def test_a_log_prob_the_engine_could_not_state_weighs_one_and_an_infinite_one_is_bounded():
    old, rollout = torch.full((3,), -1.0), torch.tensor([torch.nan, -torch.inf, torch.inf])
    loss, gradient, _ = loss_and_gradient(torch.full((3,), -1.0, requires_grad=True), old, -torch.ones(1, 3), torch.ones(3),
                                          weights=(1.0,), norms=[1.0], rollout_log_probs=rollout, importance_cap=2.0)
    torch.testing.assert_close(gradient, torch.tensor([1.0, 2.0, 0.0]), atol=1e-8, rtol=1e-6)


def test_rows_are_within_by_the_geometric_mean_of_their_sampled_tokens_whatever_their_length():
    row = torch.tensor([0] * 3 + [1] * 300 + [2] * 2 + [3] * 2)   # row 4 has no token
    d = torch.cat([torch.tensor([0.5, -0.5, 0.003]), torch.full((300,), 0.009), torch.tensor([0.03, 0.0]),
                   torch.tensor([-0.02, 9.0])])
    mask = torch.ones(len(row))
    mask[-1] = 0                                                    # the token that would save row 3 is not sampled
    old = -torch.rand(len(row))
    kept = rows_within(old, old - d, mask, row, 5, 0.99, 1.01)
    assert kept.tolist() == [True, True, False, False, True]        # row 1: its product, 14.9, says nothing
    order = torch.randperm(len(row), generator=torch.Generator().manual_seed(0))
    assert torch.equal(rows_within(old[order], (old - d)[order], mask[order], row[order], 5, 0.99, 1.01), kept)


def test_a_dropped_row_leaves_the_loss_and_stays_in_the_norms():
    case = make_case(7, tokens=40)
    row, log_probs = torch.arange(40) // 10, log_probs_of(case)
    kept = torch.tensor([True, False, True, True])
    loss, gradient, stats = loss_and_gradient(log_probs, case.old_log_probs, case.advantages, case.mask, member=case.member,
                                              rollout_weights=kept[row].double())
    norms = (case.member * case.mask).sum(1)
    rest = case.part(row != 1)
    expected, _ = hdpo_loss(log_probs.detach()[row != 1], rest.old_log_probs, rest.advantages, rest.mask, member=rest.member,
                            norms=norms)
    assert (gradient[row == 1] == 0).all() and (gradient[row != 1] != 0).any()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(stats["norm"], norms)


def test_a_tool_weight_of_zero_is_grpo():
    case = make_case(2, tokens=150)
    log_probs, options = log_probs_of(case), {"rollout_weights": case.rollout_weights, **CLIPS}
    hdpo = loss_and_gradient(log_probs, case.old_log_probs, case.advantages, case.mask, member=case.member,
                             weights=(1.0, 0.0), **options)
    grpo = loss_and_gradient(log_probs, case.old_log_probs, case.advantages[:1], case.mask, member=case.member[:1],
                             weights=(1.0,), **options)
    assert torch.equal(hdpo[0], grpo[0]) and torch.equal(hdpo[1], grpo[1])


@pytest.mark.parametrize("off", [0, 0.0, None])
def test_the_dual_clip_can_be_turned_off(off):
    log_probs, old = torch.zeros(1, requires_grad=True), torch.tensor([-3.0])
    loss, gradient, stats = loss_and_gradient(log_probs, old, -torch.ones(1, 1), torch.ones(1), weights=(1.0,),
                                              dual_clip=off)
    assert loss.item() == pytest.approx(torch.e ** 3, rel=1e-5) and gradient.item() == pytest.approx(torch.e ** 3, rel=1e-5)
    assert stats["dual_clip_fraction"].tolist() == [0.0]


def test_masked_tokens_may_hold_anything():
    case = make_case(4, tokens=80)
    out = case.mask == 0
    log_probs = log_probs_of(case).detach()
    clean = loss_and_gradient(log_probs.clone().requires_grad_(), case.old_log_probs, case.advantages, case.mask,
                              **case.kwargs())
    for rubbish in (torch.nan, torch.inf, -torch.inf):
        spoiled = case.advantages.masked_fill(out, rubbish)
        dirty = loss_and_gradient(
            log_probs.masked_fill(out, rubbish).requires_grad_(), case.old_log_probs.masked_fill(out, rubbish), spoiled,
            case.mask, member=case.member, rollout_weights=case.rollout_weights.masked_fill(out, rubbish),
            rollout_log_probs=case.rollout_log_probs.masked_fill(out, rubbish), importance_cap=CAP, **CLIPS)
        assert torch.equal(clean[0], dirty[0]) and torch.equal(clean[1], dirty[1])
        for name in clean[2]:
            assert torch.equal(clean[2][name], dirty[2][name]), name


@pytest.mark.parametrize("tokens, norms", [(0, None), (0, torch.ones(2)), (6, None), (6, torch.zeros(2))])
def test_nothing_to_learn_gives_exactly_zero_attached_to_the_graph(tokens, norms):
    log_probs = torch.randn(tokens, requires_grad=True)
    loss, gradient, stats = loss_and_gradient(log_probs, torch.zeros(tokens), torch.ones(2, tokens), torch.zeros(tokens),
                                              norms=norms)
    assert loss.item() == 0.0 and (gradient == 0).all()
    assert all(torch.isfinite(value).all() for value in stats.values())


def test_a_channel_without_members_contributes_nothing():
    case = make_case(5)
    log_probs = log_probs_of(case)
    member = torch.stack([case.member[0], torch.zeros_like(case.member[0])])
    both = loss_and_gradient(log_probs, case.old_log_probs, case.advantages, case.mask, member=member)
    one = loss_and_gradient(log_probs, case.old_log_probs, case.advantages[:1], case.mask, member=member[:1], weights=(1.0,))
    assert torch.equal(both[0], one[0]) and torch.equal(both[1], one[1])


def test_statistics_count_what_they_say():
    ratio = torch.tensor([1.5, 0.5, 4.0, 1.0, 9.0])
    log_probs, mask = ratio.log().requires_grad_(), torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0])
    advantages = torch.tensor([[1.0, -1.0, -1.0, 1.0, 1.0], [-1.0, 1.0, 0.0, 1.0, 1.0]])
    member = torch.tensor([[True] * 5, [True, False, False, True, True]])
    loss, stats = hdpo_loss(log_probs, torch.zeros(5), advantages, mask, member=member, norms=torch.tensor([8.0, 4.0]))
    assert stats["clip_fraction"].tolist() == [0.5, 0.0] and stats["dual_clip_fraction"].tolist() == [0.25, 0.0]
    assert stats["tokens"].tolist() == [4, 2] and stats["norm"].tolist() == [4.0, 2.0] and stats["num_tokens"] == 4
    torch.testing.assert_close(stats["loss"], torch.tensor([(-1.2 + 0.8 + 3.0 - 1.0) / 8, (1.5 - 1.0) / 4]))
    torch.testing.assert_close(loss.detach(), stats["loss"][0] + 0.15 * stats["loss"][1])
    torch.testing.assert_close(stats["ratio_mean"], torch.tensor(7.0 / 4))
    torch.testing.assert_close(stats["ratio_max"], torch.tensor(4.0))
    torch.testing.assert_close(stats["kl_k1"], -ratio[:4].log().mean())
    torch.testing.assert_close(stats["kl_k3"], (ratio[:4] - 1 - ratio[:4].log()).mean())
    assert not any(value.requires_grad for value in stats.values())


def test_a_huge_ratio_stays_finite():
    log_probs = torch.tensor([0.0, 0.0], requires_grad=True)
    loss, gradient, _ = loss_and_gradient(log_probs, torch.tensor([-300.0, 300.0]), torch.tensor([[-1.0, 1.0]]),
                                          torch.ones(2), weights=(1.0,), dual_clip=0)
    assert torch.isfinite(loss) and torch.isfinite(gradient).all()


@pytest.mark.parametrize("how", ["token_mean", "sequence_mean", "dr_grpo"])
def test_aggregations_are_token_weights_and_norms(how):
    torch.manual_seed(1)
    lengths, member = torch.tensor([3, 0, 5, 1]), torch.tensor([[True] * 4, [True, True, False, True]])
    mask = (torch.arange(5) < lengths.unsqueeze(1)).float()
    log_probs, old, advantages = -torch.rand(4, 5), -torch.rand(4, 5), torch.randn(2, 4)
    loss, stats = hdpo_loss(log_probs, old, advantages, mask * aggregation_token_weights(lengths, how).unsqueeze(1),
                            member=member, norms=aggregation_norms(lengths, member, how, budget=9), dual_clip=0)
    ratio = (log_probs - old).exp()
    a = advantages.unsqueeze(-1)
    terms = torch.maximum(-a * ratio, -a * ratio.clamp(0.8, 1.2)) * mask * member.unsqueeze(-1)
    rows = (member & (lengths > 0)).sum(1)
    expected = {"token_mean": terms.sum((1, 2)) / (member * lengths).sum(1),
                "sequence_mean": (terms.sum(2) / lengths.clamp(min=1)).sum(1) / rows,
                "dr_grpo": terms.sum((1, 2)) / (9 * rows)}[how]
    torch.testing.assert_close(stats["loss"], expected)
    torch.testing.assert_close(loss, expected[0] + 0.15 * expected[1])


def test_unknown_aggregations_are_named():
    lengths, member = torch.ones(2), torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="token_mean"):
        aggregation_norms(lengths, member, "mean")
    with pytest.raises(ValueError, match="budget"):
        aggregation_norms(lengths, member, "dr_grpo")
    with pytest.raises(ValueError, match="token_mean"):
        aggregation_token_weights(lengths, "mean")


def test_nll_is_the_mean_over_trained_tokens_and_splits():
    log_probs = torch.tensor([-1.0, torch.nan, -3.0], requires_grad=True)
    mask = torch.tensor([1, 0, 1])
    loss = nll_loss(log_probs, mask)
    assert loss.item() == 2.0 and torch.autograd.grad(loss, log_probs)[0].tolist() == [-0.5, 0.0, -0.5]
    assert (nll_loss(log_probs[:1], mask[:1], 2.0) + nll_loss(log_probs[1:], mask[1:], 2.0)).item() == 2.0
    empty = nll_loss(log_probs, torch.zeros(3))
    assert empty.item() == 0.0 and torch.autograd.grad(empty, log_probs)[0].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("change, message", [
    ({"mask": torch.ones(3)}, "mask must have"), ({"old_log_probs": torch.ones(3)}, "old_log_probs must have"),
    ({"advantages": torch.ones(2, 3)}, "advantages .* fits neither"), ({"weights": (1.0,)}, "one leading entry per weight"),
    ({"member": torch.ones(2, 9)}, "member .* fits neither"), ({"norms": [1.0]}, "one number per channel"),
    ({"member": torch.ones(1, 4)}, "member must have the channels"), ({"rollout_weights": torch.ones(1)}, "rollout_weights"),
    ({"rollout_log_probs": torch.ones(1)}, "rollout_log_probs must have"),
])
def test_shapes_that_do_not_fit_are_named(change, message):
    good = {"log_probs": torch.zeros(4), "old_log_probs": torch.zeros(4), "advantages": torch.ones(2, 4),
            "mask": torch.ones(4)}
    with pytest.raises(ValueError, match=message):
        hdpo_loss(**{**good, **change})
