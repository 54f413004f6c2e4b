"""Mathematics that needs no algebra system: exact rationals, x = 11, sets of solutions, inequalities and intervals.

Two exact values are equal or they are not; that is certain, takes microseconds and needs no judge. What an expression
leaves undone (2^10 for 1024) is never CORRECT here, but an expression of another value is WRONG.
"""
from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from hdpo.reward.numerals import plain

_MAX_CHARS = 200
_MAX_BITS = 20_000
_TOKEN = re.compile(r"\s*(?:(\d+(?:\.\d+)?|\.\d+)|(\\frac|\\sqrt|√|\\div|\*\*|[-+*/^(){}!×÷]))")


@dataclass(frozen=True, slots=True)
class Exact:
    """`done`: nothing is left to work out: a number, or a fraction in lowest terms. `reading`: "5!" may be five, loudly."""

    value: Fraction
    done: bool
    loud: Fraction | None = None


class _NotExactError(Exception):
    pass


class _Parser:
    """Recursive descent over + - * / ^ ! \\frac \\sqrt, brackets and nothing else."""

    def __init__(self, text: str) -> None:
        self.tokens: list[str] = []
        position = 0
        text = text.rstrip()
        while position < len(text):
            match = _TOKEN.match(text, position)
            if not match:
                raise _NotExactError
            self.tokens.append(match[1] or match[2])
            position = match.end()
        self.at = self.depth = 0

    def next(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self, *expected: str) -> str:
        token = self.next()
        if not token or expected and token not in expected:
            raise _NotExactError
        self.at += 1
        return token

    def all(self) -> Fraction:
        value = self.sum()
        if self.at != len(self.tokens):
            raise _NotExactError
        return value

    def sum(self) -> Fraction:
        self.depth += 1
        if self.depth > 40:
            raise _NotExactError
        value = self.product()
        while self.next() in ("+", "-"):
            sign = self.take()
            other = self.product()
            value = value + other if sign == "+" else value - other
        self.depth -= 1
        return value

    def product(self) -> Fraction:
        value = self.signed()
        while self.next() in ("*", "×", "/", "÷", "\\div") or self.next() in ("(", "\\frac", "\\sqrt", "√"):
            sign = self.take() if self.next() in ("*", "×", "/", "÷", "\\div") else "*"
            if sign == "*" and self.tokens[self.at] == "\\frac" and re.fullmatch(r"\d+", self.tokens[self.at - 1]):
                value = value + self.power() if value >= 0 else value - self.power()   # 2\frac{1}{4} is a mixed number
                continue
            other = self.signed()
            if sign in ("*", "×"):
                value = _small(value * other)
            elif other:
                value = _small(value / other)
            else:
                raise _NotExactError
        return value

    def signed(self) -> Fraction:
        if self.next() in ("+", "-"):
            return self.signed() if self.take() == "+" else -self.signed()
        return self.power()

    def power(self) -> Fraction:
        base = self.atom()
        while self.next() == "!":
            self.take()
            if base.denominator != 1 or not 0 <= base < 3000:
                raise _NotExactError
            base = _small(Fraction(math.factorial(int(base))))
        if self.next() in ("^", "**"):
            self.take()
            exponent = self.signed() if self.next() != "{" else self.atom()
            if exponent.denominator != 1 or abs(exponent) > 2000 or not base and exponent <= 0:
                raise _NotExactError
            if base and (abs(base.numerator).bit_length() + base.denominator.bit_length()) * abs(exponent) > _MAX_BITS:
                raise _NotExactError
            return Fraction(base ** int(exponent))
        return base

    def atom(self) -> Fraction:
        token = self.take()
        if token == "\\frac":
            top, bottom = self.braced(), self.braced()
            if not bottom:
                raise _NotExactError
            return top / bottom
        if token in ("\\sqrt", "√"):
            inside = self.braced() if self.next() in ("{", "(") else self.atom()
            return _root(inside)
        if token in ("(", "{"):
            value = self.sum()
            self.take(")" if token == "(" else "}")
            return value
        if token[0].isdigit() or token[0] == ".":
            return Fraction(token)
        raise _NotExactError

    def braced(self) -> Fraction:
        opening = self.take("{", "(")
        value = self.sum()
        self.take("}" if opening == "{" else ")")
        return value


