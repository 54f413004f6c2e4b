"""Sources that record chats: DeepEyesV2, OpenMMReasoner, Metis-ColdStart, and our own demonstration rows.

Assistant turns alternate with observations (role user, tool or observation). Pictures belong to the image markers outside
assistant turns, in order; typed content parts become text with markers first.
"""
from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hdpo.agent.chat import IMAGE_MARKER
from hdpo.curation.dialects import observation_text, read_turn
from hdpo.curation.readers.pictures import pictures_of
from hdpo.curation.record import Observation, Record, Step, Unreadable
from hdpo.data.store import Row
from hdpo.text import valid

_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function": "tool", "function_call": "assistant"}


def deepeyes(row: Row, number: int, folders: Sequence[Path]) -> Record:
    """messages (role, content), images (paths below the unzipped folder)."""
    return _chat("deepeyes", row, number, folders, ("messages",))


def coldstart(row: Row, number: int, folders: Sequence[Path]) -> Record:
    """messages and images, or prompt and images: the published card names no columns."""
    return _chat("coldstart", row, number, folders, ("messages", "prompt", "conversations"))


def openmm(row: Row, number: int, folders: Sequence[Path]) -> Record:
    """messages whose content is a list of typed parts; pictures are paths inside them. It calls no tools."""
    return _chat("openmm", row, number, folders, ("messages",))


def demonstrations(row: Row, number: int, folders: Sequence[Path]) -> Record:
    """hdpo's own rows: messages, images. They keep the data_source that they have."""
    record = _chat("demonstrations", row, number, folders, ("messages",))
    named = row.get("data_source")
    return record.noted(data_source=valid(named, "row")) if isinstance(named, str) and named else record


def _chat(source: str, row: Row, number: int, folders: Sequence[Path], columns: Sequence[str]) -> Record:
    column = next((name for name in columns if row.get(name) is not None), None)
    if column is None:
        raise Unreadable("column_missing", f"none of the columns {', '.join(columns)}; there are {', '.join(row)}")
    messages, inline = _messages(row[column])
    images = pictures_of(inline if inline else row.get("images", row.get("image")), folders)
    if "prompt" == column and messages and messages[-1][0] != "assistant" and isinstance(row.get("response"), str):
        messages.append(("assistant", valid(row["response"], "row")))
    return to_record(source, number, messages, images, _truth(row))


def _truth(row: Row) -> str:
    model = row.get("reward_model")
    found = model.get("ground_truth") if isinstance(model, dict) else row.get("answer")
    return valid(found, "row") if isinstance(found, str) else ""


def _messages(value: Any) -> tuple[list[tuple[str, str]], list[Any]]:
    """([(role, text with markers)], pictures that stood in typed parts)."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise Unreadable("messages_unreadable", "the messages are neither a list nor JSON text") from None
    if not isinstance(value, list) or not value:
        raise Unreadable("messages_unreadable", "no messages")
    found: list[tuple[str, str]] = []
    inline: list[Any] = []
    for message in value:
        if not isinstance(message, dict):
            raise Unreadable("messages_unreadable", "a message is no object")
        role = message.get("role", message.get("from"))
        role = _ROLES.get(role, role) if isinstance(role, str) else None
        if role not in ("system", "user", "assistant", "tool"):
            raise Unreadable("role_unknown", f"a message has the role {role!r}")
        found.append((role, _text(message.get("content", message.get("value")), inline)))
    return found, inline


def _text(content: Any, inline: list[Any]) -> str:
    if isinstance(content, str):
        return valid(content, "row")
    if not isinstance(content, list):
        raise Unreadable("messages_unreadable", "a message's content is neither text nor a list of parts")
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append(valid(part["text"], "row"))
        elif kind in ("image_url", "image"):
            address = part.get("image_url", part.get("image"))
            inline.append(address.get("url") if isinstance(address, dict) and "url" in address else address)
            parts.append(IMAGE_MARKER)
        else:
            raise Unreadable("part_unknown", f"a content part of type {kind!r}")
    return "".join(parts)


def to_record(source: str, number: int, messages: Sequence[tuple[str, str]], images: Sequence[bytes], truth: str) -> Record:
    """A chat as a Record. Raises Unreadable for a conversation of any other shape."""
    messages, system = list(messages), ""
    while messages and messages[0][0] == "system":
        system = f"{system}\n\n{messages.pop(0)[1]}".strip()
    if not messages or messages[0][0] != "user":
        raise Unreadable("no_question", "the conversation does not begin with a user")
    question, turns = messages[0][1], messages[1:]
    if not turns or any((role == "assistant") != (place % 2 == 0) for place, (role, _) in enumerate(turns)):
        raise Unreadable("turns_do_not_alternate", "assistant turns must alternate with observations")
    if len(turns) % 2 == 0:
        raise Unreadable("no_answer", "the conversation ends with an observation")
    left = list(images)

    def take(count: int) -> tuple[bytes, ...]:
        if count > len(left):
            raise Unreadable("images_do_not_fit_markers", f"more image markers than the {len(images)} images")
        taken, left[:count] = tuple(left[:count]), []
        return taken

    if source == "demonstrations" or IMAGE_MARKER in question or not images:
        shown = take(question.count(IMAGE_MARKER))
    else:                        # a source that leaves the marker out
        observed = sum(text.count(IMAGE_MARKER) for role, text in turns if role != "assistant")
        shown = take(len(images) - observed) if observed < len(images) else ()
        question = IMAGE_MARKER * len(shown) + "\n" + question if shown else question
    steps: list[Step] = []
    for place in range(0, len(turns) - 1, 2):
        turn = read_turn(turns[place][1])
        if turn.call is None:
            raise Unreadable("turn_without_call", "an assistant turn before the last calls nothing")
        text, markers = observation_text(turns[place + 1][1])
        steps.append(Step(turn.reasoning, turn.call, Observation(text, take(markers))))
    final = read_turn(turns[-1][1])
    if final.answer is None:
        raise Unreadable("no_answer", "the last assistant turn calls a tool")
    if left:
        raise Unreadable("images_do_not_fit_markers", f"{len(left)} of {len(images)} images have no marker")
    return Record(source, number, system, question, shown, tuple(steps), final.reasoning, final.answer, truth)
