"""Mathematical equivalence through math-verify, in a worker process that can't hang or eat the trainer's memory.

math-verify bounds its own time with SIGALRM, which works on the main thread only and can't interrupt one huge integer
power. So it runs in a process of its own (`python -m hdpo.reward.maths_worker`) that the kernel kills when its time is
up; the next question starts a fresh one. Without math-verify, every question is one the rule can't say anything about.
"""
from __future__ import annotations

import atexit
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
from functools import cache

from hdpo.types import Verdict

TIME_LIMIT_S = 2.0      # CPU seconds of one comparison
MEMORY_LIMIT_GIB = 2.0  # address space of the worker
NUM_WORKERS = 2
_MAX_CHARS = 300

_COMMAND_WORDS = re.compile(r"\\[a-zA-Z]+")
_FUNCTION_WORDS = re.compile(r"\b(?:sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|log|ln|sqrt|exp|pi)\b")
_FORBIDDEN = re.compile(r"\\(?:text|mathrm|operatorname|mbox|circ|degree|begin|href)|%|°|['\"]|\d[eE][+-]?\d")


def equivalent(prediction: str, gold: str, question: str = "", time_limit_s: float = TIME_LIMIT_S) -> Verdict:
    """CORRECT if the two expressions are equivalent, WRONG if both are constants that clearly differ, else UNSCORED.

    UNSCORED also where math-verify is known to be generous: units, percent and degrees (it drops them), words (it reads
    "dog" as d*o*g), names that differ in case only, and an expression that merely repeats the question. Blocks for at
    most about `time_limit_s` seconds of CPU time; safe to call from any thread.
    """
    pair = [_prepare(prediction), _prepare(gold)]
    if any(text is None for text in pair) or not available():
        return Verdict.UNSCORED
    squeezed = _squeeze(prediction)
    if len(squeezed) > 3 and not re.fullmatch(r"[\d.,/+-]+", squeezed) and squeezed in _squeeze(question):
        return Verdict.UNSCORED   # "expand (x+1)^2" answered with (x+1)^2
    names = [set(re.findall(r"[A-Za-z]", _FUNCTION_WORDS.sub(" ", _COMMAND_WORDS.sub(" ", text or "")))) for text in pair]
    if names[0] != names[1] and {n.lower() for n in names[0]} & {n.lower() for n in names[0] ^ names[1]}:
        return Verdict.UNSCORED   # x and X
    return _pool().ask({"prediction": pair[0], "gold": pair[1], "seconds": time_limit_s})


def readable(text: str) -> bool:
    """Whether `equivalent` would look at this expression at all. Cheap."""
    return _prepare(text) is not None


@cache
def available() -> bool:
    return importlib.util.find_spec("math_verify") is not None


def _prepare(text: str) -> str | None:
    """The expression as math-verify should see it, or None if it must not see it."""
    text = text.replace("−", "-").replace("×", r"\times ").replace("·", r"\cdot ").replace("π", r"\pi ")
    text = re.sub(r"√\s*(\d+|\w|\([^()]*\))", lambda m: r"\sqrt{" + m[1].strip("()") + "}", text)
    text = re.sub(r"(?<![\\a-zA-Z])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text).replace("**", "^")
    text = re.sub(r"(?<![\\a-zA-Z])pi\b", r"\\pi ", text)
    if not text.strip() or len(text) > _MAX_CHARS or "$" in text or "\n" in text or _FORBIDDEN.search(text):
        return None
    bare = _FUNCTION_WORDS.sub(" ", _COMMAND_WORDS.sub(" ", text))
    return None if re.search(r"[^\W\d_]{2,}|[^\W\d_]\s+[^\W\d_]", bare) else text   # words, "10 cm"; but also xy: rare


def _squeeze(text: str) -> str:
    return re.sub(r"[\s$]|\\left|\\right|\\[,;!]", "", text).casefold()


class _Worker:
    """One process; `ask` is serialised. A dead worker is replaced at the next question."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def try_ask(self, request: dict[str, object], wait: bool) -> Verdict | None:
        """None if another thread is using this worker and `wait` is False."""
        if not self._lock.acquire(blocking=wait):
            return None
        try:
            if self._process is None or self._process.poll() is not None:
                self._process = _start()
            assert self._process.stdin and self._process.stdout
            try:
                self._process.stdin.write(json.dumps(request) + "\n")
                self._process.stdin.flush()
                reply = self._process.stdout.readline()
            except OSError:   # the worker died between two questions
                reply = ""
            if not reply:     # killed by its limits: can't say
                self.stop()
                return Verdict.UNSCORED
            return Verdict(reply.strip())
        finally:
            self._lock.release()

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


class _Pool:
    def __init__(self, size: int) -> None:
        self._workers = [_Worker() for _ in range(size)]
        atexit.register(self.close)

    def ask(self, request: dict[str, object]) -> Verdict:
        for worker in self._workers:
            verdict = worker.try_ask(request, wait=False)
            if verdict is not None:
                return verdict
        verdict = self._workers[threading.get_ident() % len(self._workers)].try_ask(request, wait=True)
        assert verdict is not None
        return verdict

    def close(self) -> None:
        for worker in self._workers:
            worker.stop()


@cache
def _pool() -> _Pool:
    return _Pool(NUM_WORKERS)


def _start() -> subprocess.Popen[str]:
    # a bare environment: no key of ours is within reach of what the policy wrote
    environment = {name: os.environ[name] for name in ("PATH", "LANG", "LD_LIBRARY_PATH") if name in os.environ}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    return subprocess.Popen([sys.executable, "-m", "hdpo.reward.maths_worker", str(MEMORY_LIMIT_GIB)], env=environment,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
