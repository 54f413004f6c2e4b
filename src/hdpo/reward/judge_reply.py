"""What a judge's server sent back, read without trust: the text of a completion, or the words of a refusal. No vendor.

Servers differ: `content` may be a list of parts, an error may come with status 200, and a refusal may quote the whole
request. Whatever is kept is valid Unicode on one line without control characters, so that it can go into a database, a
record and a terminal.
"""
from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hdpo.errors import HdpoError
from hdpo.text import valid

_MAX_WORDS = 300   # characters kept of what a provider says
_TOO_LONG = re.compile(
    r"context[ _](?:length|window|size)|(?:maximum|max|too many|exceed\w*|reduce)\b.{0,60}\b(?:tokens|length)|prompt is too long|"
    r"too (?:long|large)|string_above_max_length", re.IGNORECASE | re.DOTALL)


class ProviderError(HdpoError):
    """A reply that is an error or no completion at all. `code` is the provider's own status, 0 if it gave none."""

    def __init__(self, words: str, code: int = 0) -> None:
        super().__init__(words, code)
        self.words, self.code = words, code

    def __str__(self) -> str:
        return self.words


@dataclass(frozen=True, slots=True)
class Reply:
    """The text of a completion ("" if it holds none) and whether it stopped for any other reason than being finished."""

    text: str
    cut: str              # "" for a finished reply, else the finish_reason
    prompt_tokens: int
    completion_tokens: int


def read_reply(response: Any) -> Reply:
    """Raises ProviderError, with the provider's words, for what is not a completion."""
    if not isinstance(response, Mapping):
        raise ProviderError(f"not a completion: {one_line(_dumped(response)) or 'an empty reply'}")
    if response.get("error") or not response.get("choices"):
        raise ProviderError(words_of(response) or "a reply without choices", _code(response))
    choice = response["choices"][0] if isinstance(response["choices"], list) else None
    message = choice.get("message") if isinstance(choice, Mapping) else None
    if not isinstance(choice, Mapping) or not isinstance(message, Mapping):
        raise ProviderError("a reply without a message")
    reason = choice.get("finish_reason")
    usage = response.get("usage")
    tokens = [_count(usage.get(name)) if isinstance(usage, Mapping) else 0 for name in ("prompt_tokens", "completion_tokens")]
    return Reply(valid(_content(message.get("content")), "judge"),
                 reason if reason in ("length", "content_filter") else "", *tokens)


def _content(content: Any) -> str:
    """A string, or the text parts of a list joined; thinking is no part of the answer, and nothing else is text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""
    texts = [part if isinstance(part, str) else part.get("text") if isinstance(part, Mapping) and part.get(
        "type", "text") in ("text", "output_text") else None for part in content]
    return "".join(text for text in texts if isinstance(text, str))


def words_of(body: Any) -> str:
    """What a provider says in an error's body, whatever its shape: OpenAI's, FastAPI's, a bare text; one short line."""
    if isinstance(body, (str, bytes)):
        return one_line(body if isinstance(body, str) else body.decode("utf-8", "replace"))
    if isinstance(body, Mapping):
        for name in ("error", "message", "detail", "msg", "error_description"):
            if body.get(name):
                found = words_of(body[name])
                where = body.get("loc")
                place = ".".join(map(str, where)) + ": " if name == "msg" and isinstance(where, list) else ""
                return one_line(place + found) if found else ""
    if isinstance(body, list):
        return one_line("; ".join(filter(None, map(words_of, body))))
    return ""


def refused_options(body: Any, words: str, options: Iterable[str]) -> list[str]:
    """Which of `options` an error refuses. Where it names the place of the fault, what it quotes besides counts for nothing."""
    error = body.get("error", body) if isinstance(body, Mapping) else body
    details = error.get("detail") if isinstance(error, Mapping) else error
    places = [str(part) for item in details if isinstance(item, Mapping) and isinstance(item.get("loc"), list)
              for part in item["loc"]] if isinstance(details, list) else []
    parameter = error.get("param") if isinstance(error, Mapping) else None
    if isinstance(parameter, str) and parameter:
        places.append(parameter.split(".")[0])
    if places and set(places) & set(options):
        return [name for name in options if name in places]
    return [name for name in options if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", words)]


def is_too_long(words: str) -> bool:
    """Whether an error says that the request has more tokens than the judge can read."""
    return bool(_TOO_LONG.search(words))


def one_line(text: str) -> str:
    """Valid Unicode on one line, without escapes and direction marks, at most 300 characters."""
    text = "".join(c if unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co", "Cn") else " " for c in text[:8 * _MAX_WORDS])
    return " ".join(text.split())[:_MAX_WORDS]


def _code(response: Mapping[str, Any]) -> int:
    error = response.get("error")
    code = error.get("code") if isinstance(error, Mapping) else response.get("code")
    return int(code) if isinstance(code, int | str) and re.fullmatch(r"[45]\d\d", str(code)) else 0


def _count(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _dumped(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
