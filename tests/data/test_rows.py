"""What rows of strangers' files hold: sensible readings, and one line for the rest."""
from __future__ import annotations

import datetime
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_tasks import row, stream, write

from hdpo.agent.chat import ChatFormat
from hdpo.data.rows import checked_extra, checked_flag, checked_messages, checked_truth
from hdpo.errors import DataError
from hdpo.types import Task


@pytest.mark.parametrize(("value", "truth"), [
    ({"ground_truth": "7"}, "7"), ('{"ground_truth": "7", "style": "rule"}', "7"), ({"ground_truth": 7}, "7"),
    ({"ground_truth": 0}, "0"), ({"ground_truth": False}, "False"), ({"ground_truth": 0.5}, "0.5"),
    ({"ground_truth": ["Paris", None, "paris"]}, ["Paris", "paris"]), ({"ground_truth": ["Paris", ""]}, ["Paris"]),
    ({"ground_truth": {"target": ["a", "b"]}}, ["a", "b"]), ('{"ground_truth": ["\\ud83d", "x"]}', ["\ufffd", "x"]),
    ({"ground_truth": "[1, 2]"}, "[1, 2]")])
def test_a_truth_is_read_from_structs_json_text_numbers_and_lists_without_nulls(value: Any, truth: Any) -> None:
    assert checked_truth(value) == truth


@pytest.mark.parametrize("value", [None, "", "seven", 7, "{broken", [], {"ground_truth": None}, {"ground_truth": ""}, {},
                                   {"ground_truth": [None]}, {"ground_truth": {"answer": 1}}, {"ground_truth": b"7"},
                                   {"ground_truth": float("nan")}, "[" * 100_000])
def test_what_holds_no_truth_is_refused_in_one_line_that_names_the_field(value: Any) -> None:
    with pytest.raises(DataError, match="^reward_model") as caught:
        checked_truth(value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_extra_info_of_any_kind_becomes_plain_json() -> None:
    extra = checked_extra({
        "index": 0, "answer": "secret", "day": datetime.date(2026, 1, 2), "at": datetime.datetime(2026, 1, 2, 3, 4), "raw": b"\0",
        "cost": Decimal("1.5"), "took": datetime.timedelta(seconds=90), "none": None, "nan": float("nan"), "half": "\ud83d!",
        "deep": {"list": [1, None, b"x", {"day": datetime.time(1)}], 5: "five"}, "tool_needed": 1})
    assert json.loads(json.dumps(extra)) == extra
    assert extra == {"index": 0, "day": "2026-01-02", "at": "2026-01-02T03:04:00", "cost": "1.5", "took": 90.0, "half": "\ufffd!",
                     "deep": {"list": [1, {"day": "01:00:00"}], "5": "five"}, "tool_needed": True}
    assert checked_extra('{"index": 3}') == {"index": 3} and checked_extra(None) == checked_extra("") == {}
    for wrong in ("no json", [1], 5):
        with pytest.raises(DataError, match="extra_info must be"):
            checked_extra(wrong)


@pytest.mark.parametrize(("value", "flag"), [(1, True), (0, False), (1.0, True), ("0", False), ("Yes", True), ("no", False),
                                             (" TRUE ", True), (True, True)])
def test_a_flag_is_read_as_people_write_it(value: Any, flag: bool) -> None:
    assert checked_flag(value, "extra_info.tool_needed") is flag


@pytest.mark.parametrize("value", [0.5, 2, "perhaps", "a\nb", [], {}])
def test_any_other_flag_is_refused_by_name(value: Any) -> None:
    with pytest.raises(DataError, match="^extra_info.tool_needed is .*true or false") as caught:
        checked_flag(value, "extra_info.tool_needed")
    assert "\n" not in str(caught.value)


def test_messages_may_be_json_text_and_come_out_valid() -> None:
    assert checked_messages('[{"role": "user", "content": "\\ud83d"}]', "prompt") == [{"role": "user", "content": "\ufffd"}]


def test_index_0_is_an_index() -> None:
    assert [Task("t", "d", [], (), "", {"index": i}).row_index for i in (0, "0", None, "")] == ["0", "0", "", ""]


@pytest.mark.parametrize("needed", [1, "yes", "0", None])
def test_any_sensible_need_of_a_tool_is_known_as_true_false_or_not_at_all(needed: Any) -> None:
    assert Task("t", "d", [], (), "", checked_extra({"tool_needed": needed})).tool_needed is (
        None if needed is None else needed != "0")
    assert Task("t", "d", [], (), "", {"tool_needed": 0.5}).tool_needed is None


def test_structs_as_json_text_and_views_of_strings_are_rows_like_others(tmp_path: Path, chat: ChatFormat) -> None:
    plain = row(4, extra_info={"index": 0})
    texts = plain | {name: json.dumps(plain[name]) for name in ("prompt", "reward_model", "extra_info")}
    columns = {name: pa.array([text], pa.string_view()) for name, text in texts.items() if isinstance(text, str)}
    columns["images"] = pa.array([plain["images"]])
    pq.write_table(pa.table(columns), tmp_path / "views.parquet")
    files = str(tmp_path / "views.parquet"), write(tmp_path / "plain.parquet", [plain])
    tasks = [stream([file], chat).take(1)[0] for file in files]
    assert tasks[0] == tasks[1] and tasks[0].id == "0" and tasks[0].ground_truth == "4"


def test_text_that_is_no_utf8_costs_its_own_row(tmp_path: Path, chat: ChatFormat) -> None:
    table = pa.Table.from_pylist([row(1), row(2)])
    sizes = pa.py_buffer(b"".join(n.to_bytes(4, "little") for n in (0, 3, 7)))
    sources = pa.Array.from_buffers(pa.string(), 2, [None, sizes, pa.py_buffer(b"toy\xed\xa0\xbd!")])
    pq.write_table(table.set_column(0, "data_source", sources), tmp_path / "u.parquet")
    tasks = stream([str(tmp_path / "u.parquet")], chat)
    assert [task.id for task in tasks.take(2)] == ["row_1", "row_1"] and "utf-8" in tasks.skipped["u.parquet row 1"]


@pytest.mark.parametrize(("changes", "setting"), [
    ({"prompt": [{"role": "user", "content": "no marker"}]}, "data.insert_markers"),
    ({"images": ["photos/1.png"]}, "data.image_root")])
def test_what_a_setting_would_mend_is_refused_with_its_name(
        tmp_path: Path, chat: ChatFormat, changes: dict[str, Any], setting: str) -> None:
    tasks = stream([write(tmp_path / "x.parquet", [row(1, **changes)]), write(tmp_path / "y.parquet", [row(2)])], chat)
    assert [task.id for task in tasks.take(1)] == ["row_2"] and setting in tasks.skipped["x.parquet row 0"]
