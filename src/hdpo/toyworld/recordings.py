"""The embedded world as public trajectory data: the layouts of five sources, with faults planted and known.

What a curation must find is what was planted: code that fails, a recorded output that the code doesn't give, a recorded
picture that it doesn't show, a call that can't be read, a broken picture, reasoning that contradicts the picture.
"""
from __future__ import annotations

import base64
import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from hdpo.toyworld.families import Puzzle, png
from hdpo.toyworld.world import draw_puzzles

FAULTS = ("code_fails", "wrong_output", "wrong_picture", "malformed_call", "broken_image", "no_answer", "absurd")
"""Planted in turn, each in every `EVERY`-th row; absurd ones are for the judge, the others for reading and stage 1."""
NO_TOOL_FAULTS = ("malformed_call", "broken_image", "no_answer", "absurd")
"""Those of a source that records no tools."""

EVERY = 3
CODE = re.compile(r'"code": (".*")\}\}</tool_call>', re.DOTALL)
EXPECTED = {"code_fails": {"execution_failed"}, "wrong_output": {"observation_mismatch"},
            "wrong_picture": {"observation_mismatch"}, "malformed_call": {"call_malformed", "call_not_closed"},
            "broken_image": {"image_broken"}, "no_answer": {"no_answer"}}
"""Fault -> the reasons under which reading or stage 1 must find it."""


@dataclass(frozen=True, slots=True)
class Recording:
    """One source's file and, by row, the fault planted there ("" for none) and the puzzle."""

    source: str
    file: Path
    faults: tuple[str, ...]
    puzzles: tuple[Puzzle, ...]


@dataclass(frozen=True, slots=True)
class _Told:
    """A puzzle as somebody recorded it: with its fault in it."""

    question: str                 # without markers
    images: tuple[bytes, ...]
    thought: str
    code: str
    stdout: str
    shown: tuple[bytes, ...]
    conclusion: str
    answer: str | None


def _tell(puzzle: Puzzle, fault: str) -> _Told:
    found = CODE.search(puzzle.call)
    code = json.loads(found[1]) if found else "print(0)"
    stdout = re.search(r"stdout:\n```\n(.*?)\n```", puzzle.observation, re.DOTALL)
    told: dict[str, Any] = {
        "question": puzzle.question.replace("<image>", "").strip(), "images": puzzle.images, "thought": puzzle.tool_reason,
        "code": code, "stdout": stdout[1] if stdout else "", "shown": puzzle.observation_images, "conclusion": "That settles it.",
        "answer": puzzle.answer}
    if fault == "code_fails":
        told["code"] = "value = undefined_name + 1\n" + code
    elif fault == "wrong_output":
        told["stdout"] = str(told["stdout"]) + "\n4711"
    elif fault == "wrong_picture" and puzzle.observation_images:
        told["shown"] = (png(Image.new("RGB", (64, 64), (255, 0, 0))),)
    elif fault == "wrong_picture":
        told["shown"] = (png(Image.new("RGB", (64, 64), (0, 0, 255))),)
    elif fault == "broken_image" and puzzle.images:
        told["images"] = (puzzle.images[0][:-40], *puzzle.images[1:])
    elif fault == "no_answer":
        told["answer"] = None
    elif fault == "absurd":
        told["thought"] = "ABSURD: the picture shows a volcano made of cheese."
        told["conclusion"] = "ABSURD: so it must be cheese."
    return _Told(**told)


def _answer(told: _Told) -> str:
    return f"<answer>{told.answer}</answer>" if told.answer is not None else "I am not sure."


def _code_block(told: _Told, fault: str) -> str:
    return f"<code>\n```python\n{told.code}\n```\n" + ("" if fault == "malformed_call" else "</code>")


def _deepeyes(told: _Told, fault: str, folder: Path, number: int) -> dict[str, Any]:
    (folder / "images").mkdir(exist_ok=True)
    names = []
    for place, data in enumerate((*told.images, *told.shown)):
        names.append(f"images/{number}_{place}.png")
        (folder / names[-1]).write_bytes(data)
    observation = f"Code execution result:\nstdout:\n```\n{told.stdout}\n\n```\n\nstderr:\n```\n\n```"
    observation += "\n\nImages:\n" + "<image>" * len(told.shown) if told.shown else ""
    return {"messages": [
        {"role": "system", "content": "You may write python."},
        {"role": "user", "content": "<image>\n" * len(told.images) + told.question},
        {"role": "assistant", "content": f"<think>{told.thought}</think>\n{_code_block(told, fault)}"},
        {"role": "user", "content": observation},
        {"role": "assistant", "content": f"<think>{told.conclusion}</think>\n{_answer(told)}"}], "images": names}


def _long_string(told: _Told, fault: str) -> str:
    output = told.stdout + ("\n" if told.stdout and told.shown else "") + "<image>" * len(told.shown)
    return (f"<think>{told.thought}\n{_code_block(told, fault)}\n<sandbox_output>{output}</sandbox_output>\n"
            f"{told.conclusion}</think>\n{_answer(told)}")


