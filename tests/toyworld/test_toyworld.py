"""The toy world: reproducible, balanced, honest about what needs a tool; and the shipped base that learns in it."""
from __future__ import annotations

import contextlib
import io
import json
import re
import sqlite3
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageChops

from hdpo.agent.chat import ChatFormat, load_chat_format
from hdpo.agent.demonstration import encode_demonstration
from hdpo.agent.images import bound_image, decode_image
from hdpo.errors import DataError
from hdpo.toyworld import base as toybase
from hdpo.toyworld import words
from hdpo.toyworld.families import Puzzle
from hdpo.toyworld.glyphs import load_glyphs
from hdpo.toyworld.primitives import Teacher
from hdpo.toyworld.tensors import collate, draw_batch, patchify
from hdpo.toyworld.tokenizer import VIEW, make_config, make_processor, make_tokenizer
from hdpo.toyworld.world import World, demonstrate, draw_puzzles, make_world

BASE = Path(toybase.__file__).parent / "assets" / "toy-base"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), seed=3, train_rows=40, val_rows=80, demos=200)


@pytest.fixture(scope="module")
def chat() -> ChatFormat:
    return load_chat_format(str(BASE), VIEW * VIEW, VIEW * VIEW)


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_seed_gives_the_same_bytes_and_another_seed_other_rows(world: World, tmp_path: Path) -> None:
    again = make_world(tmp_path / "again", seed=3, train_rows=40, val_rows=80, demos=200)
    other = make_world(tmp_path / "other", seed=4, train_rows=40, val_rows=80, demos=200)
    assert _bytes(again.train.parent) == _bytes(world.train.parent)
    assert other.val.read_bytes() != world.val.read_bytes()


def test_every_family_is_equally_frequent_and_half_the_rows_need_a_tool(world: World) -> None:
    rows = pq.read_table(world.val).to_pylist()
    assert Counter(r["extra_info"]["family"] for r in rows) == dict.fromkeys(
        ("perception", "fine", "arithmetic", "search", "identity"), 16)
    assert sum(r["extra_info"]["tool_needed"] for r in rows) == 40
    for family in ("arithmetic", "search", "identity"):
        assert sum(r["extra_info"]["tool_needed"] for r in rows if r["extra_info"]["family"] == family) == 8


def test_rows_follow_the_metis_schema(world: World) -> None:
    for row in pq.read_table(world.train).to_pylist():
        assert set(row) == {"data_source", "prompt", "images", "ability", "reward_model", "extra_info"}
        assert [m["role"] for m in row["prompt"]] == ["system", "user"]
        assert row["prompt"][1]["content"].count("<image>") == len(row["images"])
        assert row["reward_model"] == {"ground_truth": row["extra_info"]["answer"], "style": "rule"}
        assert set(row["extra_info"]) == {"index", "question", "answer", "pass8", "tool_needed", "family"}
        assert row["extra_info"]["answer"] not in row["prompt"][0]["content"]


def test_held_out_rows_share_no_glyph_name_or_product_with_training() -> None:
    train, held_out = load_glyphs("train"), load_glyphs("held_out")
    seen = {g.tobytes() for g in train.ink}
    assert not any(g.tobytes() in seen for g in held_out.ink)
    assert all(len(rows) >= 30 for rows in held_out.by_digit)
    drawn = {split: draw_puzzles(5, split, 600) for split in ("train", "val")}
    for variant in (("search", True), ("search", False), ("arithmetic", True)):
        asked = {s: {p.question for p in ps if (p.family, p.tool_needed) == variant} for s, ps in drawn.items()}
        assert asked["train"] and asked["val"] and not asked["train"] & asked["val"]


