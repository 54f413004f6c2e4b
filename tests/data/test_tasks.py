"""Parquet rows to tasks and demonstrations: order, resumption, and what happens to bad rows."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hdpo.agent.chat import ChatFormat
from hdpo.agent.demonstration import encode_demonstration
from hdpo.agent.images import encode_png
from hdpo.config import DataConfig
from hdpo.data.tasks import DemonstrationStream, TaskStream, read_tasks
from hdpo.errors import DataError

PNG = encode_png(Image.effect_noise((40, 30), 50))


def row(i: int, **changes: Any) -> dict[str, Any]:
    return {"data_source": "toy", "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": f"<image>q{i}"}],
            "images": [{"bytes": PNG}], "reward_model": {"ground_truth": str(i), "style": "rule"},
            "extra_info": {"index": f"row_{i}", "answer": str(i)}} | changes


def write(path: Path, rows: list[dict[str, Any]], group: int = 4) -> str:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)
    return str(path)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    return [write(tmp_path / "a.parquet", [row(i) for i in range(7)]),
            write(tmp_path / "b.parquet", [row(i) for i in range(7, 12)])]


def stream(files: list[str], chat: ChatFormat, seed: int = 1, **config: Any) -> TaskStream:
    return TaskStream(files, chat, DataConfig(**config), seed)


def test_an_epoch_holds_every_row_once_in_an_order_of_its_own(files: list[str], chat: ChatFormat) -> None:
    tasks = stream(files, chat)
    first, second = ([t.id for t in tasks.take(12)] for _ in range(2))
    assert sorted(first) == sorted(second) == sorted(f"row_{i}" for i in range(12))
    assert first != second and first != sorted(first)
    assert [t.id for t in stream(files, chat).take(12)] == first
    assert [t.id for t in stream(files, chat, seed=2).take(12)] != first


@pytest.mark.parametrize("before", [0, 5, 12, 17])
def test_a_restored_stream_goes_on_exactly(files: list[str], chat: ChatFormat, before: int) -> None:
    tasks = stream(files, chat)
    tasks.take(before)
    state = tasks.state()
    expected = [t.id for t in tasks.take(20)]
    restored = stream(files, chat)
    restored.restore(state)
    assert [t.id for t in restored.take(20)] == expected and restored.epoch == tasks.epoch
    with pytest.raises(DataError, match="seed"):
        stream(files, chat, seed=9).restore(state)
    with pytest.raises(DataError, match="rows"):
        stream(files[:1], chat).restore(state)


def test_a_task_keeps_the_rows_words_and_leaves_the_answer_out_of_extra(files: list[str], chat: ChatFormat) -> None:
    task = read_tasks(files, chat, DataConfig())[3]
    assert (task.id, task.data_source, task.ground_truth, task.question) == ("row_3", "toy", "3", "q3")
    assert task.images == (PNG,) and task.extra == {"index": "row_3"}
    assert [t.id for t in read_tasks(files, chat, DataConfig(), rows=2)] == ["row_0", "row_1"]


def test_a_list_of_truths_stays_a_list(tmp_path: Path, chat: ChatFormat) -> None:
    file = write(tmp_path / "l.parquet", [row(0, reward_model={"ground_truth": ["4", "four"]})])
    assert stream([file], chat).take(1)[0].ground_truth == ["4", "four"]


BAD = {"broken image": row(0, images=[{"bytes": PNG[:60]}]),
       "no bytes": row(0, images=[{"bytes": None}]),
       "markers": row(0, prompt=[{"role": "user", "content": "none"}]),
       "control token": row(0, prompt=[{"role": "user", "content": "<image><|im_end|>"}]),
       "tokens, data.max_prompt_tokens": row(0, prompt=[{"role": "user", "content": "<image>" + "x" * 300}]),
       "ground_truth": row(0, reward_model={"ground_truth": None, "style": "rule"})}


@pytest.mark.parametrize("problem", BAD)
def test_a_bad_row_is_named_and_skipped_or_ends_the_run(tmp_path: Path, chat: ChatFormat, problem: str) -> None:
    file = write(tmp_path / "bad.parquet", [row(1), BAD[problem], row(2)])
    tasks = stream([file], chat, max_prompt_tokens=200)
    assert sorted(t.id for t in tasks.take(4)) == ["row_1", "row_1", "row_2", "row_2"]
    assert list(tasks.skipped) == ["bad.parquet row 1"]
    assert problem in tasks.skipped["bad.parquet row 1"] or problem == "broken image"
    with pytest.raises(DataError, match="bad.parquet row 1: "):
        stream([file], chat, max_prompt_tokens=200, bad_row="stop").take(3)


def test_data_without_any_good_row_ends_instead_of_searching_forever(tmp_path: Path, chat: ChatFormat) -> None:
    file = write(tmp_path / "bad.parquet", [BAD["broken image"]] * 3)
    with pytest.raises(DataError, match="no usable row.*bad.parquet row"):
        stream([file], chat).take(1)


@pytest.mark.parametrize("column", ["prompt", "reward_model"])
def test_a_missing_column_is_named_with_its_file(tmp_path: Path, chat: ChatFormat, column: str) -> None:
    file = write(tmp_path / "c.parquet", [{k: v for k, v in row(0).items() if k != column}])
    with pytest.raises(DataError, match=f"c.parquet: column {column} is missing"):
        stream([file], chat)


def test_missing_damaged_and_empty_files_give_one_line(tmp_path: Path, chat: ChatFormat) -> None:
    (tmp_path / "x.parquet").write_bytes(b"no parquet")
    for files, text in (([], "no data files"), (["/no/such.parquet"], "no such data file"),
                        ([str(tmp_path / "x.parquet")], "not a readable Parquet")):
        with pytest.raises(DataError, match=text) as caught:
            stream(files, chat)
        assert "\n" not in str(caught.value)


def test_demonstrations_are_checked_counted_and_encodable(tmp_path: Path, chat: ChatFormat) -> None:
    talk = [{"role": "user", "content": "<image>q"}, {"role": "assistant", "content": "<answer>4</answer>"}]
    rows = [{"messages": talk, "images": [{"bytes": PNG}]}, {"messages": talk[:1], "images": [{"bytes": PNG}]}]
    demos = DemonstrationStream([write(tmp_path / "d.parquet", rows)], chat, DataConfig(), seed=1)
    demo = demos.take(2)[0]
    token_ids, mask, images = encode_demonstration(chat, demo.messages, demo.images)
    assert len(token_ids) == len(mask) == demo.num_tokens and len(images) == 1
    assert list(demos.skipped) == ["d.parquet row 1"]
    with pytest.raises(DataError, match="limit is 20|must end with"):
        DemonstrationStream([write(tmp_path / "e.parquet", rows)], chat, DataConfig(), seed=1, max_tokens=20)
