"""The dialects of recorded tool trajectories -> reasoning, calls and answers. Pure text.

    <think>..</think> or <reason>..</reason>            reasoning, also around everything else
    <code>```python .. ```</code>                       a python call
    <tool_call>{"name": .., "arguments": ..}</tool_call>   any call
    <sandbox_output>..</sandbox_output>                 the observation, inside one long assistant string
    <answer>..</answer>                                 the end

A turn holds one call, at its end. Raises Unreadable, with a reason to be counted, for anything else.
"""
from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

from hdpo.agent.chat import IMAGE_MARKER
from hdpo.agent.parse import TOOL_CALL_CLOSE, TOOL_CALL_OPEN, MalformedCall, ParsedCall, extract_answer, parse_tool_call
from hdpo.curation.record import Unreadable

_BLOCK = re.compile(r"<code>.*?</code>|<tool_call>.*?</tool_call>", re.DOTALL)
_OPEN = re.compile(r"<(code|tool_call|sandbox_output)>")
_FENCE = re.compile(r"\A\s*```[ \t]*(?:python3?|py)?[ \t]*\r?\n(.*?)\r?\n?```\s*\Z", re.DOTALL | re.IGNORECASE)
_OUTPUT = re.compile(r"\s*<sandbox_output>(.*?)</sandbox_output>", re.DOTALL)
_RESPONSE = re.compile(r"\A\s*<tool_response>(.*?)</tool_response>\s*\Z", re.DOTALL)
_THOUGHT = re.compile(r"</?(?:think|reason|reasoning)>")
_ENDS = re.compile(r"(?:\s*<\|(?:im_end|endoftext)\|>)+\s*\Z")
_JSON_FENCE = re.compile(r"\A\s*```[ \t]*(?:json)?[ \t]*\r?\n(.*?)\r?\n?```\s*\Z", re.DOTALL | re.IGNORECASE)
_ANSWER = re.compile(r"<answer>.*?</answer>", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Turn:
    """An assistant turn: a call, or an answer. `images`: markers in `observation`, which only a long string holds itself."""

    reasoning: str
    call: ParsedCall | None
    answer: str | None
    observation: str = ""


def read_turn(text: str) -> Turn:
    """One assistant message of a chat."""
    text = _ENDS.sub("", text)
    blocks = list(_BLOCK.finditer(text))
    if not blocks:
        if _OPEN.search(text):
            raise Unreadable("call_not_closed", f"no closing tag for {_OPEN.search(text)[0]}")      # type: ignore[index]
        return _final(text)
    if len(blocks) > 1:
        raise Unreadable("several_calls_in_a_turn", f"{len(blocks)} calls in one assistant turn")
    after = _THOUGHT.sub("", text[blocks[0].end():]).strip()
    if after:
        raise Unreadable("text_behind_a_call", f"an assistant turn goes on behind its call: {after[:80]!r}")
    return Turn(_thought(text[:blocks[0].start()]), read_call(blocks[0][0]), None)


def split_text(text: str) -> list[Turn]:
    """One assistant string that holds calls and their observations: turns with observations, and the final one."""
    turns, start = [], 0
    for block in _blocks_outside_outputs(text):
        output = _OUTPUT.match(text, block.end())
        if output is None:
            raise Unreadable("call_without_output", "no <sandbox_output> behind a call")
        turns.append(Turn(_thought(text[start:block.start()]), read_call(block[0]), None, output[1].strip()))
        start = output.end()
    rest = text[start:]
    if stray := _OPEN.search(rest):
        raise Unreadable("call_not_closed" if stray[1] != "sandbox_output" else "output_without_call", f"stray {stray[0]}")
    return [*turns, _final(rest)]


def _blocks_outside_outputs(text: str) -> Iterator[re.Match[str]]:
    position = 0
    while (block := _BLOCK.search(text, position)) is not None:
        yield block
        output = _OUTPUT.match(text, block.end())
        position = output.end() if output else block.end()


def _final(text: str) -> Turn:
    answer = extract_answer(text)
    if answer is None:
        raise Unreadable("no_answer", "the last assistant turn has no <answer>")
    if not answer:
        raise Unreadable("no_answer", "the <answer> is empty")
    return Turn(_thought(_ANSWER.sub("", text)), None, answer)


def _thought(text: str) -> str:
    return _THOUGHT.sub("", text).strip()


def read_call(block: str) -> ParsedCall:
    """`<code>` or `<tool_call>` block -> call. Raises Unreadable."""
    if block.startswith("<code>"):
        inner = block.removeprefix("<code>").removesuffix("</code>")
        fence = _FENCE.match(inner)
        code = (fence[1] if fence else inner).strip("\n")
        if not code.strip():
            raise Unreadable("empty_code", "a <code> block without code")
        if "```" in code and not fence:
            raise Unreadable("odd_code_fence", "a <code> block with a fence that does not enclose it")
        return ParsedCall("python", {"code": code})
    call = parse_tool_call(_plain_call(block))
    if isinstance(call, MalformedCall):
        raise Unreadable("call_malformed", call.message)
    return call


def _plain_call(block: str) -> str:
    """The call as the policy writes it: without a fence around the JSON, and arguments that are JSON text as an object."""
    inner = block.removeprefix(TOOL_CALL_OPEN).removesuffix(TOOL_CALL_CLOSE)
    fence = _JSON_FENCE.match(inner)
    inner = fence[1] if fence else inner
    try:
        call = json.loads(inner)
        arguments = json.loads(call["arguments"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return f"{TOOL_CALL_OPEN}{inner}{TOOL_CALL_CLOSE}"
    return TOOL_CALL_OPEN + json.dumps(call | {"arguments": arguments}) + TOOL_CALL_CLOSE


def observation_text(text: str) -> tuple[str, int]:
    """(text without markers and response tags, number of image markers) of a recorded observation."""
    inner = _RESPONSE.match(text)
    if inner is None and IMAGE_MARKER not in text:
        return text, 0           # word for word: a kept search is what the server said
    text = inner[1] if inner else text
    return re.sub(r"[ \t]*\n?[ \t]*" + IMAGE_MARKER, "", text).strip("\n"), text.count(IMAGE_MARKER)
