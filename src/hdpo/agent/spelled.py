"""Finds a tag in sampled tokens however it is cut: as its own token, or spelled in ordinary ones ("}}</", "tool", "_call", ">").

The text is never put together: a sequence keeps one number, how much of the tag its text ends with, and what a token makes of
it was worked out for the whole vocabulary before.
"""
from __future__ import annotations

from collections.abc import Sequence


class SpelledTag:
    """`texts[id]` is the text of token `id`. Ids beyond are tokens without text."""

    def __init__(self, tag: str, texts: Sequence[str]) -> None:
        self.tag = tag
        self._texts = texts
        self._shorter = _fallbacks(tag)
        begun = ((token, self._read(0, text)) for token, text in enumerate(texts) if tag[0] in text)
        self._begins = {token: matched for token, matched in begun if matched}

    def after(self, matched: int, token: int) -> int:
        """Characters of the tag that the text ends with after `token`, having ended with `matched` before it; len(tag) when it
        is complete, also where the token's text goes on behind it."""
        if not matched:
            return self._begins.get(token, 0)
        return self._read(matched, self._texts[token] if token < len(self._texts) else "")

    def within(self, tokens: Sequence[int]) -> int:
        """Characters of the tag that the text of `tokens` ends with."""
        matched = 0
        for token in tokens:
            matched = self.after(matched, token)
        return matched

    def complete(self, matched: int) -> bool:
        return matched == len(self.tag)

    def _read(self, matched: int, text: str) -> int:
        for character in text:
            while matched and self.tag[matched] != character:
                matched = self._shorter[matched]
            matched += self.tag[matched] == character
            if matched == len(self.tag):
                return matched
        return matched


def _fallbacks(tag: str) -> list[int]:
    """For each number of matched characters, the next smaller number that their end may be (Knuth, Morris and Pratt)."""
    shorter = [0] * (len(tag) + 1)
    for end in range(2, len(tag) + 1):
        shorter[end] = next(size for size in range(end - 1, -1, -1) if tag[:end].endswith(tag[:size]))
    return shorter