def _small(value: Fraction) -> Fraction:
    if value.numerator.bit_length() + value.denominator.bit_length() > _MAX_BITS * 2:
        raise _NotExactError
    return value


def _root(value: Fraction) -> Fraction:
    if value < 0:
        raise _NotExactError
    top, bottom = math.isqrt(value.numerator), math.isqrt(value.denominator)
    if top * top != value.numerator or bottom * bottom != value.denominator:
        raise _NotExactError
    return Fraction(top, bottom)


_DONE = re.compile(r"[+-]?\s?(?:\d{1,3}(?:,\d{3})+|\d+(?:\.\d+)?|\.\d+)")
_DONE_FRACTION = re.compile(r"[+-]?\s?(?:(?P<whole>\d+)\s*)?(?:\\frac\s*\{\s*-?(?P<top>\d+)\s*\}\s*\{\s*(?P<bottom>\d+)\s*\}|"
                            r"(?:(?<=\s)|(?<![\d\s]))(?P<top2>\d+)\s?/\s?(?P<bottom2>\d+))")
_PRODUCT = re.compile(r"\d+(?:\s*[×x*]\s*\d+)+|\d+(?:\s*-\s*\d+)+|\d+(?:\s*:\s*\d+)+")


def is_dimension(text: str) -> bool:
    """3 x 2, 640*480 or 2-1: sizes and scores, whose order counts and which nobody works out."""
    return bool(_PRODUCT.fullmatch(plain(text)))


_NO_NUMBER = re.compile(r"(?<![\d.])0\d|\d\s?/\s?\d+\s?/\s?\d|\d\s+\d{1,2}(?![\d\s/]|\s?/)")   # 007, 12/25/2020, 3 4


@lru_cache(maxsize=4096)
def exact(text: str) -> Exact | None:
    """The rational value of an expression of numbers alone; None for anything else. Takes at most some milliseconds."""
    text = plain(text)
    if not text or len(text) > _MAX_CHARS or not any(c.isdigit() for c in text) or is_dimension(text) or _NO_NUMBER.search(text):
        return None
    squeezed = re.sub(r"(?<=\d),(?=\d{3}(?:\D|$))", "", text)
    squeezed = re.sub(r"(?<![\d.])(\d+) (\d+)\s?/\s?(\d+)(?!\d)", r"(\1+\2/\3)", squeezed)   # a mixed number
    if "," in squeezed:
        return None
    try:
        value = _Parser(squeezed).all()
        loud = _Parser(squeezed[:-1]).all() if squeezed.endswith("!") else None
    except (_NotExactError, IndexError, RecursionError):
        return None
    return Exact(value, _is_done(text), loud)


def _is_done(text: str) -> bool:
    if _DONE.fullmatch(text):
        return True
    match = _DONE_FRACTION.fullmatch(text)
    if not match:
        return False
    top, bottom = int(match["top"] or match["top2"]), int(match["bottom"] or match["bottom2"])
    return bottom > 1 and math.gcd(top, bottom) == 1


# --- x = 11, and sets of solutions ------------------------------------------------------------------------------------

_NAME = r"(?:\\[a-z]+|[A-Za-z](?:_\{?\w+\}?)?'?|\\angle\s*[A-Z]+|∠\s*[A-Z]+|[A-Z]{2,3}|[a-z]\(\s*-?\w+\s*\))"
_ASSIGNED = re.compile(rf"(?P<name>{_NAME})\s*=\s*(?P<value>[^=]+)")
_ALTERNATIVE = re.compile(r"\\lor\b|\\vee\b|∨|\bor\b|;|,(?!\d{3}(?!\d))\s*(?:and\b|or\b)?|\band\b")
_SET = re.compile(r"(?:(?P<name>[A-Za-z])\s*(?:\\in|∈)\s*)?\\?\{(?P<items>.+?)\\?\}")


@dataclass(frozen=True, slots=True)
class Solutions:
    """The values given for one name ("" if none was given), and whether it was written as a set or with a name."""

    name: str
    values: frozenset[Fraction]
    marked: bool
    done: bool


