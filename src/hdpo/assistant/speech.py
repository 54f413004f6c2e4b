"""What is heard while the agent works: pieces of its turns as they are sampled, its calls, and what it is shown."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from hdpo.types import EndReason, ToolCall

if TYPE_CHECKING:
    from PIL.Image import Image

Kind = Literal["reason", "answer", "call", "text"]
_TAGS: dict[str, Kind] = {"<reason>": "reason", "<think>": "reason", "<answer>": "answer", "<tool_call>": "call"}
_ENDS = ("</reason>", "</think>", "</answer>", "</tool_call>")


@dataclass(frozen=True, slots=True)
class Piece:
    """Some more text of a turn, without its tags; "text" stands outside of all tags."""

    kind: Kind
    text: str


@dataclass(frozen=True, slots=True)
class TurnEnded:
    """A turn is complete. With `called` a tool runs next, unless the trajectory ends here."""

    text: str
    called: bool
    name: str = ""                       # of the tool; empty where the call can't be read
    arguments: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Seen:
    """What came of a call, and the pictures of it that the agent was shown."""

    call: ToolCall
    images: tuple[Image, ...]


Event = Piece | TurnEnded | Seen
Hear = Callable[[Event], object]


@dataclass(frozen=True, slots=True)
class Reply:
    """`text` is the answer; where the agent gave none, what its last turn says outside of its reasoning."""

    text: str
    answered: bool
    end: EndReason
    calls: tuple[ToolCall, ...]
    given_tokens: int                    # prompt and observations, images expanded
    sampled_tokens: int
    seconds: float
    error: str = ""                      # why, where a tool failed or the time was up


class Splitter:
    """Cuts text that comes in pieces at its tags. The pieces of any cut add up to the same text of each kind."""

    def __init__(self) -> None:
        self._kind: Kind = "text"
        self._held = ""                  # might be the beginning of a tag

    def feed(self, text: str, last: bool = False) -> list[Piece]:
        text, pieces = self._held + text, list[Piece]()
        while True:
            at, tag = min(((text.find(tag), tag) for tag in (*_TAGS, *_ENDS) if tag in text), default=(len(text), ""))
            self._held = "" if tag or last else _begun_tag(text)
            if said := text[:at].removesuffix(self._held):
                pieces.append(Piece(self._kind, said))
            if not tag:
                return pieces
            self._kind, text = _TAGS.get(tag, "text"), text[at + len(tag):]


def _begun_tag(text: str) -> str:
    """The end of `text` from which on a tag may have begun."""
    at = text.rfind("<")
    return text[at:] if at >= 0 and any(tag.startswith(text[at:]) for tag in (*_TAGS, *_ENDS)) else ""


def outside_reasoning(turn: str) -> str:
    """A turn's text without what stands inside of tags; all of it where nothing else is there."""
    return "".join(piece.text for piece in Splitter().feed(turn, last=True) if piece.kind == "text").strip() or turn.strip()


class Spoken:
    """A turn as it is sampled: hears each piece once, however often and how far apart it is told of the tokens so far."""

    def __init__(self, decode: Callable[[Sequence[int]], str], hear: Hear) -> None:
        self._decode, self._hear = decode, hear
        self._told, self._splitter = "", Splitter()

    def so_far(self, token_ids: Sequence[int], last: bool = False) -> None:
        text = self._decode(token_ids)
        if not last:
            text = text.rstrip("\ufffd")     # bytes of a character that is not complete
        if text.startswith(self._told):
            for piece in self._splitter.feed(text[len(self._told):], last):
                self._hear(piece)
            self._told = text
