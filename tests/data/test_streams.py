"""Streams of rows: the order they always had, rows read by who asks, mixtures, and what a row may look like."""
from __future__ import annotations

import base64
import json
import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hdpo.agent.chat import ChatFormat
from hdpo.agent.images import encode_png
from hdpo.config import DataConfig
from hdpo.data import copies
from hdpo.data.store import RowStore
from hdpo.data.tasks import DemonstrationStream, TaskStream, read_tasks
from hdpo.errors import DataError

PNG = encode_png(Image.effect_noise((40, 30), 50))


def row(i: int, **changes: Any) -> dict[str, Any]:
    return {"data_source": "toy", "prompt": [{"role": "user", "content": f"<image>q{i}"}], "images": [{"bytes": PNG}],
            "reward_model": {"ground_truth": str(i)}, "extra_info": {"index": f"row_{i}"}} | changes


def parquet(file: Path, rows: list[dict[str, Any]], group: int = 4) -> str:
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=group)
    return str(file)


def lines(file: Path, rows: list[dict[str, Any]]) -> str:
    text = [json.dumps(row | {"images": [base64.b64encode(PNG).decode()]} if "images" in row else row) for row in rows]
    file.write_text("\n".join(text))
    return str(file)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the rows that are made into records, in order."""
    seen: list[int] = []
    inner = RowStore.row
    monkeypatch.setattr(RowStore, "row", lambda self, index, columns=None: (seen.append(index), inner(self, index, columns))[1])
    return seen


def shuffled(rows: int, seed: int, epoch: int) -> list[int]:
    order = list(range(rows))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def old_order(rows: int, bad: set[int], seed: int, takes: list[int]) -> list[list[int]]:
    """What the reader of row groups took: the order of each epoch, bad rows passed over."""
    taken, epoch, position, order = [], 0, 0, shuffled(rows, seed, 0)
    for count in takes:
        found: list[int] = []
        while len(found) < count:
            if position == len(order):
                epoch, position = epoch + 1, 0
                order = shuffled(rows, seed, epoch)
            chunk = order[position:position + count - len(found)]
            position += len(chunk)
            found += [i for i in chunk if i not in bad]
        taken.append(found)
    return taken


@pytest.mark.parametrize("bad", [set(), {0, 3, 11}])
def test_rows_come_in_the_order_of_the_reader_before_so_that_its_runs_go_on(
        tmp_path: Path, chat: ChatFormat, bad: set[int]) -> None:
    file = parquet(tmp_path / "x.parquet", [row(i, **({"reward_model": {"ground_truth": None}} if i in bad else {}))
                                            for i in range(12)])
    takes = [5, 3, 4, 7, 20]
    tasks = TaskStream([file], chat, DataConfig(), seed=7)
    seen = [[int(task.ground_truth) for task in tasks.take(count)] for count in takes]
    assert seen == old_order(12, bad, 7, takes)
    again = TaskStream([file], chat, DataConfig(), seed=7)
    again.restore({"epoch": 0, "position": 5, "rows": 12, "seed": 7})      # as such a run's checkpoint has it
    rest = [int(task.ground_truth) for task in again.take(4)]
    assert rest == [i for i in shuffled(12, 7, 0)[5:] if i not in bad][:4]


def test_rows_are_the_same_from_every_kind_of_file(tmp_path: Path, chat: ChatFormat) -> None:
    rows = [row(i) for i in range(9)]
    both = [TaskStream([file], chat, DataConfig(), seed=3).take(20) for file in (
        parquet(tmp_path / "x.parquet", rows), lines(tmp_path / "x.jsonl", rows))]
    assert list(both[0]) == list(both[1])


def test_taking_reads_no_row_and_only_who_asks_for_one_reads_it(tmp_path: Path, chat: ChatFormat, reads: list[int]) -> None:
    tasks = TaskStream([parquet(tmp_path / "x.parquet", [row(i) for i in range(40)])], chat, DataConfig(), seed=1)
    reads.clear()
    step = tasks.take(16)
    assert len(step) == 16 and not reads
    mine = step[1::4]
    assert not reads and mine[2].id == f"row_{step.indices[9]}" and reads == [step.indices[9]]


def test_looking_ahead_moves_nothing(tmp_path: Path, chat: ChatFormat) -> None:
    tasks = TaskStream([parquet(tmp_path / "x.parquet", [row(i) for i in range(5)])], chat, DataConfig(), seed=1)
    tasks.take(3)
    state, ahead = tasks.state(), tasks.peek(6).indices
    assert tasks.state() == state and tasks.take(6).indices == ahead


def test_rows_are_checked_once_for_all_runs_with_the_same_settings(tmp_path: Path, chat: ChatFormat, reads: list[int]) -> None:
    file, config = parquet(tmp_path / "x.parquet", [row(i) for i in range(6)]), DataConfig(cache=str(tmp_path / "cache"))
    TaskStream([file], chat, config, seed=1)
    assert sorted(reads) == list(range(6))
    reads.clear()
    assert not TaskStream([file], chat, config, seed=2).skipped and not reads
    with pytest.raises(DataError, match="max_prompt_tokens is 10"):
        TaskStream([file], chat, config.model_copy(update={"max_prompt_tokens": 10}), seed=1)


def test_a_row_with_more_images_than_a_rollout_may_hold_is_a_bad_row(tmp_path: Path, chat: ChatFormat) -> None:
    rows = [row(i, images=[PNG] * (3 if i == 1 else 1)) for i in range(3)]
    rows[1]["prompt"][0]["content"] = "<image>" * 3
    file, config = parquet(tmp_path / "x.parquet", rows), DataConfig(cache=str(tmp_path / "cache"))
    tasks = TaskStream([file], chat, config, seed=1, max_images=2)
    assert tasks.skipped == {"x.parquet row 1": "the prompt has 3 images, rollout.max_images is 2"}
    assert len(read_tasks([file], chat, config, max_images=2)) == 2 and not TaskStream([file], chat, config, 1, 3).skipped
    with pytest.raises(DataError, match="row 1: the prompt has 3 images"):
        TaskStream([file], chat, config.model_copy(update={"bad_row": "stop"}), seed=1, max_images=2)


def test_held_out_rows_are_read_up_to_those_that_are_wanted(tmp_path: Path, chat: ChatFormat, reads: list[int]) -> None:
    rows = [row(i, **({"reward_model": {"ground_truth": None}} if i == 1 else {})) for i in range(300)]
    config = DataConfig(cache=str(tmp_path / "cache"))
    held_out = read_tasks([parquet(tmp_path / "x.parquet", rows)], chat, config, rows=3)
    assert [task.id for task in held_out] == ["row_0", "row_2", "row_3"] and max(reads) < 40
    assert len(read_tasks([str(tmp_path / "x.parquet")], chat, config)) == 299


def test_a_picture_file_that_changes_is_checked_again(tmp_path: Path, chat: ChatFormat) -> None:
    (tmp_path / "p").mkdir()
    picture = tmp_path / "p" / "a.png"
    picture.write_bytes(PNG)
    config = DataConfig(image_root=str(tmp_path / "p"), cache=str(tmp_path / "cache"))
    file = parquet(tmp_path / "x.parquet", [row(0, images=["a.png"]), row(1, images=["b.png"])])
    assert list(TaskStream([file], chat, config, seed=1).skipped) == ["x.parquet row 1"]
    picture.write_bytes(PNG[:50])
    with pytest.raises(DataError, match="no usable row"):
        TaskStream([file], chat, config, seed=1)


def test_a_row_that_vanishes_after_its_check_is_named(tmp_path: Path, chat: ChatFormat) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    tasks = TaskStream([parquet(tmp_path / "x.parquet", [row(0, images=["a.png"])])], chat, DataConfig(), seed=1)
    (tmp_path / "a.png").unlink()
    with pytest.raises(DataError, match="x.parquet row 0: image 0: no such file: a.png .*readable when the data was checked"):
        tasks.take(1)[0]


@pytest.mark.parametrize("other", [4, 5])
def test_a_data_file_that_is_rewritten_is_named_once_and_the_rows_stay_those_that_were_checked(
        tmp_path: Path, chat: ChatFormat, caplog: pytest.LogCaptureFixture, other: int) -> None:
    """Also where the new file has the same number of bytes: what is read is a copy."""
    file = parquet(tmp_path / "x.parquet", [row(n) for n in range(other)])
    tasks = TaskStream([file], chat, DataConfig(), seed=1)
    first = [task.messages for task in tasks.take(2)]
    again = Path(parquet(tmp_path / "y.parquet", [row(n + 50) for n in range(other)]))
    os.truncate(again, max(again.stat().st_size, Path(file).stat().st_size))
    os.replace(again, file)
    rest = [task.messages for task in tasks.take(other - 2)]
    assert sorted(map(str, first + rest)) == sorted(str(row(n)["prompt"]) for n in range(other))
    assert caplog.text.count("x.parquet was rewritten: this run goes on with the rows it began with") == 1
    tasks.take(1)
    assert caplog.text.count("was rewritten") == 1


def test_a_data_file_that_is_rewritten_while_it_is_copied_is_named_and_not_used(
        tmp_path: Path, chat: ChatFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    file = parquet(tmp_path / "x.parquet", [row(n) for n in range(4)])
    write = copies._write

    def meanwhile(*given: Any) -> Any:
        written = write(*given)
        data = Path(file).read_bytes()
        Path(file).write_bytes(data[:8] + bytes([data[8] ^ 1]) + data[9:])      # as many bytes
        return written
    monkeypatch.setattr(copies, "_write", meanwhile)
    with pytest.raises(DataError, match="x.parquet: the data file was rewritten while it was read"):
        TaskStream([file], chat, DataConfig(cache=str(tmp_path / "cache")), seed=1)
    assert not list((tmp_path / "cache").rglob("rows.arrow"))


def test_a_picture_file_that_is_rewritten_after_its_check_is_named_and_not_shown(tmp_path: Path, chat: ChatFormat) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    tasks = TaskStream([parquet(tmp_path / "x.parquet", [row(0, images=["a.png"])])], chat, DataConfig(), seed=1)
    assert tasks.peek(1)[0].images == (PNG,)
    (tmp_path / "a.png").write_bytes(PNG[:-1] + b"x")
    with pytest.raises(DataError, match="x.parquet row 0: .*a.png was rewritten"):
        tasks.take(1)[0]


def test_a_mixture_keeps_its_shares_in_every_step_and_uses_a_source_up_before_it_repeats(
        tmp_path: Path, chat: ChatFormat) -> None:
    sources = []
    for name, count in (("a", 40), ("b", 8)):
        rows = [row(i, data_source=name, extra_info={"index": f"{name}{i}"}) for i in range(count)]
        sources.append(parquet(tmp_path / f"{name}.parquet", rows))
    config = DataConfig(mix=[1, 3])
    tasks = TaskStream(sources, chat, config, seed=1)
    taken = [list(tasks.take(8)) for _ in range(12)]
    assert all(Counter(task.data_source for task in step) == {"a": 2, "b": 6} for step in taken)
    ids = [task.id for step in taken for task in step]
    from_b = [name for name in ids if name.startswith("b")]
    for lap in range(9):
        assert len(set(from_b[8 * lap:8 * lap + 8])) == 8
    assert from_b[:8] != from_b[8:16]
    assert len({name for name in ids if name.startswith("a")}) == 24
    half = TaskStream(sources, chat, config, seed=1)
    half.take(50)
    again = TaskStream(sources, chat, config, seed=1)
    again.restore(half.state())
    assert [task.id for task in again.take(46)] == ids[50:]
    with pytest.raises(DataError, match="mix"):
        TaskStream(sources, chat, DataConfig(), seed=1).restore(half.state())
    with pytest.raises(DataError, match="3 weights for 2 sources"):
        TaskStream(sources, chat, DataConfig(mix=[1, 1, 1]), seed=1)


def test_rows_need_no_pictures_and_no_source(tmp_path: Path, chat: ChatFormat) -> None:
    bare = {"prompt": [{"role": "user", "content": "who?"}], "reward_model": {"ground_truth": {"target": ["Ada", "Lovelace"]}}}
    task = TaskStream([parquet(tmp_path / "x.parquet", [bare])], chat, DataConfig(), seed=1).take(1)[0]
    assert (task.images, task.data_source, task.ground_truth, task.id) == ((), "unknown", ["Ada", "Lovelace"], "x.parquet row 0")


@pytest.mark.parametrize("insert", [False, True])
def test_markers_are_inserted_by_a_setting_where_a_text_has_none(tmp_path: Path, chat: ChatFormat, insert: bool) -> None:
    bare = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    rows = [row(0, prompt=bare, images=[{"bytes": PNG}] * 2), row(1)]
    tasks = TaskStream([parquet(tmp_path / "x.parquet", rows)], chat, DataConfig(insert_markers=insert, shuffle=False), seed=1)
    texts = [task.messages[-1]["content"] for task in tasks.take(2 if insert else 1)]
    assert texts == (["<image><image>\nq", "<image>q1"] if insert else ["<image>q1"])
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<answer>4</answer>"}]
    file = parquet(tmp_path / "d.parquet", [{"messages": json.dumps(talk), "images": PNG}])
    if insert:
        assert DemonstrationStream([file], chat, DataConfig(insert_markers=True), seed=1).take(1)[0].images[0].size == (40, 30)
