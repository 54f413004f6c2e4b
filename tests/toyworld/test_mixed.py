"""The mixed world: other questions than the clear one, which stays as it was; what its demonstrations show is what tools give."""
from __future__ import annotations

import hashlib
import re
import sqlite3
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from hdpo.agent.images import decode_image
from hdpo.errors import DataError
from hdpo.toyworld import words
from hdpo.toyworld.families import Puzzle
from hdpo.toyworld.world import World, draw_puzzles, make_world, write_plain

CLEAR = "34063321950a480e6985f911a788ab3b789d9b6eb6031726e136b964cd79e9e6"
"""Of sixty puzzles of seed 5, drawn before there was a second difficulty."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("mixed"), seed=3, train_rows=16, val_rows=32, demos=320, difficulty="mixed")


def _digest(puzzles: list[Puzzle]) -> str:
    digest = hashlib.sha256()
    for p in puzzles:
        digest.update(repr((p.family, p.tool_needed, p.question, p.answer, p.call, p.observation, p.direct_reason,
                            p.tool_reason)).encode())
        for image in (*p.images, *p.observation_images):
            digest.update(decode_image(image, "").tobytes())
    return digest.hexdigest()


def test_the_clear_world_is_what_it_was_before_there_was_another() -> None:
    assert _digest(draw_puzzles(5, "demos", 60)) == CLEAR
    assert _digest(draw_puzzles(5, "demos", 60, "mixed")) != CLEAR


def test_some_questions_need_a_tool_some_none_and_in_some_it_may_help() -> None:
    puzzles = draw_puzzles(4, "train", 160, "mixed")
    assert Counter(p.tool_needed for p in puzzles) == {True: 60, False: 50, None: 50}
    assert {p.family for p in puzzles if p.tool_needed is None} == {"perception", "arithmetic"}


def test_a_speck_of_noise_hides_as_much_in_the_crop_as_in_the_picture() -> None:
    """Worn digits: the crop is the picture's own part, noise and all, so that zooming in helps and does not undo the wear."""
    for puzzle in draw_puzzles(6, "val", 64, "mixed"):
        if puzzle.observation_images and puzzle.tool_needed is not False and "crop" in puzzle.call:
            box = tuple(map(int, re.findall(r"\d+", puzzle.call.partition("crop((")[2])))
            crop, picture = (decode_image(data, "") for data in (puzzle.observation_images[0], puzzle.images[0]))
            assert np.array_equal(np.asarray(picture.crop(box)), np.asarray(crop))
            corner = np.asarray(crop.convert("L"))[:4, :4]
            assert corner.std() > 0


def test_the_index_says_what_demonstrations_show_and_of_some_names_two_codes(world: World) -> None:
    index, found = sqlite3.connect(world.text_index), Counter[int]()
    for puzzle in draw_puzzles(3, "val", 64, "mixed"):
        if puzzle.family == "search":
            name = re.search(r'"query": "(.*?)"', puzzle.call)[1]
            [(snippet,)] = index.execute("SELECT snippet FROM pages WHERE title = ?", [name]).fetchall()
            assert snippet in puzzle.observation and puzzle.answer in snippet
            found[snippet.count("has the gate code")] += 1
            assert snippet.count("has the gate code") == (2 if puzzle.tool_needed else 1)
    assert found[1] and found[2]


def test_demonstrations_sometimes_know_without_a_tool_what_needs_one(world: World) -> None:
    rows = [row for row in pq.read_table(world.demos).to_pylist() if "<tool_call>" in row["messages"][0]["content"]]
    calls = {need: np.mean([len(row["messages"]) == 5 for row in rows if row["extra_info"]["tool_needed"] is need])
             for need in (True, False, None)}
    assert 0.8 < calls[True] < 1 and all(0.7 < calls[need] < 0.92 for need in (False, None))


def test_plain_rows_ask_the_same_without_offering_a_tool(world: World, tmp_path: Path) -> None:
    write_plain(world.val, tmp_path / "plain.parquet")
    rows, plain = (pq.read_table(path).to_pylist() for path in (world.val, tmp_path / "plain.parquet"))
    for row, other in zip(rows, plain, strict=True):
        assert other["prompt"][1:] == row["prompt"][1:] and other["reward_model"] == row["reward_model"]
        assert other["prompt"][0]["content"] == words.PLAIN_SYSTEM and other["data_source"] == f"plain/{row['data_source']}"


def test_a_difficulty_that_there_is_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="clear, mixed"):
        make_world(tmp_path, difficulty="hard")
