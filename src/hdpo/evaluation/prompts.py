"""The system prompts of an evaluation, in this project's own words. A model trained on other words is given its own."""
from __future__ import annotations

import hashlib

from hdpo.agent.parse import EXAMPLES

_WHAT = {"python": "python runs code; the pictures are image_1, image_2, ... and what plt.show() draws comes back as a picture",
         "text_search": "text_search looks up facts", "image_search": "image_search says what a picture shows"}

_FORM = "Begin every turn with your thoughts inside <reason></reason>."
_ANSWER = "Put the final answer, and nothing else, into <answer></answer>."


def system_prompt(tools: list[str]) -> str:
    """The text that offers these tools; without any, one that asks for an answer alone."""
    if not tools:
        return f"You answer questions about pictures. {_FORM} {_ANSWER}"
    lines = "\n".join(f"- {_WHAT[name]}: {EXAMPLES[name]}" for name in tools)
    return ("You answer questions about pictures. You may call tools, and you call one only where you could not answer well "
            f"without it:\n{lines}\n{_FORM} Then write either one tool call, whose result you are shown, or the answer. "
            f"{_ANSWER}")


def version(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