def _ink_height(picture: Image.Image) -> int:
    """Rows of the top left quadrant, as the model sees the picture, that differ clearly from the paper."""
    view = bound_image(picture, 16, VIEW * VIEW, VIEW * VIEW).crop((0, 0, VIEW // 2, VIEW // 2))
    paper = Image.new("RGB", view.size, picture.getpixel((0, 0)))
    difference = np.asarray(ImageChops.difference(view, paper)).max(-1)
    return int((difference.max(1) > 12).sum())


def test_fine_digits_are_a_speck_in_the_models_view_and_legible_in_the_crop() -> None:
    puzzles = draw_puzzles(6, "val", 100)
    for puzzle in puzzles:
        if puzzle.family == "perception":
            assert _ink_height(decode_image(puzzle.images[0], "")) >= 15
        if puzzle.family == "fine":
            assert _ink_height(decode_image(puzzle.images[0], "")) <= 5
            crop = bound_image(decode_image(puzzle.observation_images[0], ""), 16, VIEW * VIEW, VIEW * VIEW)
            ink = np.asarray(crop.convert("L")).astype(int)
            assert (ink < ink.max() - 60).any(1).sum() >= 15


def _run_tool(puzzle: Puzzle, world: World) -> tuple[str, tuple[bytes, ...] | Image.Image]:
    """What the puzzle's call brings to light, executed for real: stdout, snippet or title, and images."""
    call = json.loads(re.fullmatch(r"<tool_call>(.*)</tool_call>", puzzle.call)[1])
    if call["name"] == "python":
        names = {f"image_{k + 1}": decode_image(i, "") for k, i in enumerate(puzzle.images)}
        code, stdout = call["arguments"]["code"], io.StringIO()
        with contextlib.redirect_stdout(stdout):
            return stdout.getvalue() or str(value := eval(code, names) or ""), value or stdout.getvalue()
    if call["name"] == "text_search":
        index = sqlite3.connect(world.text_index)
        words_of = " OR ".join(call["arguments"]["query"].split())
        found = index.execute("SELECT snippet FROM pages WHERE pages MATCH ? ORDER BY bm25(pages) LIMIT 1", [words_of])
        return found.fetchone()[0], ()
    labels = json.loads((world.image_index / "labels.json").read_text())
    file = next(f for f in labels if (world.image_index / f).read_bytes() == puzzle.images[0])
    return labels[file], ((world.image_index / file).read_bytes(),)


def test_the_demonstrated_call_really_finds_the_answer(world: World) -> None:
    for puzzle in draw_puzzles(3, "val", 80):
        if "print(" in puzzle.call:
            expression = re.search(r"print\((.*?)\)", puzzle.call)[1]
            assert str(eval(expression)) == puzzle.answer and puzzle.answer in puzzle.observation
            continue
        text, images = _run_tool(puzzle, world)
        if isinstance(images, Image.Image):
            assert images.tobytes() == decode_image(puzzle.observation_images[0], "").tobytes()
        else:
            assert puzzle.answer in text and text in puzzle.observation and images == puzzle.observation_images


def test_demonstrations_call_blindly_but_always_where_a_tool_is_needed(world: World) -> None:
    every = pq.read_table(world.demos).to_pylist()
    rows = [r for r in every if "<tool_call>" in r["messages"][0]["content"]]
    assert all(len(r["messages"]) == 3 for r in every if r not in rows)   # general data: no tools offered, none called
    calls = {needed: [len(r["messages"]) == 5 for r in rows if r["extra_info"]["tool_needed"] == needed]
             for needed in (True, False)}
    assert all(calls[True])
    assert 0.65 <= np.mean(calls[False]) < 1
    for row in every:
        assert sum(m["content"].count("<image>") for m in row["messages"]) == len(row["images"])
        assert row["messages"][-1]["content"].endswith(f"<answer>{row['extra_info']['answer']}</answer>")


def test_negative_counts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="negative"):
        make_world(tmp_path, demos=-1)


def test_demonstrations_are_short_and_observations_need_no_added_token(chat: ChatFormat) -> None:
    lengths = []
    for puzzle in draw_puzzles(7, "demos", 60):
        messages, images = demonstrate(puzzle, calls=True)
        ids, mask, _ = encode_demonstration(chat, messages, [decode_image(i, "") for i in images])
        lengths.append(len(ids))
        assert sum(mask) <= 40
        assert chat._encode(chat._control, puzzle.observation) == chat._encode(chat._plain, puzzle.observation)
    assert max(lengths) <= 192 and np.mean(lengths) <= 135


def test_digits_are_single_tokens_and_text_survives() -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer.encode("347*268")
    assert [tokenizer.decode([i]) for i in ids] == list("347*268")
    for text in (words.SYSTEM, words.PYTHON_CALL.format(words.crop_code(2, True)), "é \n\n  {\"ü\"}"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert all(len(tokenizer.encode(p)) == 1 for p in (*words.TAGS, *words.PHRASES))


def test_drawn_pixels_and_positions_equal_those_of_the_processor_and_the_model() -> None:
    from transformers import Qwen3VLForConditionalGeneration

    tokenizer, teacher = make_tokenizer(), Teacher(1)
    lesson = teacher.crops()
    pictures = draw_batch(lesson.pictures, teacher.glyphs)
    processed = make_processor(tokenizer).image_processor(
        images=[Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pictures], return_tensors="pt")
    torch.testing.assert_close(processed.pixel_values, patchify(pictures))
    model = Qwen3VLForConditionalGeneration(make_config(tokenizer))
    batch = collate([lesson], tokenizer, teacher.glyphs)
    expected, _ = model.model.get_rope_index(
        batch.input_ids, mm_token_type_ids=(batch.input_ids == model.config.image_token_id).int(),
        image_grid_thw=processed.image_grid_thw)
    assert torch.equal(expected, batch.position_ids)


def test_only_answers_are_trained_in_pretraining_and_no_lesson_shows_the_policy() -> None:
    tokenizer, teacher = make_tokenizer(), Teacher(2)
    for lesson in teacher.batch(40):
        labels = collate([lesson], tokenizer, teacher.glyphs).labels[0]
        trained = tokenizer.decode(labels[labels != -100])
        assert trained == "".join(f"{answer}<|im_end|>" for _, answer in lesson.turns)
        assert not any(words.SYSTEM in user for user, _ in lesson.turns)


def test_an_interrupted_pretraining_continues_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toybase, "BATCH", 2)
    whole, _ = toybase.pretrain(tmp_path / "whole", seed=5, steps=4)
    save = toybase._save

    def save_and_stop(*args: object) -> None:
        save(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(toybase, "SAVE_EVERY", 2)
        patch.setattr(toybase, "_save", save_and_stop)
        toybase.pretrain(tmp_path / "cut", seed=5, steps=4)
    continued, _ = toybase.pretrain(tmp_path / "cut", seed=5, steps=4)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(continued.state_dict()[name], value)


def test_the_shipped_base_is_small_matches_the_tokenizer_and_has_the_skills() -> None:
    from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration

    assert sum(p.stat().st_size for p in BASE.rglob("*")) < 8 * 2**20
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    assert tokenizer.get_vocab() == make_tokenizer().get_vocab()
    model = Qwen3VLForConditionalGeneration.from_pretrained(BASE)
    skills = toybase.accuracy(model, tokenizer, lessons=96)
    assert min(skills.values()) >= 0.9, skills
