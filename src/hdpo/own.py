"""What a user's own tools and rewards are given, what they may give back, and how their code is found and run.

    async def weather(arguments: dict, context: ToolContext) -> str | ToolResult        # tools.own.NAME.function
    def score(rollout: Rollout) -> bool | None | Graded                                 # reward.function

Both are named `module:name` or `file.py:name` in the configuration and may be plain or async functions. They run in the
trainer's own process, so that they work beside any tool server, keep connections for a whole run, and cross no wire: plain ones
in threads, async ones on an event loop of their own, where what blocks delays no rollout but those that wait for it. Code that
may crash, or needs a machine of its own, belongs behind an HTTP endpoint or an MCP server.

A tool that raises `BadArguments` tells the policy what was wrong with its call. Whatever else it raises, and no answer in time,
is a failure of ours: the rollout is unscored. A reward that raises, or gives anything else back, leaves its rollout unscored,
counted as `odd/reward/own_failed`, never wrong.
"""
from __future__ import annotations

import asyncio
import concurrent.futures
import importlib
import importlib.util
import inspect
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hdpo.background import BackgroundLoop
from hdpo.errors import ConfigError, HdpoError
from hdpo.protocols import ToolResult
from hdpo.text import one_line
from hdpo.types import ToolCall, Verdict

__all__ = ["BadArguments", "Graded", "OwnCode", "Rollout", "ToolContext", "ToolResult", "load_function"]


class BadArguments(HdpoError):
    """Raised by an own tool: the call was the policy's mistake. The message is shown to it."""


@dataclass(frozen=True, slots=True)
class ToolContext:
    """Of whom a call is. Ground truth is not in it."""

    trajectory: str                # the same for all calls of a rollout, and of no other
    question: str
    images: tuple[bytes, ...]      # of the task: encoded files at original resolution
    data_source: str = ""


@dataclass(frozen=True, slots=True)
class Rollout:
    """A finished rollout, for a reward function."""

    question: str
    answer: str | None             # what stands in the last turn's <answer>; None without one
    ground_truth: str | list[str]
    turns: tuple[str, ...]         # what the policy wrote
    calls: tuple[ToolCall, ...]    # and what its calls gave
    images: tuple[bytes, ...]      # of the task
    data_source: str
    extra: dict[str, Any]          # the row's extra_info
    end: str                       # a hdpo.types.EndReason's value, such as answered or max_turns
    format_ok: bool


@dataclass(frozen=True, slots=True)
class Graded:
    """A verdict with a share in [0, 1] of reward.answer_weight. Whether the rollout is compared by its calls is `correct`, and is
    never inferred from a number; None leaves it unscored."""

    correct: bool | None
    answer: float = field(default=-1.0)     # below 0: 1 if correct, else 0

    @property
    def verdict(self) -> Verdict:
        return Verdict.UNSCORED if self.correct is None else Verdict.CORRECT if self.correct else Verdict.WRONG


def load_function(name: str, setting: str) -> Callable[..., Any]:
    """The function that `module:name` or `file.py:name` means; modules are also found in the current folder. Raises ConfigError,
    one line that names the setting."""
    place, colon, attribute = name.rpartition(":")
    if not colon or not place or not attribute.isidentifier():
        raise ConfigError(f"{setting}: {name} is not of the form module:name or file.py:name")
    try:
        module = _from_file(Path(place)) if place.endswith(".py") else _from_path(place)
    except (Exception, SystemExit) as exc:  # noqa: BLE001 - a user's module raises what it likes
        raise ConfigError(f"{setting}: {place} can't be imported: {type(exc).__name__}: {one_line(exc)}") from exc
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ConfigError(f"{setting}: {place} has no function {attribute}")
    return function


def _from_path(module: str) -> Any:
    here = os.getcwd()
    added = here not in sys.path
    if added:
        sys.path.append(here)      # last: a file here must not take the place of a library
    try:
        return importlib.import_module(module)
    finally:
        if added:
            sys.path.remove(here)


def _from_file(path: Path) -> Any:
    name = f"hdpo_own_{path.resolve().as_posix().replace('/', '_').removesuffix('.py')}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError("not a Python file")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


class OwnCode:
    """Runs functions of the user's for coroutines of one loop, away from it. Up to `threads` plain ones at once; one that is
    given up keeps its thread, not its place."""

    def __init__(self, threads: int = 32) -> None:
        self._threads = threads
        self._places: asyncio.Semaphore | None = None
        self._loop: BackgroundLoop | None = None

    async def run(self, function: Callable[..., Any], *arguments: Any, timeout_s: float) -> Any:
        """What the function returns. Raises what it raises, and TimeoutError after `timeout_s` seconds of its own."""
        if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):
            self._loop = self._loop or BackgroundLoop("hdpo-own-code")
            return await asyncio.wait_for(asyncio.wrap_future(self._loop.submit(_contained(function, arguments))), timeout_s)
        self._places = self._places or asyncio.Semaphore(self._threads)
        async with self._places:
            return await asyncio.wait_for(asyncio.wrap_future(_started(function, arguments)), timeout_s)

    def close(self) -> None:
        if self._loop is not None:
            self._loop.abandon()
            self._loop = None


async def _contained(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """What would end the loop, or look as if the call were given up, is an error like any other."""
    try:
        return await function(*arguments)
    except (SystemExit, KeyboardInterrupt) as exc:
        raise RuntimeError(f"{type(exc).__name__} in an own function") from exc
    except asyncio.CancelledError as exc:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise RuntimeError("CancelledError in an own function") from exc


def _started(function: Callable[..., Any], arguments: tuple[Any, ...]) -> concurrent.futures.Future[Any]:
    """In a thread that nobody waits for at the end: a function that hangs must not keep the process."""
    outcome: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def work() -> None:
        if not outcome.set_running_or_notify_cancel():
            return
        try:
            outcome.set_result(function(*arguments))
        except Exception as exc:  # noqa: BLE001 - handed to who waits
            outcome.set_exception(exc)
        except BaseException as exc:
            outcome.set_exception(RuntimeError(f"{type(exc).__name__} in a thread"))
            raise
    threading.Thread(target=work, name="hdpo-own-code", daemon=True).start()
    return outcome
