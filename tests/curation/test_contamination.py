"""Stage 4: near copies of what benchmarks hold are found, their neighbours are not, the unknown is said; prompts for RL."""
from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw

from hdpo.agent.chat import ChatFormat
from hdpo.config import DataConfig
from hdpo.config.curation import DecontaminationSettings, PromptSettings
from hdpo.config.file import load_config
from hdpo.curation.benchmarks import Known, open_known
from hdpo.curation.chunks import KEPT, Entry
from hdpo.curation.job import Job
from hdpo.curation.likeness import words_of
from hdpo.curation.prompts import Selection, apportioned, candidate, largest_mix
from hdpo.curation.record import Outcome, Record, Waits
from hdpo.curation.stages.contamination import Contamination
from hdpo.data.tasks import TaskStream
from hdpo.errors import ConfigError
from hdpo.report.page import write_report
from hdpo.toyworld.families import png

PICTURES = 24


def photograph(seed: int) -> Image.Image:
    coin, picture = np.random.default_rng(seed), np.zeros((240, 320, 3))
    for n in (3, 6, 12, 24):
        layer = Image.fromarray(coin.integers(0, 256, (n, n, 3), dtype=np.uint8))
        picture += np.array(layer.resize((320, 240), Image.Resampling.BICUBIC), float) / 4
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


def chart(seed: int) -> Image.Image:
    """All of one form, so that only the bars tell them apart."""
    coin, picture = random.Random(seed), Image.new("RGB", (320, 240), "white")
    draw = ImageDraw.Draw(picture)
    draw.line((30, 15, 30, 215, 300, 215), fill=0)
    for bar in range(8):
        draw.rectangle((40 + bar * 32, 215 - coin.randrange(15, 190), 60 + bar * 32, 215), fill=(40, 90, 160))
    return picture