@lru_cache(maxsize=4096)
def solutions(text: str) -> Solutions | None:
    """What "x = 2", "x = 2 or x = 3", "{2, 3}", "x = ±2" and "11" say; None unless every value is an exact rational."""
    text = plain(text)
    if not text or len(text) > _MAX_CHARS:
        return None
    match = _SET.fullmatch(text)
    name, marked = (match["name"] or "" if match else ""), bool(match)
    values: set[Fraction] = set()
    done = True
    parts = _ALTERNATIVE.split(match["items"] if match else text)
    for part in parts:
        assigned = _ASSIGNED.fullmatch(part.strip())
        if assigned:
            if name and name != assigned["name"]:
                return None
            name, part, marked = assigned["name"], assigned["value"], True
        both = part.strip().startswith("±")
        value = exact(part.strip().removeprefix("±").strip())
        if value is None or value.loud is not None:
            return None
        values |= {value.value, -value.value} if both else {value.value}
        done &= value.done
        marked |= both
    return Solutions(name, frozenset(values), marked, done) if marked or len(parts) == 1 else None


# --- inequalities and intervals ---------------------------------------------------------------------------------------

_INFINITE = {"∞": 1, "+∞": 1, "-∞": -1, r"\infty": 1, r"+\infty": 1, r"-\infty": -1}
_RELATION = re.compile(r"\s*(<=|>=|=<|=>|<|>|≤|≥)\s*")
_FLIPPED = {"<": ">", ">": "<", "≤": "≥", "≥": "≤"}
_INTERVAL = re.compile(r"(?:(?P<name>[a-zA-Z])\s*(?:\\in|∈)\s*)?"
                       r"(?P<open>[(\[])(?P<low>[^,;]+)[,;](?P<high>[^,;]+)(?P<close>[)\]])")

Bounds = tuple[str, Fraction | None, bool, Fraction | None, bool]
"""(name or "", lower bound or None, whether it belongs to it, upper bound or None, whether it belongs to it)"""


@lru_cache(maxsize=4096)
def bounds(text: str) -> Bounds | None:
    """The numbers that "x > 3", "3 < x", "1 <= x < 2" or "[1, 2)" stand for; None for everything else. (1, 2) may be a
    point and is none.
    """
    text = plain(text)
    if len(text) > _MAX_CHARS:
        return None
    match = _INTERVAL.fullmatch(text)
    if match:
        ends = [_INFINITE[e.strip()] * Fraction(10) ** 300 if e.strip() in _INFINITE else getattr(exact(e.strip()), "value", None)
                for e in (match["low"], match["high"])]
        mixed = match["open"] + match["close"] in ("[)", "(]")
        if None in ends or not (mixed or any(e.strip() in _INFINITE for e in (match["low"], match["high"])) or match["name"]):
            return None
        low, high = (None if abs(e) == Fraction(10) ** 300 else e for e in ends if e is not None)
        low_in, high_in = match["open"] == "[" and low is not None, match["close"] == "]" and high is not None
        return (match["name"] or "", low, low_in, high, high_in)
    parts = _RELATION.split(text)
    signs = [{"<=": "≤", "=<": "≤", ">=": "≥", "=>": "≥"}.get(s, s) for s in parts[1::2]]
    sides = parts[0::2]
    if len(sides) == 2 and exact(sides[0]) and re.fullmatch(_NAME, sides[1]):
        sides, signs = sides[::-1], [_FLIPPED[signs[0]]]
    if len(sides) == 2 and re.fullmatch(_NAME, sides[0]):
        value = exact(sides[1])
        if value is None:
            return None
        closed = signs[0] in "≤≥"
        return (sides[0], None, False, value.value, closed) if signs[0] in "<≤" else (sides[0], value.value, closed, None, False)
    if len(sides) == 3 and re.fullmatch(_NAME, sides[1]) and ({*signs} <= set("<≤") or {*signs} <= set(">≥")):
        ends2 = [exact(sides[0]), exact(sides[2])]
        if ends2[0] is None or ends2[1] is None:
            return None
        (low, low_sign), (high, high_sign) = ((ends2[0].value, signs[0]), (ends2[1].value, signs[1])) if signs[0] in "<≤" else (
            (ends2[1].value, signs[1]), (ends2[0].value, signs[0]))
        return (sides[1], low, low_sign in "≤≥", high, high_sign in "≤≥") if low <= high else None
    return None
