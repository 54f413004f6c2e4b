"""What the agent says and does, on a terminal, as it happens. Pictures are saved, and shown where the terminal can."""
from __future__ import annotations

import base64
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from hdpo.agent.images import encode_png
from hdpo.assistant.speech import Event, Piece, Reply, Seen
from hdpo.errors import UserError, boundary
from hdpo.text import printable
from hdpo.types import EndReason

if TYPE_CHECKING:
    from PIL.Image import Image

WIDTH = 8
SHOWN = 4000
"""Characters of an observation that are shown; the agent has seen more."""
_ENDS = {EndReason.MAX_TOKENS: "its budget of tokens ran out", EndReason.MAX_TURNS: "it may make no further call",
         EndReason.CONTEXT_FULL: "its context is full", EndReason.UNPARSEABLE: "it ended without <answer>",
         EndReason.ABORTED: "it was stopped", EndReason.INFRASTRUCTURE: "a tool failed"}


class Terminal:
    """Shows the events of one question after another on `out`. `folder` is where pictures are saved; None makes one when
    there is the first."""

    def __init__(self, out: TextIO, folder: Path | None = None) -> None:
        self._out, self._folder, self._number = out, folder, 0
        self._label, self._breaks = "", ""

    def hear(self, event: Event) -> None:
        if isinstance(event, Piece):
            if event.kind != "call":
                self._say({"reason": "reason", "answer": "answer", "text": "says"}[event.kind], event.text)
        elif isinstance(event, Seen):
            self._say("error" if event.call.infrastructure else "sees", _shortened(event.call.observation) or "(nothing)")
            for image in event.images:
                self._show(image)
            self._end()
        elif event.called:
            self._say(event.name or "call", _written(event.arguments) if event.arguments is not None else event.text)
            self._end()

    def ended(self, reply: Reply) -> None:
        """The summary line; why, where there is no answer."""
        self._end()
        if reply.end is not EndReason.ANSWERED:
            self._say("no answer", _ENDS[reply.end] + (f": {reply.error}" if reply.error else ""))
            self._end()
        calls = sum(not call.infrastructure for call in reply.calls)
        pictures = f"; pictures are in {self._folder}" if self._number else ""
        self._out.write(f"{'':{WIDTH}} {calls} call{'s' * (calls != 1)}, {reply.given_tokens} tokens read, "
                        f"{reply.sampled_tokens} written, {reply.seconds:.1f} s{pictures}\n")
        self._out.flush()

    def _say(self, label: str, text: str) -> None:
        """More text under `label`; line breaks wait for what follows them."""
        text = printable(text)
        if label != self._label:
            text = text.lstrip()
            if not text:
                return
            self._end()
            self._out.write(f"{label:>{WIDTH}} | ")
            self._label = label
        kept = text.rstrip()
        if kept:
            self._out.write((self._breaks + kept).replace("\n", f"\n{'':{WIDTH}} | "))
            self._breaks = ""
        self._breaks += text[len(kept):]
        self._out.flush()

    def _end(self) -> None:
        if self._label:
            self._out.write("\n")
        self._label, self._breaks = "", ""

    def _show(self, image: Image) -> None:
        data = encode_png(image)
        with boundary(UserError, "a picture can't be saved", OSError):
            if self._folder is None:
                self._folder = Path(tempfile.mkdtemp(prefix="hdpo-pictures-"))
            self._folder.mkdir(parents=True, exist_ok=True)
            self._number += 1
            path = self._folder / f"picture_{self._number}.png"
            path.write_bytes(data)
        self._say("picture", f"{path} ({image.width} x {image.height})\n")
        if self._out.isatty() and (shown := inline(data, os.environ)):
            self._end()
            self._out.write(shown + "\n")


def _written(arguments: dict[str, Any]) -> str:
    """A call's arguments: its code or query as it is, anything else as JSON."""
    if len(arguments) == 1 and isinstance(value := next(iter(arguments.values())), str):
        return value
    return json.dumps(arguments, ensure_ascii=False)


def _shortened(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN // 2]}\n[... {len(text) - SHOWN} characters ...]\n{text[-SHOWN // 2:]}"


def inline(png: bytes, environment: Mapping[str, str]) -> str:
    """The picture in words that kitty or iTerm2 show; empty for other terminals."""
    data = base64.b64encode(png).decode("ascii")
    if environment.get("TERM_PROGRAM") in ("iTerm.app", "WezTerm"):
        return f"\033]1337;File=inline=1;size={len(png)}:{data}\a"
    if "KITTY_WINDOW_ID" in environment:
        parts = [data[at:at + 4096] for at in range(0, len(data), 4096)]
        return "".join(f"\033_G{'a=T,f=100,' * (number == 0)}m={int(number < len(parts) - 1)};{part}\033\\"
                       for number, part in enumerate(parts))
    return ""
