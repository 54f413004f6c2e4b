"""The process behind `hdpo.reward.maths`: one JSON question per line in, one verdict per line out.

{"prediction": "x+1", "gold": "1+x", "seconds": 5.0, "alike": true, ...} -> "correct", "wrong" or "unscored". Time and
memory limits are the kernel's: their signals keep their default action, which ends the process, whatever C code is running.
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
            verdict = _compare(request)
        except Exception:  # noqa: BLE001  (process boundary; sympy raises nearly everything, MemoryError included)
            verdict = "unscored"
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        replies.write(verdict + "\n")
        replies.flush()


def _read(text: str) -> Any:
    from math_verify import LatexExtractionConfig, parse
    found = parse(f"${text}$", [LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None)
    return found[0] if len(found) == 1 else None


def _compare(request: dict[str, Any]) -> str:
    from math_verify import verify

    target, answer = _read(request["gold"]), _read(request["prediction"])
    if target is None or answer is None or not _comparable(answer, target):
        return "unscored"
    said, true = _constant(answer), _constant(target)
    relative = None if said is None or true is None else abs(said - true) / (abs(true) or 1.0)
    if verify(target, answer, timeout_seconds=None):
        # math-verify rounds to 6 places, which makes all tiny numbers equal
        if relative is not None and relative > 1e-9:
            return "unscored"
        free = request["any_form"] and not any(_is_given(text, target) for text in request["given"])
        return "correct" if request["alike"] or free else "unscored"
    if relative is not None:
        rounded = "." in request["gold"] + request["prediction"] or answer.is_rational != target.is_rational   # 79 for 25 pi
        return "wrong" if relative > (_CLEARLY_DIFFERENT if rounded else 1e-9) else "unscored"
    return "wrong" if request["one_right"] and _differ(answer, target) else "unscored"


def _is_given(text: str, target: Any) -> bool:
    """Whether an expression of the question has the value of the ground truth; one that can't be read might have."""
    from math_verify import verify
    expression = _read(text)
    return expression is None or bool(verify(target, expression, timeout_seconds=None))


def _differ(answer: Any, target: Any) -> bool:
    """Whether two polynomials or rational functions of the same variables are certainly not the same."""
    from sympy import Expr, together
    if not (isinstance(answer, Expr) and isinstance(target, Expr) and answer.free_symbols):
        return False
    symbols = answer.free_symbols
    if symbols != target.free_symbols or not (answer.is_rational_function(*symbols) and target.is_rational_function(*symbols)):
        return False
    return bool(together(answer - target).as_numer_denom()[0].expand() != 0)


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
