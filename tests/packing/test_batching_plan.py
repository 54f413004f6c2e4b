"""Plans: every row once, no budget exceeded, ranks in step, little moved."""
from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import chain

from hypothesis import given
from hypothesis import strategies as st

from hdpo.packing.costs import Budget, PromptCost, RowCost, WorkModel, load, work_model
from hdpo.packing.planning import plan


def cost(tokens: int, patches: int, nbytes: int, owner: int) -> RowCost:
    return RowCost(tokens, patches, WorkModel()(tokens, patches), nbytes, owner)


ROWS = st.lists(st.builds(cost, st.integers(1, 100), st.integers(0, 50), st.integers(0, 999), st.integers(0, 2)), max_size=60)


def works(rows: list[RowCost], plan_: list[list[list[int]]]) -> list[list[int]]:
    return [[sum(rows[i].work for i in bin_) for bin_ in bins] for bins in plan_]


def agent_rows(ranks: int, prompts: int = 64, seed: int = 0, share: bool = False) -> list[RowCost]:
    """Groups of 16 of a multimodal agent: a shared prompt with an image, heavy-tailed responses, groups dealt at random."""
    coin = random.Random(seed)
    rows = []
    for number in range(prompts):
        owner, prompt = coin.randrange(ranks), int(coin.lognormvariate(8, 0.5))
        shared = PromptCost(number, prompt, 2 * prompt, WorkModel()(prompt, 2 * prompt)) if share else None
        for _ in range(16):
            tokens = min(24_000, prompt + int(coin.lognormvariate(7.2, 0.8)))
            rows.append(cost(tokens, 2 * prompt, 12_288 * prompt + 13 * tokens, owner)._replace(prompt=shared))
    return rows


