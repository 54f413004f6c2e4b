"""A tag is found in tokens exactly where it is found in their text."""
from __future__ import annotations

import random

import pytest

from hdpo.agent.chat import ChatFormat
from hdpo.agent.parse import ParsedCall, parse_tool_call
from hdpo.agent.spelled import SpelledTag

TAG = "</tool_call>"


def found_after(tag: SpelledTag, tokens: list[int]) -> int | None:
    """Tokens read when the tag was complete."""
    matched = 0
    for count, token in enumerate(tokens, start=1):
        matched = tag.after(matched, token)
        if tag.complete(matched):
            return count
    return None


@pytest.mark.parametrize("text", [TAG, "ab", "aab", "abab>", "<<a<", "aaa"])
def test_random_cuts_of_random_texts_agree_with_a_search_in_the_text(text: str) -> None:
    draw = random.Random(text)
    pieces = sorted({text[i:j] for i in range(len(text)) for j in range(i + 1, len(text) + 1)} | set("ab<>/ x"))
    texts = ["", *pieces, *(a + b for a, b in zip(pieces, reversed(pieces))), *(f"{p}\n" for p in pieces)]
    tag, hits = SpelledTag(text, texts), 0
    for _ in range(3000):
        tokens = [draw.randrange(len(texts)) for _ in range(draw.randrange(1, 12))]
        expected = next((n for n in range(1, len(tokens) + 1) if text in "".join(texts[t] for t in tokens[:n])), None)
        assert found_after(tag, tokens) == expected
        hits += expected is not None
    assert hits > 100


def test_a_call_spelled_in_ordinary_tokens_ends_where_its_own_token_would_end_it(chat: ChatFormat) -> None:
    call = '<tool_call>{"name": "python", "arguments": {"code": "if a > b: 1 </tool </tool_cal>"}}</tool_call>'
    own, plain = chat.encode_turn(call), chat._encode(chat._plain, call)
    assert own[-1] == chat.tool_call_end_id and chat.tool_call_end_id not in plain
    for ids in (own, plain, plain + chat._encode(chat._plain, "\nmore")):
        count = found_after(chat.spelled_end, ids)
        assert count is not None and count <= len(ids)
        assert isinstance(parse_tool_call(chat.decode(ids[:count])), ParsedCall)
    assert found_after(chat.spelled_end, own) == len(own) and found_after(chat.spelled_end, plain) == len(plain)
    assert found_after(chat.spelled_end, chat._encode(chat._plain, "<answer>a</answer> </reason> <tool_call>")) is None
    assert found_after(chat.spelled_end, [10**9] * 3) is None
