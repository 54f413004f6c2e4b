"""Sources that record chats: DeepEyesV2, OpenMMReasoner, Metis-ColdStart, and our own demonstration rows.

Assistant turns alternate with observations (role user, tool or observation). Pictures belong to the image markers outside
assistant turns, in order; typed content parts become text with markers first.
"""
from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hdpo.agent.chat import IMAGE_MARKER
from hdpo.curation.dialects import observation_text, read_turn
from hdpo.curation.readers.pictures import pictures_of
from hdpo.curation.readers.truths import truth_of
from hdpo.curation.record import Observation, Record, Step, Unreadable, row_text, trainable
from hdpo.data.store import Row
from hdpo.text import valid

_NESTED = 3                # JSON text inside of JSON text
_KINDS = {"text": "text", "input_text": "text", "output_text": "text", "image": "image", "image_url": "image",
          "input_image": "image"}
"""Types of content parts, and what they are."""
_PICTURES = ("image_url", "image", "url", "path", "bytes")
"""Where a part may hold its picture."""
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
    response = row.get("response") if column == "prompt" else None
    asked = row[column]
    if isinstance(response, str) and isinstance(asked, str) and not asked.lstrip().startswith(("[", "{")):
        asked = [{"role": "user", "content": asked}]
    messages, own = _messages(asked)
    given = pictures_of(row.get("images", row.get("image")), folders)
    if isinstance(response, str) and messages and messages[-1][0] != "assistant":
        messages.append(("assistant", row_text(response)))
    images = _in_order(messages, own, given, folders) if own else given
    return to_record(source, number, messages, images, _truth(row))


def _in_order(messages: Sequence[tuple[str, str]], own: Mapping[int, Any], given: Sequence[bytes],
              folders: Sequence[Path]) -> tuple[bytes, ...]:
    """The pictures in the order of their markers: a content part's own, and for other markers the row's."""
    left = list(given)
    found: list[bytes] = []
    for marker in range(sum(text.count(IMAGE_MARKER) for role, text in messages if role != "assistant")):
        if marker in own:
            found += pictures_of([own[marker]], folders)
        elif left:
            found.append(left.pop(0))
        else:
            raise Unreadable("images_do_not_fit_markers", f"more image markers than the {len(own) + len(given)} images")
    return (*found, *left)


def _truth(row: Row) -> str:
    model = _parsed(row.get("reward_model"))
    return truth_of(model.get("ground_truth") if isinstance(model, dict) else row.get("answer"))


def _parsed(value: Any) -> Any:
    """JSON text of a list or an object, also of such text, as what it says; anything else as it is."""
    for _ in range(_NESTED):
        if not isinstance(value, str) or not value.lstrip().startswith(("[", "{", '"')):
            break
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            break
    return value


def _messages(value: Any) -> tuple[list[tuple[str, str]], dict[int, Any]]:
    """([(role, text with markers)], by number of its marker a picture that stands in a content part)."""
    value = _parsed(value)
    if isinstance(value, str):
        raise Unreadable("messages_unreadable", "the messages are neither a list nor JSON text")
    if isinstance(value, dict) and value and all(isinstance(part, list) for part in value.values()):
        value = [dict(zip(value, parts)) for parts in zip(*value.values())]      # a table of columns, as `datasets` has it
    if not isinstance(value, list) or not value:
        raise Unreadable("messages_unreadable", "no messages")
    found: list[tuple[str, str]] = []
    own: dict[int, Any] = {}
    markers = 0
    for message in value:
        if not isinstance(message, dict):
            raise Unreadable("messages_unreadable", "a message is no object")
        named = message.get("role", message.get("from"))
        role = named.strip().lower() if isinstance(named, str) else ""
        role = _ROLES.get(role, role)
        if role not in ("system", "user", "assistant", "tool"):
            raise Unreadable("role_unknown", f"a message has the role {named!r}")
        text, inside = _text(message.get("content", message.get("value")))
        if role == "assistant":
            if inside:
                raise Unreadable("picture_in_a_turn", "an assistant turn holds a picture")
        else:
            own |= {markers + place: picture for place, picture in inside.items()}
            markers += text.count(IMAGE_MARKER)
        found.append((role, text))
    return found, own


def _text(content: Any) -> tuple[str, dict[int, Any]]:
    """(text with markers, pictures by the number of their marker in it)."""
    if isinstance(content, str):
        parts = _parsed(content) if '"type"' in content else None
        if not isinstance(parts, list) or not all(isinstance(part, dict) and _kind(part) for part in parts):
            return row_text(content), {}
        content = parts
    if isinstance(content, dict):
        content = [content]
    if not isinstance(content, list):
        raise Unreadable("messages_unreadable", "a message's content is neither text nor a list of parts")
    text = ""
    pictures: dict[int, Any] = {}
    for part in content:
        part = {"text": part} if isinstance(part, str) else part
        kind = _kind(part) if isinstance(part, dict) else ""
        if kind == "text" and isinstance(part.get("text"), str):
            text += row_text(part["text"])
        elif kind == "image":
            picture = next((part[name] for name in _PICTURES if part.get(name) is not None), None)
            if picture is not None:      # otherwise its place, and the picture is the row's
                pictures[text.count(IMAGE_MARKER)] = picture
            text += IMAGE_MARKER
        else:
            shown = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise Unreadable("part_unknown", f"a content part of type {shown!r}")
    return text, pictures


def _kind(part: Mapping[str, Any]) -> str:
    """text or image; "" for any other part. One without a type is text."""
    kind = part.get("type")
    return "text" if kind is None else _KINDS.get(kind, "") if isinstance(kind, str) else ""


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
    if not question.strip():
        raise Unreadable("no_question", "the question is empty")
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
    return trainable(Record(source, number, system, question, shown, tuple(steps), final.reasoning, final.answer, truth))