@st.composite
def groups(draw: st.DrawFn) -> list[RowCost]:
    """Groups with a shared prompt, each on a rank, some of a single row, and rows that share nothing."""
    rows = list(draw(ROWS))[:20]
    prompts = st.tuples(st.integers(1, 60), st.integers(0, 30))
    responses = st.lists(st.integers(1, 50), min_size=1, max_size=12)
    some = draw(st.lists(st.tuples(prompts, responses, st.integers(0, 2)), max_size=8))
    for number, (prompt, lengths, owner) in enumerate(some):
        shared = PromptCost(number, *prompt, WorkModel()(*prompt)) if len(lengths) > 1 else None
        rows += [cost(prompt[0] + more, prompt[1] + more // 10, 100, owner)._replace(prompt=shared) for more in lengths]
    return rows


def planned_once(rows: list[RowCost], ranks: int, budget: Budget) -> tuple[list[RowCost], list[Sequence[int]]]:
    """The rows with owners among `ranks`, and all micro-batches, which hold each row once and are equally many on every rank."""
    rows = [row._replace(owner=row.owner % ranks) for row in rows]
    made = plan(rows, ranks, budget)
    assert sorted(i for bins in made for i in chain(*bins)) == list(range(len(rows)))
    assert len({len(bins) for bins in made}) == 1 and made[0]
    return rows, list(chain(*made))


@given(ROWS, st.integers(1, 3), st.integers(120, 400), st.integers(50, 200), st.sampled_from([0, 20]))
def test_every_row_is_planned_once_and_no_micro_batch_exceeds_its_budget(
        rows: list[RowCost], ranks: int, tokens: int, patches: int, filler: int) -> None:
    rows, bins = planned_once(rows, ranks, Budget(tokens, patches, filler))
    for bin_ in bins:
        seen = sum(rows[i].patches for i in bin_)
        assert sum(rows[i].tokens for i in bin_) + (0 if seen else filler) <= tokens and seen <= patches


@given(groups(), st.integers(1, 3), st.integers(120, 400), st.integers(50, 200), st.sampled_from([0, 20]))
def test_with_shared_prompts_every_row_is_planned_once_within_budgets_that_count_a_prompt_once(
        rows: list[RowCost], ranks: int, tokens: int, patches: int, filler: int) -> None:
    rows, bins = planned_once(rows, ranks, Budget(tokens, patches, filler))
    for bin_ in bins:
        prompts = {row.prompt for i in bin_ if (row := rows[i]).prompt is not None}
        again = [row.prompt for i in bin_ if (row := rows[i]).prompt is not None]
        sums = [sum(getattr(rows[i], what) for i in bin_) - sum(getattr(p, what) for p in again)
                + sum(getattr(p, what) for p in prompts) for what in ("tokens", "patches", "work")]
        counted = load(rows, bin_)
        assert [counted.tokens, counted.patches, counted.work] == sums
        assert sums[0] + (0 if sums[1] else filler) <= tokens and sums[1] <= patches


@given(ROWS, st.integers(10, 100))
def test_a_row_beyond_the_budget_gets_a_micro_batch_of_its_own(rows: list[RowCost], tokens: int) -> None:
    for bin_ in chain(*plan(rows, 3, Budget(tokens, 50))):
        assert len(bin_) <= 1 or sum(rows[i].tokens for i in bin_) <= tokens


def test_eight_ranks_have_equal_work_at_every_micro_step_and_few_bytes_move() -> None:
    for seed in range(3):
        rows = agent_rows(8, seed=seed)
        made = plan(rows, 8, Budget(40_960, 163_840, 70))
        loads = works(rows, made)
        totals = [sum(load) for load in loads]
        assert max(totals) / (sum(totals) / 8) <= 1.02
        assert sum(totals) / 8 / sum(map(max, zip(*loads))) >= 0.98
        moved = sum(rows[i].nbytes for rank, bins in enumerate(made) for i in chain(*bins) if rows[i].owner != rank)
        surplus = sum(max(0, sum(row.work for row in rows if row.owner == rank) - sum(totals) / 8) for rank in range(8))
        assert moved / sum(row.nbytes for row in rows) <= 1.1 * surplus / sum(totals)


def test_groups_that_share_their_prompt_stay_together_in_balanced_micro_batches() -> None:
    for seed in range(3):
        rows = agent_rows(8, seed=seed, share=True)
        made = plan(rows, 8, Budget(40_960, 163_840, 70))
        apart = works(rows, plan([row._replace(prompt=None) for row in rows], 8, Budget(40_960, 163_840, 70)))
        loads = [[load(rows, bin_).work for bin_ in bins] for bins in made]
        ideal = sum(map(sum, loads)) / 8
        assert max(map(sum, loads)) / ideal <= 1.06 and ideal / sum(map(max, zip(*loads))) >= 0.94
        encoded = sum(len(load(rows, bin_).prompts) for bin_ in chain(*made))
        assert encoded <= 64 + 8 * len(made[0]) + 8       # a micro-batch, and a rank, each cut one group
        assert sum(map(max, zip(*loads))) <= sum(map(max, zip(*apart))) / 1.6


def test_rows_stay_where_they_are_when_ranks_have_equal_work() -> None:
    rows = [cost(100 + i, 8, 1000, rank) for i in range(20) for rank in range(4)]
    assert all(rows[i].owner == rank for rank, bins in enumerate(plan(rows, 4, Budget(500, 1000))) for i in chain(*bins))


def test_what_is_dear_to_move_stays() -> None:
    rows = [cost(100, 0, 10 if i % 2 else 9999, 0) for i in range(8)]
    bins = plan(rows, 2, Budget(1000, 1000))[1]
    assert all(i % 2 for i in chain(*bins)) and len(list(chain(*bins))) == 4


def test_a_step_without_rows_is_one_empty_micro_batch_on_every_rank() -> None:
    assert plan([], 3, Budget(10, 10)) == [[[]], [[]], [[]]]


def test_the_work_of_a_row_follows_from_the_models_sizes() -> None:
    """Of Qwen3-VL-8B: attention is half the work at 47k tokens, and a token costs what 12 patches do."""
    text = dict(hidden_size=4096, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
                intermediate_size=12288)
    vision = dict(hidden_size=1152, depth=27, intermediate_size=4304)
    work = work_model({"text_config": text, "vision_config": vision})
    assert work == WorkModel(47_104, 12)
    assert work_model(text).attention_tokens == 47_104
    assert work_model(text | {"num_experts_per_tok": 8, "moe_intermediate_size": 768}).attention_tokens < 47_104
    assert work(47_104, 120) == 2 * 47_104 + 10