def jpeg(picture: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")


def cropped(picture: Image.Image, seed: int) -> Image.Image:
    """Up to 6 % of each edge."""
    coin, (width, height) = random.Random(seed), picture.size
    left, top, right, bottom = (0.06 * coin.random() for _ in range(4))
    return picture.crop((int(width * left), int(height * top), int(width * (1 - right)), int(height * (1 - bottom))))


EDITS: dict[str, Callable[[Image.Image, int], Image.Image]] = {
    "the same": lambda picture, _: picture, "half as large": lambda picture, _: picture.resize((160, 120)),
    "a fifth as large": lambda picture, _: picture.resize((64, 48)), "quality 30": lambda picture, _: jpeg(picture, 30),
    "cropped": cropped, "cropped, smaller and compressed": lambda picture, k: jpeg(cropped(picture, k).resize((200, 150)), 50)}

QUESTIONS = [
    "A train leaves Lyon at 9 o'clock and drives 120 km per hour; how many km has it driven after 3 hours?",
    "In triangle ABC the angle at A is 40 degrees and AB equals AC. What is the angle at B in degrees?",
    "Which of the shops along the left side of the street sells flowers according to its yellow sign?",
    "What percentage of respondents under 30 said that they read a printed newspaper at least weekly?",
    "图中从左数第三个人手里拿着的东西是什么颜色的"]


def written(folder: Path) -> str:
    """V*Bench in a published layout: photographs and charts with short questions, then QUESTIONS, then a form that many share."""
    rows, home = [], folder / "vstar"
    (home / "pictures").mkdir(parents=True)
    for number in range(PICTURES):
        (home / f"pictures/{number}.png").write_bytes(png((photograph if number % 2 else chart)(number)))
    texts = [*(["What colour is it?"] * PICTURES), *QUESTIONS,
             *(f"Look at the picture carefully and say what colour the {thing} on the table has." for thing in
               ("cup", "lamp", "vase", "book", "fork", "bowl"))]
    for number, text in enumerate(texts):
        rows.append({"image": f"pictures/{number % PICTURES}.png", "text": text, "category": "direct_attributes",
                     "label": "A", "question_id": number})
    (home / "test_questions.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(folder)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> DecontaminationSettings:
    return DecontaminationSettings(data=written(tmp_path_factory.mktemp("benchmarks")))


@pytest.fixture(scope="module")
def known(settings: DecontaminationSettings, tmp_path_factory: pytest.TempPathFactory) -> Known:
    folder = tmp_path_factory.mktemp("known")
    made = open_known(settings, folder, str(folder))
    again = open_known(settings, folder, str(folder))
    assert made.questions == again.questions and np.array_equal(made.hashes, again.hashes)
    return made


def row(question: str = "?", *images: Image.Image | bytes) -> Record:
    encoded = tuple(image if isinstance(image, bytes) else png(image) for image in images)
    return Record("thyme", 0, "", "<image>" * len(images) + question, encoded, (), "r", "a")


def test_what_is_known_of_a_benchmark_is_counted(known: Known) -> None:
    assert known.about == {"vstar": {"questions": PICTURES + len(QUESTIONS) + 6, "pictures": PICTURES, "unreadable": {}}}


@pytest.mark.parametrize("edit", EDITS)
def test_a_near_copy_of_a_benchmark_picture_is_found_as_that_picture(
        edit: str, known: Known, settings: DecontaminationSettings) -> None:
    """Recall 1.0 of photographs and charts alike, under each edit."""
    stage = Contamination(known, settings)
    for number in range(PICTURES):
        outcome = stage.one(row("?", EDITS[edit]((photograph if number % 2 else chart)(number), number)))
        assert outcome.reason == "benchmark_picture" and outcome.record.extra["overlap"][0]["item"] == str(number), edit


def test_another_picture_of_the_same_form_is_no_overlap(known: Known, settings: DecontaminationSettings) -> None:
    """Precision 1.0: photographs, and charts that share axes, colours and most bits of the hash."""
    stage = Contamination(known, settings)
    others = [make(seed) for seed in range(1000, 1030) for make in (photograph, chart)]
    found = [stage.one(row("What colour is it?", picture)) for picture in others]
    assert not [outcome.detail for outcome in found if outcome.reason]


REWORDED = [
    ("A train leaves Lyon at nine o'clock and drives 120 km per hour. How many km will it have driven after three hours?", 0),
    ("Hint: answer in km.\nA TRAIN leaves Lyon at 9 o'clock and drives 120 km per hour; how many km has it driven after 3 hours? "
     "(A) 300 (B) 360", 0),
    ("The triangle ABC: the angle at A is 40 degrees and AB equals AC. How large is the angle at B in degrees?", 1),
    ("According to its yellow sign, which of the shops along the left side of the street sells flowers?", 2),
    ("What share of respondents under 30 said that they read a printed newspaper at least weekly?", 3),
    ("请问图中从左数第三个人手里拿着的东西是什么颜色", 4)]
OTHERS = [
    "A train leaves Lyon at 9 o'clock and drives 150 km per hour; how many km has it driven after 4 hours?",
    "In triangle ABC the angle at A is 50 degrees and AB equals AC. What is the angle at B in degrees?",
    "Which of the shops along the right side of the road sells bread, by the look of its window?",
    "What percentage of respondents over 60 said that they listen to the radio at least weekly?",
    "Look at the picture carefully and say what colour the clock on the wall has.", "What colour is it?",
    "图中右边的狗是什么品种"]


def test_a_reworded_question_is_found_and_the_same_form_with_other_numbers_or_things_is_not(
        known: Known, settings: DecontaminationSettings) -> None:
    """Precision and recall 1.0 on these; a form that many of a benchmark's problems share is nobody's question."""
    stage, fresh = Contamination(known, settings), photograph(5000)
    for text, number in REWORDED:
        outcome = stage.one(row(text, fresh))
        assert outcome.reason == "benchmark_question", text
        assert outcome.record.extra["overlap"][0]["item"] == str(PICTURES + number)
    assert not [text for text in OTHERS if stage.one(row(text, fresh)).reason]


@pytest.mark.parametrize("picture, said", [
    (Image.new("RGB", (50, 40), "white"), "of one colour"), (png(photograph(1))[:-400], "not a readable image")])
def test_a_picture_that_cannot_be_compared_is_said_and_neither_kept_nor_dropped_silently(
        picture: Any, said: str, known: Known, settings: DecontaminationSettings) -> None:
    for unknown, reason in (("keep", ""), ("drop", "picture_unknown")):
        outcome = Contamination(known, settings.model_copy(update={"unknown": unknown})).one(row("?", picture))
        assert outcome.reason == reason and said in outcome.record.extra["overlap_unknown"]


def test_a_report_keeps_the_row_and_says_what_it_overlaps_with(known: Known, settings: DecontaminationSettings) -> None:
    outcome = Contamination(known, settings.model_copy(update={"action": "report"})).one(row(QUESTIONS[0], chart(0)))
    assert outcome.reason == "" and [found["by"] for found in outcome.record.extra["overlap"]] == ["picture", "question"]
    assert Contamination(None, settings).one(row(QUESTIONS[0], chart(0))) == Outcome(row(QUESTIONS[0], chart(0)))


def test_a_folder_without_benchmarks_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no folder of a benchmark"):
        open_known(DecontaminationSettings(data=str(tmp_path)), tmp_path)


def test_words_are_the_same_without_accents_marks_and_case() -> None:
    assert words_of("<image>Où est-il? Three 1,000 plots!") == ["ou", "est", "il", "3", "1000", "plots"]


def entry(source: str, number: int, solved: int | None, question: str = "") -> Entry:
    extra = {} if solved is None else {"pass8": solved, "pass_samples": 8}
    return Entry(number, KEPT, Record(source, number, "", question or f"q{number}", (), (), "r", "a", extra=extra))


def test_prompts_are_those_that_are_solved_sometimes() -> None:
    found = [candidate(entry("a", k, solved)) for k, solved in enumerate((None, 0, 1, 7, 8))]
    assert [one.reason for one in found] == ["no_pass_count", "never_solved", "", "", "always_solved"]


def test_shares_give_exact_counts_and_no_source_more_than_it_has() -> None:
    shares = {"a": 45.0, "b": 36.0, "c": 19.0}
    assert apportioned(5200, shares) == {"a": 2340, "b": 1872, "c": 988}
    assert largest_mix({"a": 9000, "b": 9000, "c": 9000}, shares, 5200) == {"a": 2340, "b": 1872, "c": 988}
    assert largest_mix({"a": 9000, "b": 9000, "c": 190}, shares, 5200) == {"a": 451, "b": 361, "c": 190}
    assert sum(largest_mix({"a": 3, "b": 0}, {"a": 1.0, "b": 1.0}, 0).values()) <= 1
    for seed in range(50):
        coin = random.Random(seed)
        available = {name: coin.randrange(0, 400) for name in shares}
        found = largest_mix(available, shares, 0)
        assert all(found[name] <= available[name] for name in shares)
        more = apportioned(sum(found.values()) + 1, shares)
        assert any(more[name] > available[name] for name in shares)


def test_the_choice_is_seeded_and_a_prompt_is_taken_once() -> None:
    def chosen(seed: int) -> set[int]:
        selection = Selection(PromptSettings(count=20), seed, ["a"])
        entries = [entry("a", k, 3, f"q{k % 40}") for k in range(80)]
        for one in entries:
            selection.offer("a", one)
        assert selection.choose() == (20, {"a": 20})
        assert sum(selection.left_out("a", one) == "duplicate_prompt" for one in entries) == 40
        return {one.row for one in entries if not selection.left_out("a", one)}
    assert chosen(1) == chosen(1) != chosen(2) and len(chosen(1)) == 20
    with pytest.raises(ConfigError, match="shares names b; the sources are a"):
        Selection(PromptSettings(shares={"b": 1.0}), 1, ["a"])


class Counted:
    """Stage 2 with known counts: row k has k of 8 right; rows 5 and 6 wait until they are let through."""

    def __init__(self) -> None:
        self.open = False

    def run(self, records: Any) -> list[Outcome | Waits]:
        return [Waits("no verdicts") if record.row in (5, 6) and not self.open else
                Outcome(noted := record.noted(pass8=record.row % 9, pass_samples=8),
                        "solved_without_tools" if noted.extra["pass8"] == 8 else "") for record in records]


class Passed:
    def run(self, records: Any) -> list[Outcome | Waits]:
        return [Outcome(record) for record in records]


def test_the_job_writes_prompts_that_rl_reads_and_rows_that_waited_reach_the_later_stages(
        settings: DecontaminationSettings, known: Known, chat: ChatFormat, tmp_path: Path) -> None:
    """Rows 0 and 9: never solved; 8: always; 3: a benchmark's picture; 4: a picture of one colour; 5 and 6 wait once."""
    lines = []
    for k in range(10):
        shown = chart(0) if k == 3 else Image.new("RGB", (32, 32)) if k == 4 else photograph(7000 + k)
        (tmp_path / f"{k}.png").write_bytes(png(shown))
        lines.append({"images": [f"{k}.png"], "messages": [
            {"role": "user", "content": f"<image>What is it, {k}?"},
            {"role": "assistant", "content": '<reason>r</reason><tool_call>{"name": "python", "arguments": {"code": "1"}}'
             "</tool_call>"},
            {"role": "user", "content": "1"}, {"role": "assistant", "content": f"<answer>a{k}</answer>"}]})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = load_config(None, [
        f"curation.sources=[coldstart={tmp_path / 'rows.jsonl'}]", f"curation.out={tmp_path / 'out'}", "curation.chunk_rows=3",
        f"curation.decontamination.data={settings.data}", f"data.cache={tmp_path / 'cache'}",
        "curation.prompts.shares={coldstart: 1}", "curation.prompts.count=4"], environment={})
    counted, last = Counted(), Contamination(known, settings)

    def run() -> dict[str, Any]:
        job = Job(config, ["1", "2", "3", "4"])
        job.benchmarks = known.about
        return job.run({"1": Passed(), "2": counted, "3": Passed(), "4": last, "rl": last})

    first = run()["coldstart"]
    assert first["2"]["waiting"] == {"waits": 2} and first["4"]["in"] == 7 and first["rl"]["in"] == 8
    counted.open = True
    manifest = run()
    stages = manifest["coldstart"]
    assert stages["3"]["in"] == 9 and stages["4"]["dropped"] == {"benchmark_picture": 1}
    assert stages["4"]["overlaps"] == {"vstar": 1} and stages["4"]["overlap_unknown"] == {"image 1 is of one colour": 1}
    assert stages["rl"]["in"] == 10 and stages["rl"]["kept"] == 4 == manifest["about"]["rl"]["prompts"]
    assert stages["rl"]["dropped"] == {"never_solved": 2, "always_solved": 1, "benchmark_picture": 1, "beyond_its_share": 2}
    assert run() == manifest
    tasks = TaskStream([str(tmp_path / "out/rl.parquet")], chat, DataConfig(cache=str(tmp_path / "cache")), seed=1)
    assert not tasks.skipped and len(tasks) == 4
    for task in tasks.take(4):
        number = int(str(task.ground_truth).removeprefix("a"))
        assert number in (1, 2, 4, 5, 6, 7) and task.id == f"coldstart_{number}" and len(task.images) == 1
        assert task.messages[0]["role"] == "system" and "python" in task.messages[0]["content"]
        assert task.extra["pass8"] == number and task.extra["pass_samples"] == 8
    tasks.close()
    assert pq.read_schema(tmp_path / "out/rl.parquet").names[:6] == [
        "data_source", "prompt", "images", "ability", "reward_model", "extra_info"]
    page = write_report(tmp_path / "out").read_text()
    assert "4 prompts for RL" in page and "Benchmarks compared with" in page and "image 1 is of one colour 1" in page
    assert "vstar/0: image 1 is like its picture" in page and "no prompt for RL" in page
