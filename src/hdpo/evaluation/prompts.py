"""The system prompts of an evaluation, in this project's own words. A model trained on other words is given its own."""
from __future__ import annotations

import hashlib

from hdpo.agent.own_calls import tools_block
from hdpo.config import ToolsConfig

_FORM = "Begin every turn with your thoughts inside <reason></reason>."
_ANSWER = "Put the final answer, and nothing else, into <answer></answer>."


def system_prompt(tools: ToolsConfig) -> str:
    """The text that offers these tools; without any, one that asks for an answer alone."""
    if not tools.offered:
        return f"You answer questions about pictures. {_FORM} {_ANSWER}"
    return ("You answer questions about pictures. You may call tools, and you call one only where you could not answer well "
            f"without it:\n{tools_block(tools)}\n{_FORM} Then write either one tool call, whose result you are shown, or the "
            f"answer. {_ANSWER}")


def version(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
