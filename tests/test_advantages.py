"""Advantages: against a loop written from the definition, and the invariants that make unscored rows harmless."""
from __future__ import annotations

import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hdpo.advantages import hdpo_advantages


def loop(accuracy, tool, correct, group, scored, scale, eps, min_std, estimator, w_tool):
    """[2][B] values and membership, one group and one row at a time."""
    values, member = [[0.0] * len(group) for _ in range(2)], [[False] * len(group) for _ in range(2)]

    def fill(channel, reward, rows):
        if len(rows) < 2:
            return
        mean, std = statistics.fmean(reward[i] for i in rows), statistics.stdev(reward[i] for i in rows)
        for i in rows:
            member[channel][i] = True
            if std >= min_std:
                values[channel][i] = (reward[i] - mean) / ((std + eps) if scale == "std" else 1.0)

    for g in set(group):
        rows = [i for i in range(len(group)) if group[i] == g and scored[i]]
        if estimator == "coupled":
            fill(0, [a + w_tool * t for a, t in zip(accuracy, tool)], rows)
            continue
        fill(0, accuracy, rows)
        fill(1, tool, [i for i in rows if correct[i]] if estimator == "conditional" else rows)
    return values, member


@st.composite
def batches(draw):
    n = draw(st.integers(0, 40))
    calls = draw(st.lists(st.integers(0, 4), min_size=n, max_size=n))
    correct = draw(st.lists(st.booleans(), min_size=n, max_size=n))
    formatted = draw(st.lists(st.booleans(), min_size=n, max_size=n))
    group = draw(st.lists(st.sampled_from([-7, 0, 3, 10**12]), min_size=n, max_size=n))
    scored = draw(st.lists(st.booleans(), min_size=n, max_size=n))
    accuracy = [0.9 * c + 0.1 * f for c, f in zip(correct, formatted)]
    tool = [1 / (t + 1) if c else 0.0 for t, c in zip(calls, correct)]
    return accuracy, tool, correct, group, scored


def tensors(accuracy, tool, correct, group, scored):
    return (torch.tensor(accuracy, dtype=torch.float64), torch.tensor(tool, dtype=torch.float64),
            torch.tensor(correct, dtype=torch.bool), torch.tensor(group, dtype=torch.int64),
            torch.tensor(scored, dtype=torch.bool))


@settings(max_examples=150, deadline=None)
@given(batches(), st.sampled_from(["std", "none"]), st.sampled_from(["conditional", "unconditional", "coupled"]))
def test_equals_the_definition_written_as_a_loop(batch, scale, estimator):
    values, member = loop(*batch, scale, 1e-6, 1e-5, estimator, 0.15)
    *rewards, scored = tensors(*batch)
    got = hdpo_advantages(*rewards, scored=scored, scale=scale, tool_estimator=estimator)
    assert got.values.shape == got.member.shape == (2, len(batch[0]))
    torch.testing.assert_close(got.values, torch.tensor(values, dtype=torch.float64), atol=1e-12, rtol=1e-12)
    assert got.member.tolist() == member


@settings(max_examples=100, deadline=None)
@given(batches(), st.randoms(use_true_random=False))
def test_unscored_rows_leave_the_rest_as_if_never_sampled_in_any_row_order(batch, random):
    accuracy, tool, correct, group, scored = tensors(*batch)
    nan = torch.where(scored, 0.0, torch.nan)
    whole = hdpo_advantages(accuracy + nan, tool + nan, correct, group, scored=scored)
    kept = scored.nonzero().squeeze(1).tolist()
    random.shuffle(kept)
    rest = hdpo_advantages(accuracy[kept], tool[kept], correct[kept], group[kept])
    torch.testing.assert_close(whole.values[:, kept], rest.values, atol=1e-12, rtol=0)
    assert torch.equal(whole.member[:, kept], rest.member)
    assert (whole.values[:, ~scored] == 0).all() and not whole.member[:, ~scored].any()


@pytest.mark.parametrize("reward", [0.1, 0.2, 1 / 3, 0.9, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", ["std", "none"])
def test_equal_rewards_give_exactly_zero_but_stay_members(reward, dtype, scale):
    x = torch.full((16,), reward, dtype=dtype)
    got = hdpo_advantages(x, x, torch.ones(16, dtype=torch.bool), torch.zeros(16, dtype=torch.long), scale=scale)
    assert (got.values == 0).all() and got.member.all() and got.values.dtype == dtype


def test_a_lone_correct_rollout_has_no_tool_advantage():
    tool = torch.tensor([0.5, 0.0, 0.0, 0.0])
    got = hdpo_advantages(torch.tensor([1.0, 0.1, 0.0, 0.0]), tool, tool > 0, torch.zeros(4, dtype=torch.long))
    assert (got.values[1] == 0).all() and not got.member[1].any() and got.member[0].all()


def test_a_wrong_answer_without_a_tool_is_never_credited_for_frugality():
    tool, correct = torch.tensor([1.0, 0.5, 0.0, 0.0]), torch.tensor([True, True, False, False])
    accuracy, group = correct.float(), torch.zeros(4, dtype=torch.long)
    conditional = hdpo_advantages(accuracy, tool, correct, group).values[1]
    unconditional = hdpo_advantages(accuracy, tool, correct, group, tool_estimator="unconditional").values[1]
    assert conditional.tolist() == pytest.approx([0.7071, -0.7071, 0, 0], abs=1e-4)
    assert (unconditional[2:] < 0).all()


def test_channels_do_not_touch_each_other():
    torch.manual_seed(0)
    accuracy, correct, group = torch.rand(64), torch.rand(64) < 0.5, torch.arange(64) % 4
    one = hdpo_advantages(accuracy, torch.rand(64), correct, group).values[0]
    other = hdpo_advantages(accuracy, torch.rand(64), correct, group).values[0]
    assert torch.equal(one, other)


@pytest.mark.parametrize("change, message", [
    ({"group": torch.zeros(3, dtype=torch.long)}, "group must have the shape"), ({"group": torch.zeros(4)}, "integer"),
    ({"scored": torch.ones(5)}, "scored must have"), ({"scale": "mad"}, "scale must be"),
    ({"tool_estimator": "joint"}, "tool_estimator must be"),
    ({"accuracy_reward": torch.zeros(2, 2)}, "accuracy_reward must be"),
])
def test_bad_input_is_named(change, message):
    good = {"accuracy_reward": torch.zeros(4), "tool_reward": torch.zeros(4), "correct": torch.ones(4, dtype=torch.bool),
            "group": torch.zeros(4, dtype=torch.long)}
    with pytest.raises(ValueError, match=message):
        hdpo_advantages(**{**good, **change})
