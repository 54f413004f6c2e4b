"""`hdpo ask`, `hdpo chat`: a model folder and its tools, asked at a terminal."""
from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from hdpo.compose.asked import Asked, add_model_options, read_model, scratch_folder
from hdpo.errors import DataError, UserError
from hdpo.keys import withdraw
from hdpo.text import valid

if TYPE_CHECKING:
    from hdpo.assistant.session import Assistant, Question
    from hdpo.assistant.terminal import Terminal

CHAT = """\
Several questions to one model, each with all that was said before. /image FILE adds a picture to the next question, /new begins
anew, /quit or Ctrl-D ends, Ctrl-C stops an answer."""


def ask(argv: Sequence[str]) -> int:
    """Returns 0 where there is an answer, 1 where the agent gave none."""
    parser = argparse.ArgumentParser(prog="hdpo ask", description="One question to a model with its tools: what it reasons, "
                                     "calls and sees is shown as it happens. Pictures that tools make are saved.")
    parser.add_argument("question", nargs="?", default="-", help="the question; - or nothing reads standard input. Its <image> "
                        "markers say where the pictures stand; without them they stand before it")
    parser.add_argument("--image", action="append", default=[], type=Path, metavar="FILE", help="a picture (repeatable)")
    _add_options(parser)
    options = parser.parse_args(argv)
    text = valid(_input().read() if options.question == "-" else options.question, "question")
    if not text.strip():
        raise UserError("there is no question")
    images = [read_image(path) for path in options.image]
    with _opened(options) as (asked, assistant, terminal):
        try:
            from hdpo.assistant.session import user_text
            messages = [*asked.system, {"role": "user", "content": user_text(text.strip(), len(images))}]
            return 0 if _answer(assistant, terminal, asked.question(messages, images)) is not None else 1
        except KeyboardInterrupt:
            print("\nhdpo: interrupted", file=sys.stderr)
            return 130


def chat(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="hdpo chat", description=CHAT)
    _add_options(parser)
    options = parser.parse_args(argv)
    with _opened(options) as (asked, assistant, terminal):
        if sys.stdin.isatty():
            print(CHAT)
        conversation, prompt = _Conversation(asked, assistant, terminal), "\n> " if _input().isatty() else ""
        try:
            while conversation.go_on(valid(input(prompt), "question")):
                pass
        except (EOFError, KeyboardInterrupt):
            print()
    return 0


def _input() -> TextIO:
    """Standard input, whose bytes may be in another encoding."""
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    return sys.stdin


class _Conversation:
    """What was said so far. Earlier answers are text of the prompt, without the reasoning and the calls that led to them."""

    def __init__(self, asked: Asked, assistant: Assistant, terminal: Terminal) -> None:
        self._asked, self._assistant, self._terminal = asked, assistant, terminal
        self._begin()

    def _begin(self) -> None:
        self._messages, self._images, self._next = list(self._asked.system), list[bytes](), list[bytes]()

    def go_on(self, line: str) -> bool:
        """A question is answered, a command done; whether there may be another."""
        word, _, rest = line.strip().partition(" ")
        if word in ("/quit", "/exit"):
            return False
        try:
            if word == "/image" and not rest.strip():
                raise DataError("/image FILE adds a picture to the next question")
            if word == "/image":
                self._next.append(read_image(Path(rest.strip()).expanduser()))
            elif word == "/new":
                self._begin()
            elif word.startswith("/") and word[1:].isalpha():
                raise DataError(f"{word} is no command: /image FILE, /new and /quit are")
            elif word:
                self._answer(line.strip())
        except DataError as exc:
            print(f"hdpo: {exc}", file=sys.stderr)
        except KeyboardInterrupt:
            print("\nstopped; the question is forgotten", file=sys.stderr)
        return True

    def _answer(self, text: str) -> None:
        from hdpo.assistant.session import user_text
        messages = [*self._messages, {"role": "user", "content": user_text(text, len(self._next))}]
        images = [*self._images, *self._next]
        answer = _answer(self._assistant, self._terminal, self._asked.question(messages, images))
        if answer is not None:
            self._messages, self._images, self._next = [*messages, {"role": "assistant", "content": answer}], images, []


def read_image(path: Path) -> bytes:
    """Raises DataError for a file that isn't there or is no picture."""
    from hdpo.agent.images import check_image
    try:
        data = path.read_bytes()
    except OSError as exc:
        raise DataError(f"{path}: {exc.strerror or exc}") from None
    check_image(data, str(path))
    return data


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="where pictures are saved (default: a new temporary folder)")
    add_model_options(parser)


@contextmanager
def _opened(options: argparse.Namespace) -> Iterator[tuple[Asked, Assistant, Terminal]]:
    """Settings, model and tools are open; what happens is shown on standard output."""
    with scratch_folder("hdpo-ask-") as scratch:
        asked = read_model(options, scratch)
        withdraw(asked.config.tools.key_names)
        from hdpo.assistant.terminal import Terminal
        from hdpo.compose.stage import Stage
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")
        with Stage(asked.config) as stage:
            yield asked, stage.assistant(), Terminal(sys.stdout, options.save)


def _answer(assistant: Assistant, terminal: Terminal, question: Question) -> str | None:
    """What the agent says in the end; None where it was cut off."""
    from hdpo.types import EndReason

    async def work() -> str | None:
        reply = await assistant.answer(await assistant.open(question), terminal.hear)
        terminal.ended(reply)
        return reply.text if reply.end in (EndReason.ANSWERED, EndReason.UNPARSEABLE) else None
    return assistant.drive(work())
