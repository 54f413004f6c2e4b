"""Grouping by length: every row once an epoch, steps of like rows, the same order for everybody, and exact resumption."""
from __future__ import annotations

import random
import statistics
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hdpo.agent.chat import ChatFormat
from hdpo.config import DataConfig
from hdpo.data.grouping import by_length
from hdpo.data.tasks import DemonstrationStream
from hdpo.errors import DataError

ROWS, STEP = 47, 4


@given(st.integers(0, 60), st.integers(1, 7), st.integers(1, 5), st.integers(0, 100), st.integers(0, 3))
def test_an_epoch_has_each_row_once_and_its_whole_steps_are_cut_where_steps_begin(
        rows: int, step: int, steps: int, start: int, seed: int) -> None:
    coin = random.Random(seed)
    order, lengths = coin.sample(range(rows), rows), [coin.randrange(9) for _ in range(rows)]
    found = by_length(order, lengths, step, steps, start, coin)
    assert sorted(found) == sorted(order)
    head = -start % step
    assert found[:head] == order[:head]
    for first in range(head, rows, step * steps):      # each window keeps its rows; its steps don't interleave in length
        window = found[first:first + step * steps]
        assert sorted(window) == sorted(order[first:first + step * steps])
        parts = sorted(sorted(lengths[row] for row in window[at:at + step]) for at in range(0, len(window) // step * step, step))
        assert all(one[-1] <= other[0] for one, other in zip(parts, parts[1:]))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Answers of many lengths, some equal; one row is bad."""
    path = tmp_path_factory.mktemp("grouping") / "d.parquet"
    coin = random.Random(3)
    table = [{"messages": [{"role": "user", "content": f"q{number}"},
                           {"role": "assistant", "content": "" if number == 5 else "four " * coin.randrange(1, 40)}]}
             for number in range(ROWS + 1)]
    table[5]["messages"] = table[5]["messages"][:1]
    pq.write_table(pa.Table.from_pylist(table), path)
    return str(path)


def stream(file: str, chat: ChatFormat, steps: int = 5, **config: Any) -> DemonstrationStream:
    settings = DataConfig(cache=str(Path(file).parent), group_by_length=steps, **config)
    return DemonstrationStream([file], chat, settings, seed=1, rows_per_step=STEP)


def test_each_step_has_like_rows_over_the_ends_of_epochs_and_each_epoch_has_every_row_once(file: str, chat: ChatFormat) -> None:
    demos, plain = stream(file, chat), stream(file, chat, steps=0)
    steps = [[(row.id, row.num_tokens) for row in demos.take(STEP)] for _ in range(3 * ROWS // STEP)]
    taken = [row for step in steps for row, _ in step]
    for epoch in range(2):
        assert len(set(taken[epoch * ROWS:(epoch + 1) * ROWS])) == ROWS
    assert taken[:ROWS] != taken[ROWS:2 * ROWS]

    def spread(found: list[list[int]]) -> float:
        return statistics.mean(max(lengths) - min(lengths) for lengths in found)
    unlike = [[row.num_tokens for row in plain.take(STEP)] for _ in steps]
    assert spread([[length for _, length in step] for step in steps]) < spread(unlike) / 2
    firsts = [step[0][1] for step in steps]
    assert firsts != sorted(firsts), "long and short steps come in seeded order"


@pytest.mark.parametrize("before", [0, 3, 11, 12, 30])
def test_a_restored_stream_goes_on_exactly_and_not_with_other_groups(file: str, chat: ChatFormat, before: int) -> None:
    demos = stream(file, chat)
    for _ in range(before):
        demos.take(STEP)
    state = demos.state()
    expected = [[row.id for row in demos.take(STEP)] for _ in range(15)]
    again = stream(file, chat)
    again.restore(state)
    assert [[row.id for row in again.take(STEP)] for _ in range(15)] == expected
    for other in (stream(file, chat, steps=4), stream(file, chat, steps=0)):
        with pytest.raises(DataError, match="grouped"):
            other.restore(state)


def test_without_shuffling_short_steps_come_first(file: str, chat: ChatFormat) -> None:
    demos = stream(file, chat, steps=100, shuffle=False)
    lengths = [row.num_tokens for row in demos.take(ROWS // STEP * STEP)]
    assert lengths == sorted(lengths)
