"""Text from outside becomes text that every encoder takes: once, where it comes in.

A Python string may hold half a surrogate pair (JSON's "\\ud83d", a snippet cut inside an emoji). UTF-8, tokenizers, SQLite and
Parquet refuse it, each with an exception of its own, hours later. Standard library only.
"""
from __future__ import annotations

import re
from typing import Any

from hdpo import oddities

_SURROGATE = re.compile("[\ud800-\udfff]")
# what moves a terminal's cursor, starts a line or turns the direction of writing: C0, C1, line separators, bidi controls
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]+")
_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def valid(text: str, source: str) -> str:
    """`text` with halves of a pair joined and lone ones replaced by U+FFFD; what was replaced is counted as `source`'s."""
    if text.isascii() or not _SURROGATE.search(text):
        return text
    joined = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if "\ufffd" in joined:
        oddities.count(f"text/{source}")
    return joined


def valid_tree(value: Any, source: str) -> Any:
    """A parsed JSON value with every string in it, keys too, made valid."""
    if isinstance(value, str):
        return valid(value, source)
    if isinstance(value, dict):
        return {valid_tree(key, source): valid_tree(item, source) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [valid_tree(item, source) for item in value]
    return value


def printable(text: str) -> str:
    """A stranger's words of many lines as they may stand on a terminal: line breaks and tabs stay, what could steer it is seen
    as U+FFFD. Any cut of a text gives the same."""
    return _STEERING.sub("\ufffd", text.replace("\t", "    "))


def one_line(text: object, most: int = 300) -> str:
    """A stranger's words as they may stand in a log or on a terminal: one line, nothing that could steer either."""
    plain = _UNPRINTABLE.sub(" ", _SURROGATE.sub("\ufffd", str(text)[:8 * most]))
    return " ".join(plain.split())[:most]