def _thyme(told: _Told, fault: str, folder: Path, number: int) -> dict[str, Any]:
    path = f"/data/author/{number}.jpg"
    where = f'\n### User Image Path:** "{path}"\n### User Image Size:** "256x256"' if told.images else ""
    opened = f'__import__("PIL.Image").Image.open("{path}").convert("RGB").'
    told = replace(told, code=told.code.replace("image_1.", opened) if told.images else told.code)
    return {"image": [base64.b64encode(data).decode() for data in (*told.images, *told.shown)],
            "question": "<image>\n" * len(told.images) + told.question + where, "response": _long_string(told, fault)}


def _v_interaction(told: _Told, fault: str, folder: Path, number: int) -> dict[str, Any]:
    return {"id": f"vi_{number}", "question": told.question, "image": {"bytes": told.images[0]} if told.images else None,
            "edited_image": {"bytes": told.shown[0]} if told.shown else None, "tool_code": told.code,
            "CoT_with_code": _long_string(told, fault), "answer": told.answer}


def _openmm(told: _Told, fault: str, folder: Path, number: int) -> dict[str, Any]:
    urls = []
    for place, data in enumerate(told.images):
        (folder / "images").mkdir(exist_ok=True)
        urls.append(f"images/mm_{number}_{place}.png")
        (folder / urls[-1]).write_bytes(data)
    end = "<tool_call>{" if fault == "malformed_call" else _answer(told)
    return {"id": f"mm_{number}", "messages": [
        {"role": "user", "content": [*({"type": "image_url", "image_url": {"url": url}} for url in urls),
                                     {"type": "text", "text": told.question}]},
        {"role": "assistant", "content": [{"type": "text", "text": f"<think>{told.thought}</think>{end}"}]}]}


def _coldstart(told: _Told, fault: str, folder: Path, number: int) -> dict[str, Any]:
    call = json.dumps({"name": "python", "arguments": {"code": told.code}})
    call = call[:-2] if fault == "malformed_call" else call
    streams = f"stdout:\n```\n{told.stdout}\n```\n\nstderr:\n```\n\n```"
    return {"messages": [
        {"role": "user", "content": "<image>" * len(told.images) + told.question},
        {"role": "assistant", "content": f"<reason>{told.thought}</reason>\n<tool_call>{call}</tool_call>"},
        {"role": "user", "content": f"Code execution result:\n{streams}" + "<image>" * len(told.shown)},
        {"role": "assistant", "content": f"<reason>{told.conclusion}</reason>\n{_answer(told)}"}],
        "images": [{"bytes": data} for data in (*told.images, *told.shown)]}


Writer = Callable[[_Told, str, Path, int], dict[str, Any]]
SOURCES: dict[str, tuple[Writer, str]] = {
    "deepeyes": (_deepeyes, "sft_part_0.json"), "thyme": (_thyme, "single_round.parquet"),
    "v_interaction": (_v_interaction, "train_part1.parquet"), "openmm": (_openmm, "wemath.jsonl"),
    "coldstart": (_coldstart, "coldstart.parquet")}


def _suits(puzzle: Puzzle, fault: str) -> bool:
    """Rows are of the Python families; a fault in a picture needs one."""
    python = '"name": "python"' in puzzle.call
    return python and (bool(puzzle.images) or fault not in ("wrong_picture", "broken_image"))


def faults_of(source: str, rows: int) -> list[str]:
    """In every third row a fault, each kind in turn."""
    kinds = [fault for fault in FAULTS if source != "openmm" or fault in NO_TOOL_FAULTS]
    return [kinds[number // EVERY % len(kinds)] if number % EVERY == EVERY - 1 else "" for number in range(rows)]


def draw(seed: int, count: int) -> list[Puzzle]:
    """Puzzles of the families that call Python, some `count` of them, in seeded order."""
    puzzles = [puzzle for puzzle in draw_puzzles(seed, "demos", count) if _suits(puzzle, "")]
    random.Random(f"recordings {seed}").shuffle(puzzles)
    return puzzles


def record(folder: Path, source: str, puzzles: Sequence[Puzzle], faults: Sequence[str],
           suits: Callable[[Puzzle, str], bool] = lambda puzzle, fault: True) -> Recording:
    """A row for each of `faults`, written into `folder`: of the puzzles that are left the first that it can be planted in, and
    that `suits`."""
    folder.mkdir(parents=True, exist_ok=True)
    writer, name = SOURCES[source]
    left, taken = list(puzzles), []
    for fault in faults:
        taken.append(left.pop(next(place for place, puzzle in enumerate(left) if _suits(puzzle, fault) and suits(puzzle, fault))))
    _write(folder / name, [writer(_tell(puzzle, fault), fault, folder, number)
                           for number, (puzzle, fault) in enumerate(zip(taken, faults, strict=True))])
    return Recording(source, folder / name, tuple(faults), tuple(taken))


def write_recordings(folder: Path, seed: int, rows: int, sources: Sequence[str] = tuple(SOURCES)) -> list[Recording]:
    """`rows` rows of each source with their faults, written into `folder`."""
    return [record(folder, source, draw(seed + number, 8 * rows), faults_of(source, rows))
            for number, source in enumerate(sources)]


def _write(file: Path, lines: Sequence[dict[str, Any]]) -> None:
    if file.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq
        pq.write_table(pa.Table.from_pylist(list(lines)), file)
    elif file.suffix == ".json":
        file.write_text(json.dumps(list(lines)))
    else:
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
