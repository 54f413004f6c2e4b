"""Keys and tokens: taken out of the environment at the start, so that no child process inherits them.

They come by the environment (JUDGE_API_KEY, WANDB_API_KEY, ...) and stay in this process's memory, which other processes
of the same user can't read then. Who starts a child that needs some hands it those by name.
"""
from __future__ import annotations

import contextlib
import ctypes
import os
import re
from collections.abc import Collection

_NAMES = re.compile(r"JUDGE_API_KEY(_\d+)?|WANDB_API_KEY|SERPER_API_KEY|SERPAPI_API_KEY|BRIGHTDATA_API_TOKEN|"
                    r"HDPO_TOOL_SERVER_TOKEN|HDPO_SERVE_KEY|OPENAI_API_KEY|VLLM_API_KEY")
_held: dict[str, str] = {}


def withdraw(further: Collection[str] = ()) -> None:
    """Take the keys out of this process's environment, those named `further` too, and make it unreadable for others of the same
    user (Linux)."""
    for name in [name for name in os.environ if _NAMES.fullmatch(name) or name in further]:
        _held[name] = os.environ.pop(name)
    hide()


def hide() -> None:
    """Make this process undumpable: others of the same user can't read its first environment and its memory (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)


def key(name: str) -> str:
    """Empty where it wasn't given."""
    return os.environ.get(name) or _held.get(name, "")


def environment_with_keys() -> dict[str, str]:
    """For a child process that needs them: the tool server, which asks search providers. Keys of own tools stay here."""
    return {**{name: value for name, value in _held.items() if _NAMES.fullmatch(name)}, **os.environ}
