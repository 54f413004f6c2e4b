"""The process behind `hdpo.reward.maths`: one JSON question per line in, one verdict per line out.

{"prediction": "x+1", "gold": "1+x", "seconds": 5.0} -> "correct", "wrong" or "unscored". Time and memory limits are the
kernel's: their signals keep their default action, which ends the process, whatever C code is running.
"""
from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
from typing import Any

_CLEARLY_DIFFERENT = 0.05   # relative; nearer than this, rounding could be meant


def main() -> None:
    limit = int(float(sys.argv[1]) * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)   # whatever a library prints must not look like a verdict
    logging.disable(logging.CRITICAL)
    import math_verify  # noqa: F401  (its start-up must not count as thinking time)

    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, request["seconds"])       # CPU time: a busy machine changes no verdict
        signal.setitimer(signal.ITIMER_REAL, 10 * request["seconds"])
        try:
            verdict = _compare(request["prediction"], request["gold"])
        except Exception:  # noqa: BLE001  (process boundary; sympy raises nearly everything, MemoryError included)
            verdict = "unscored"
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        replies.write(verdict + "\n")
        replies.flush()


def _compare(prediction: str, gold: str) -> str:
    from math_verify import LatexExtractionConfig, parse, verify

    def read(text: str) -> Any:
        found = parse(f"${text}$", [LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None)
        return found[0] if len(found) == 1 else None

    target, answer = read(gold), read(prediction)
    if target is None or answer is None or not _comparable(answer, target):
        return "unscored"
    said, true = _constant(answer), _constant(target)
    relative = None if said is None or true is None else abs(said - true) / (abs(true) or 1.0)
    if verify(target, answer, timeout_seconds=None):
        # math-verify rounds to 6 places, which makes all tiny numbers equal
        return "correct" if relative is None or relative <= 1e-6 else "unscored"
    return "wrong" if relative is not None and relative > _CLEARLY_DIFFERENT else "unscored"


def _comparable(answer: Any, target: Any) -> bool:
    """Same kind of object, and no arithmetic left undone where the ground truth is a plain number (2^10 for 1024)."""
    from sympy import Eq, Interval, MatrixBase, Set, Symbol, Tuple
    from sympy.core.relational import Relational

    def kind(value: Any) -> type:
        return next((k for k in (Interval, Set, Tuple, MatrixBase) if isinstance(value, k)), object)

    if isinstance(answer, Eq) and not isinstance(target, Relational):
        if not isinstance(answer.lhs, Symbol) or answer.rhs.has(answer.lhs):
            return False
        answer = answer.rhs
    elif isinstance(target, Eq) and not isinstance(answer, Relational):
        if not isinstance(target.lhs, Symbol):
            return False
        target = target.rhs
    if kind(answer) is not kind(target):
        return False
    return not (getattr(target, "is_Number", False) and not getattr(answer, "is_Number", False))


def _constant(value: Any) -> complex | None:
    """The value of an expression without variables; None for everything else."""
    from sympy import Expr

    if not isinstance(value, Expr) or value.free_symbols or not value.is_number:
        return None
    number = complex(value.evalf(20))
    return number if abs(number) < 1e300 else None


if __name__ == "__main__":
    main()
