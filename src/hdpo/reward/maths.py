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
from functools import cache, lru_cache

from hdpo.reward.asked import read_question
from hdpo.reward.numerals import plain
from hdpo.types import Verdict

TIME_LIMIT_S = 2.0      # CPU seconds of one comparison
MEMORY_LIMIT_GIB = 2.0  # address space of the worker
NUM_WORKERS = 2
_MAX_CHARS = 300
_SUPERSCRIPT = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789")

_COMMAND_WORDS = re.compile(r"\\[a-zA-Z]+")
_FUNCTION_WORDS = re.compile(r"\b(?:sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|log|ln|sqrt|exp|pi)\b")
_FORBIDDEN = re.compile(r"%|°|['\"!;?]|\d[eE][+-]?\d|\d\s+\d|\d\s?/\s?\d+\s?/\s?\d|=[^=]*=|(?<![\d.])0\d|_\{[^}]*[a-z]{2}")
_KNOWN_COMMANDS = frozenset(
    "frac dfrac tfrac sqrt pi cdot times div left right sin cos tan cot sec csc arcsin arccos arctan log ln exp infty theta "
    "alpha beta gamma delta lambda mu sigma phi omega le leq ge geq lt gt neq ne".split())
_CALLS = re.compile(r"sin|cos|tan|cot|sec|csc|log|ln|exp|sqrt|√")
_SUM = re.compile(r"(?<![\^_\d.])\d+\s*[-+×*]\s*\d+(?![\d.]*[a-zA-Z\\(])")   # 71+1: arithmetic that is left to the reader
_TOKENS = re.compile(r"\d+(?:\.\d+)?|\.\d+|\\?[a-zA-Z]+|[-+/^<>≤≥=,\[\]|]")


def equivalent(prediction: str, gold: str, question: str = "", time_limit_s: float = TIME_LIMIT_S) -> Verdict:
    """CORRECT if the two expressions are the same, WRONG if they certainly differ, else UNSCORED.

    The same means: equal, and written alike up to the order of terms; or equal where the question neither asks for a form
    (expand, simplify) nor itself holds an expression of that value, which an answer could repeat in disguise. UNSCORED also
    where math-verify is known to be generous: units, percent and degrees (it drops them), words (it reads "dog" as d*o*g)
    and names that differ in case only. Blocks for at most about `time_limit_s` seconds of CPU time; from any thread.
    """
    pair = [_prepare(prediction), _prepare(gold)]
    if any(text is None for text in pair) or not available():
        return Verdict.UNSCORED
    asked = read_question(question)
    alike = _tokens(prediction) == _tokens(gold)
    squeezed = _squeeze(prediction)
    if not alike and len(squeezed) > 3 and not re.fullmatch(r"[\d.,/+-]+", squeezed) and squeezed in _squeeze(question):
        return Verdict.UNSCORED   # "expand (x+1)^2" answered with (x+1)^2
    names = [set(re.findall(r"[A-Za-z]", _FUNCTION_WORDS.sub(" ", _COMMAND_WORDS.sub(" ", text or "")))) for text in pair]
    if names[0] != names[1] and {n.lower() for n in names[0]} & {n.lower() for n in names[0] ^ names[1]}:
        return Verdict.UNSCORED   # x and X
    undone = set(_CALLS.findall(prediction)) - set(_CALLS.findall(gold)) or (
        _SUM.search(plain(prediction)) and not _SUM.search(plain(gold)))
    given = [] if alike else _expressions(question)
    any_form = not (asked.form or undone or names[1] and given)   # an expression of variables may be turned in many ways
    return _pool().ask({"prediction": pair[0], "gold": pair[1], "seconds": time_limit_s, "alike": alike, "any_form": any_form,
                        "given": given, "one_right": not asked.many_right})


def _tokens(text: str) -> list[str]:
    """Numbers, names and signs in no order: what writing the terms or factors in another order leaves as it is."""
    text = re.sub(r"\\[dt]frac", r"\\frac", plain(text).replace("**", "^"))
    text = text.replace(r"\frac", " / ").replace("√", " sqrt ").replace("π", " pi ")
    return sorted(token.removeprefix("\\") for token in _TOKENS.findall(text) if token not in (r"\left", r"\right"))


def _expressions(question: str) -> list[str]:
    """The expressions that a question holds, as far as they can be told from its words; at most eight."""
    found: list[str] = []
    run: list[str] = []
    for word in [*re.sub(r"\$|\\[()\[\]]", " ; ", question[:2000]).split(), ";"]:
        part = word.rstrip(".,;:?!")
        bare = _FUNCTION_WORDS.sub(" ", _COMMAND_WORDS.sub(" ", part))
        if part and not re.search(r"[^\W\d_]{2,}", bare) and part not in ("a", "A", "I"):
            run.append(part)
        if (not part or part != word or run and run[-1] != part) and run:
            text = _prepare(" ".join(run))
            if text and re.search(r"[-+*/^\\]|\d[a-z]|\)\(", text):
                found.append(text)
            run = []
    return found[:8]


@lru_cache(maxsize=8192)
def readable(text: str) -> bool:
    """Whether `equivalent` would look at this expression at all. Cheap."""
    return _prepare(text) is not None


@cache
def available() -> bool:
    return importlib.util.find_spec("math_verify") is not None


def _prepare(text: str) -> str | None:
    """The expression as math-verify should see it, or None if it must not see it."""
    if len(text) > _MAX_CHARS or "$" in text or "\n" in text:
        return None
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹]+", lambda m: "^{" + m[0].translate(_SUPERSCRIPT) + "}", text)
    text = text.replace("−", "-").replace("×", r"\times ").replace("·", r"\cdot ").replace("π", r"\pi ")
    text = re.sub(r"√\s*(\d+|\w|\([^()]*\))", lambda m: r"\sqrt{" + m[1].strip("()") + "}", text)
    text = re.sub(r"(?<![\\a-zA-Z])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text).replace("**", "^")
    text = re.sub(r"(?<![\\a-zA-Z])pi\b", r"\\pi ", text)
    if not text.strip() or _FORBIDDEN.search(text):
        return None
    commands = {command[1:] for command in _COMMAND_WORDS.findall(text)}
    if not commands <= _KNOWN_COMMANDS or text.count("{") != text.count("}") or text.count("(") + text.count("[") != text.count(
            ")") + text.count("]"):
        return None   # what was cut off, and signs that say several things at once (\lor, \pm, \boxed)
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
