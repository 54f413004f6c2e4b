"""Sources that record one long assistant string: Thyme-SFT and V-Interaction-400K.

Code, its `<sandbox_output>` and the answer stand in it; it is split into turns. Code reads and writes files under the author's
paths, which are rewritten to the session's.
"""
from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hdpo.agent.chat import IMAGE_MARKER
from hdpo.agent.parse import ParsedCall
from hdpo.curation.dialects import Turn, observation_text, split_text
from hdpo.curation.paths import rewrite
from hdpo.curation.readers.pictures import pictures_of
from hdpo.curation.readers.truths import truth_of
from hdpo.curation.record import Observation, Record, Step, Unreadable, row_text, trainable
from hdpo.data.store import Row

_USER_PATH = re.compile(r"User Image Path:?\**:?\s*[\"'`]?([^\"'`\n]+?)[\"'`]?\s*$", re.MULTILINE)
_USER_LINES = re.compile(r"^[#*\s]*User Image (?:Path|Size)\b.*$\n?", re.MULTILINE)


def thyme(row: Row, number: int, folders: Sequence[Path]) -> Record:
    """image (base64 strings, empty for text), question, response. The question names the author's path of the picture."""
    question, response = _text(row, "question"), _text(row, "response")
    images = pictures_of(row.get("image", row.get("images")), folders)
    turns = split_text(response)
    recorded = sum(observation_text(turn.observation)[1] for turn in turns)
    shown = len(images) - recorded
    if shown < 0:
        raise Unreadable("images_do_not_fit_markers", f"{recorded} pictures in outputs, {len(images)} images in the row")
    paths = [path.strip() for path in _USER_PATH.findall(question)][:shown]
    question = _marked(_USER_LINES.sub("", question).strip(), shown)
    return _record("thyme", number, question, images[:shown], images[shown:], turns, paths, "")


def v_interaction(row: Row, number: int, folders: Sequence[Path]) -> Record:
    """question, image, edited_image, CoT_with_code, answer: the edited picture is what the code shows."""
    question, response = _text(row, "question"), _text(row, "CoT_with_code")
    images = pictures_of(row.get("image"), folders)
    turns = split_text(response)
    recorded = sum(observation_text(turn.observation)[1] for turn in turns)
    edited = pictures_of(row.get("edited_image"), folders) if recorded else ()
    if recorded > len(edited):
        raise Unreadable("images_do_not_fit_markers", f"{recorded} pictures in outputs, {len(edited)} edited images in the row")
    return _record("v_interaction", number, _marked(question, len(images)), images, edited, turns, [],
                   truth_of(row.get("answer")))


def _text(row: Row, column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        raise Unreadable("column_missing", f"column {column} is missing or empty; there are {', '.join(row)}")
    return row_text(value)


def _marked(question: str, images: int) -> str:
    markers = question.count(IMAGE_MARKER)
    if markers and markers != images:
        raise Unreadable("images_do_not_fit_markers", f"{markers} image markers in the question for {images} images")
    return question if markers or not images else IMAGE_MARKER * images + "\n" + question


def _record(source: str, number: int, question: str, images: tuple[bytes, ...], outputs: tuple[bytes, ...],
            turns: Sequence[Turn], paths: Sequence[str], truth: str) -> Record:
    steps, left = [], list(outputs)
    for turn in turns[:-1]:
        text, markers = observation_text(turn.observation)
        shown, left = tuple(left[:markers]), left[markers:]
        assert turn.call is not None
        call = turn.call
        if call.name == "python":
            call = ParsedCall("python", {"code": rewrite(call.arguments["code"], paths, len(images), bool(shown))})
        steps.append(Step(turn.reasoning, call, Observation(text, shown)))
    final = turns[-1]
    assert final.answer is not None
    record = trainable(Record(source, number, "", question, images, tuple(steps), final.reasoning, final.answer, truth))
    return replace(record, extra={"author_paths": list(paths)}) if paths else record
