"""Text of sampled turns -> tool call, answer, format verdict. Pure strings; no library.

The trainer and the tool server both import this file, so both sides read a call the same way. The wire format and the
tags are those of the Metis reference; where its rule can be gamed or crashes, the stricter reading is noted in place.
"""
from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from hdpo.text import valid, valid_tree

TOOL_CALL_OPEN, TOOL_CALL_CLOSE = "<tool_call>", "</tool_call>"

EXAMPLES = {
    "python": '<tool_call>{"name": "python", "arguments": {"code": "print(1 + 1)"}}</tool_call>',
    "text_search": '<tool_call>{"name": "text_search", "arguments": {"query": "height of Mount Fuji"}}</tool_call>',
    "image_search": '<tool_call>{"name": "image_search", "arguments": {}}</tool_call>',
}
"""One correct call per tool, shown to the model when it gets one wrong."""

TOOL_NAMES = tuple(EXAMPLES)
_ALIASES = {"search": "text_search"}

_CALL = re.compile(r"<tool_call>((?:(?!<tool_call>).)*?)</tool_call>", re.DOTALL)


@dataclass(frozen=True, slots=True)
class ParsedCall:
    """A well-formed call: `name` is one of TOOL_NAMES, and `arguments` holds exactly the keys that tool takes; or an own tool's,
    whose arguments are an object of any kind."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class MalformedCall:
    """Why the text holds no usable call, in words meant for the model."""

    message: str


def parse_tool_call(text: str, tools: Sequence[str] = TOOL_NAMES,
                    own: Mapping[str, str] = MappingProxyType({})) -> ParsedCall | MalformedCall:
    """Read the last `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` of `text`.

    python takes {"code": str}; text_search (alias: search) takes {"query": str, or a list whose first item is used};
    image_search takes optionally {"image": number from 1, "box": [left, top, right, bottom] in pixels of that image}, the
    part of it to search for. Further argument keys are ignored. Never raises. `tools` are those on offer: what is said
    about a malformed call names no other. A well-formed call of another tool is returned, for the caller to refuse. `own` are
    the user's tools, each with a correct call of it.
    """
    known = {**EXAMPLES, **own}
    example = known[next((name for name in known if name in tools), "python")]
    blocks = _CALL.findall(text)
    if not blocks:
        return _malformed("no <tool_call>...</tool_call> block was found", example)
    try:
        # strict=False: models write real line breaks inside the code string; the meaning is plain, so accept them
        call = json.loads(blocks[-1], strict=False)
    except (ValueError, RecursionError) as exc:
        reason = exc.msg if isinstance(exc, json.JSONDecodeError) else "it can't be read"
        return _malformed(f"the text between the tags is not valid JSON ({reason})", example)
    if not isinstance(call, dict):
        return _malformed("the JSON between the tags must be an object with the keys name and arguments", example)
    name = call.get("name")
    name = _ALIASES.get(name, name) if isinstance(name, str) else name
    if not isinstance(name, str) or name not in known:
        shown = json.dumps(name)[:80]
        return _malformed(f"name is {shown}, but the tools are {', '.join(tools)}", example)
    arguments = call.get("arguments", {})
    if not isinstance(arguments, dict):
        return _malformed(f"the arguments of {name} must be a JSON object", known[name] if name in tools else example)
    if name in own:
        try:
            return ParsedCall(name, valid_tree(arguments, "call"))
        except RecursionError:
            return _malformed(f"the arguments of {name} are nested too deeply", own[name])
    return _checked(name, arguments)


def _checked(name: str, arguments: dict[str, Any]) -> ParsedCall | MalformedCall:
    if name == "image_search":
        return _checked_region(arguments)
    key = "code" if name == "python" else "query"
    value = arguments.get(key)
    if key == "query" and isinstance(value, list) and value:
        value = value[0]
    if key == "query" and isinstance(value, str) and not value.strip():
        return MalformedCall("Error: Search query is empty.")      # the reference's words
    if not isinstance(value, str) or not value.strip():
        return _malformed(f'the arguments of {name} must hold "{key}", a non-empty string', EXAMPLES[name])
    return ParsedCall(name, {key: valid(value, "call")})   # JSON escapes can spell half a surrogate pair


def _checked_region(arguments: dict[str, Any]) -> ParsedCall | MalformedCall:
    name = "image_search"
    chosen = {key: arguments[key] for key in ("image", "box") if arguments.get(key) is not None}
    if "image" in chosen and (type(chosen["image"]) is not int or chosen["image"] < 1):
        return _malformed(f'"image" of {name} must be a number from 1', EXAMPLES[name])
    if "box" in chosen:
        box = chosen["box"]
        if not isinstance(box, list) or len(box) != 4 or not all(type(side) in (int, float) and abs(side) < 1e6 for side in box):
            return _malformed(f'"box" of {name} must be four numbers, [left, top, right, bottom] in pixels', EXAMPLES[name])
        if box[0] >= box[2] or box[1] >= box[3]:
            return _malformed(f'"box" of {name} is empty: left must be below right, and top below bottom', EXAMPLES[name])
    return ParsedCall(name, chosen)


def _malformed(problem: str, example: str) -> MalformedCall:
    return MalformedCall(call_error(problem, example))


def call_error(problem: str, example: str) -> str:
    """What the model is told of a call that can't be carried out."""
    return f"Tool call error: {problem}. A correct call looks like this: {example}"


def extract_answer(final_turn: str) -> str | None:
    """The stripped text of the last well-formed <answer>...</answer> of the final SAMPLED turn; None if there is none.

    An empty answer is "". The reference takes the first tag of the whole response, tool output included, so that a
    printed or quoted tag could set the answer.
    """
    # not a pattern: every answer of a step passes here
    opening, closing = "<answer>", "</answer>"
    start = final_turn.rfind(opening, 0, max(0, final_turn.rfind(closing)))
    if start < 0:
        return None
    start += len(opening)
    return final_turn[start:final_turn.find(closing, start)].strip()


def format_ok(turns: Sequence[str]) -> bool:
    """The reference's format rule on sampled turns only: reason and tool_call tags balance over all turns, and the
    final turn holds, after its last </reason>, at least one answer with balanced tags. A <reason> is not required.

    Stricter than counting: a closing tag before its opening tag does not pass.
    """
    if not turns:
        return False
    text = "\n".join(turns)
    tail = turns[-1].rpartition("</reason>")[2]
    return (_balanced(text, "reason") and _balanced(text, "tool_call")
            and _balanced(tail, "answer") and "<answer>" in tail)


def _balanced(text: str, tag: str) -> bool:
    depth = 0
    if f"{tag}>" not in text:
        return True
    for match in re.finditer(f"<(/?){tag}>", text):
        depth += -1 if match.group(1) else 1
        if depth < 0:
            return False
    return depth == 0
