"""One trajectory of any source in one shape, and what a stage says of it."""
from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any

from hdpo.agent.chat import IMAGE_MARKER
from hdpo.agent.parse import TOOL_CALL_CLOSE, TOOL_CALL_OPEN, ParsedCall
from hdpo.text import valid
from hdpo.types import Task


class Unreadable(Exception):
    """A row that no sensible reading fits. `reason` is counted, the message shown."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail or reason.replace("_", " ")

    def __str__(self) -> str:
        return self.detail


@dataclass(frozen=True, slots=True)
class Observation:
    """What a call answered: text without image markers, and encoded pictures that follow it."""

    text: str
    images: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Step:
    """One assistant turn that ends in a call. `reasoning` has no tags."""

    reasoning: str
    call: ParsedCall
    observation: Observation


@dataclass(frozen=True, slots=True)
class Record:
    """A recorded trajectory. `question` holds one image marker per entry of `images`, encoded files at original size.

    Example: Record("thyme", 7, "", "<image>What does the sign say?", (b"..",), (Step(..),), "It says MILL.", "MILL")
    """

    source: str
    row: int
    system: str
    question: str
    images: tuple[bytes, ...]
    steps: tuple[Step, ...]
    reasoning: str
    answer: str
    truth: str = ""                                    # the source's own answer; empty: the trajectory's
    extra: dict[str, Any] = field(default_factory=dict)   # what stages found: pass8, scores, reply

    def messages(self) -> list[dict[str, str]]:
        """The conversation in the policy's own dialect; all pictures in order are `all_images`."""
        turns = [("system", self.system)] * bool(self.system) + [("user", self.question)]
        for step in self.steps:
            call = json.dumps({"name": step.call.name, "arguments": step.call.arguments}, ensure_ascii=False)
            call = call.replace(TOOL_CALL_CLOSE, TOOL_CALL_CLOSE.replace("/", "\\/"))      # inside the code: JSON's own escape
            turns.append(("assistant", f"{_reason(step.reasoning)}{TOOL_CALL_OPEN}{call}{TOOL_CALL_CLOSE}"))
            turns.append(("user", step.observation.text + IMAGE_MARKER * len(step.observation.images)))
        turns.append(("assistant", f"{_reason(self.reasoning)}<answer>{self.answer}</answer>"))
        return [{"role": role, "content": content} for role, content in turns]

    def all_images(self) -> tuple[bytes, ...]:
        return self.images + tuple(image for step in self.steps for image in step.observation.images)

    def task(self, system: str | None = None) -> Task:
        """The question alone. `system` replaces the recorded system message."""
        system = self.system if system is None else system
        messages = [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": self.question}]
        return Task(f"{self.source}_{self.row}", self.source, messages, self.images, self.truth or self.answer)

    def noted(self, **found: Any) -> Record:
        return replace(self, extra={**self.extra, **found})


def trainable(record: Record) -> Record:
    """The record, whose turns and markers are what training reads. Raises Unreadable."""
    markers = 0
    for message in record.messages():
        if message["role"] != "assistant":
            markers += message["content"].count(IMAGE_MARKER)
        elif message["content"].removesuffix(TOOL_CALL_CLOSE).count(TOOL_CALL_CLOSE):
            raise Unreadable("tag_in_text", f"{TOOL_CALL_CLOSE} stands inside an assistant's text")
    if markers != len(record.all_images()):
        raise Unreadable("images_do_not_fit_markers", f"{markers} image markers, {len(record.all_images())} images")
    return record


def row_text(value: str) -> str:
    """A row's text: valid Unicode, with line ends as they are everywhere else."""
    return valid(value, "row").replace("\r\n", "\n")


def _reason(text: str) -> str:
    return f"<reason>{text}</reason>\n" if text else ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a stage says: kept (reason ""), or dropped for a reason. `record` may be changed by a stage that keeps it."""

    record: Record
    reason: str = ""
    detail: str = ""


class Waits(Exception):
    """Nothing could be said because something of ours failed: the row is neither kept nor dropped, and tried again."""
