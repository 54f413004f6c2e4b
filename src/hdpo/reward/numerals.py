"""Numbers as people write them, each with all its readings: 12.500 is twelve and a half or twelve thousand five hundred.

A `Numeral` is exact (a fraction), and knows how it was written: what its last digit is worth, whether it is a fraction, a
power or a word. Nothing here looks at units.
"""
from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache

_SUPERSCRIPT = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_PLAIN = str.maketrans({c: "-" for c in "−–‐‑﹣－"} | {c: " " for c in "\u00a0\u202f\u2009\u2007\u3000"} | {
    "⁄": "/", "＋": "+", "·": "×", "∙": "×", "’": "'"})
_END = r"(?![a-zA-Z])"   # of a command's name
_LATEX = [(re.compile(pattern), to) for pattern, to in (
    (r"\\[dt]frac", r"\\frac"), (r"\\frac\s*(\d)\s*(\d)(?!\d)", r"\\frac{\1}{\2}"), (rf"\\(?:left|right|displaystyle){_END}", ""),
    (r"\\(?:text|mathrm|textrm|mbox|textup)\s*\{([^{}]*)\}", r" \1 "), (r"\\[,;:! ]|~", " "), (r"\{,\}", ","),
    (r"\\%", "%"), (r"\\\$", "$"), (rf"\^\s*\{{?\s*\\(?:circ|degree)\s*\}}?|\\degree{_END}", "°"),
    (rf"\\(?:times|cdot){_END}", "×"), (rf"\\pm{_END}", "±"), (rf"\\le(?:q(?:slant)?)?{_END}", "≤"),
    (rf"\\ge(?:q(?:slant)?)?{_END}", "≥"), (rf"\\lt{_END}", "<"), (rf"\\gt{_END}", ">"), (rf"\\(?:quad|qquad){_END}", " "))]


@lru_cache(maxsize=8192)
def plain(text: str) -> str:
    """`text` with ASCII digits and signs, 10^3 for 10³, 3 1/2 for 3½, and LaTeX's spacing, degrees and \\text taken out."""
    if not text.isascii():
        # superscripts after a digit are powers; after a letter they are a unit's (m²)
        text = re.sub(r"(?<=[\d)])([⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+)", lambda m: "^" + m[1].translate(_SUPERSCRIPT), text)
        text = "".join(_digit(c) for c in text).translate(_PLAIN)
    if "\\" in text or "{" in text or "~" in text:
        for pattern, to in _LATEX:
            text = pattern.sub(to, text)
    return " ".join(text.split())


def _digit(c: str) -> str:
    kind = unicodedata.category(c)
    if kind == "Nd":
        return str(unicodedata.digit(c))
    if kind == "No" and c not in "²³¹⁰⁴⁵⁶⁷⁸⁹" and "⁄" in unicodedata.normalize("NFKC", c):
        return f" {unicodedata.normalize('NFKC', c)}".replace("⁄", "/")
    return c


@dataclass(frozen=True, slots=True)
class Numeral:
    """One reading of one written number."""

    value: Fraction
    ulp: Fraction          # what its last written digit is worth
    decimals: int          # digits behind the decimal sign
    digits: int            # significant digits
    style: str             # "digits", "scientific", "fraction", "mixed", "power" or "words"
    scale: int = 1         # the factor of a word behind it, 10**6 for "million"; already in value and ulp
    likely: bool = True    # the reading that one would take in an English text
    abroad: bool = True    # and in one with decimal commas

    def scaled(self, factor: int) -> Numeral:
        return replace(self, value=self.value * factor, ulp=self.ulp * factor, scale=self.scale * factor)


_SIGN = r"(?P<sign>[+-]\s?)?"
_BODY = (r"(?P<body>\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d{1,2}(?:,\d{2})+,\d{3}(?:\.\d+)?|\d{1,3}(?:\.\d{3})+,\d+|"
         r"\d{1,3}(?:\.\d{3}){2,}|\d{1,3}(?:[ ']\d{3})+(?:[.,]\d+)?|\d+,\d+|\d*\.\d+|\d+\.?(?!\d))")
_POWER = r"(?P<power>[eE][+-]?\d{1,3}|\s?[×x*]\s?10\s?\^\s?\{?[+-]?\d{1,3}\}?)?"
NUMBER = _BODY + _POWER
_WHOLE = re.compile(_SIGN + NUMBER)
_TEN = re.compile(r"(?P<sign>[+-]\s?)?10\s?\^\s?\{?(?P<exponent>[+-]?\d{1,3})\}?")
_RATIO = re.compile(r"(?P<sign>[+-]\s?)?(?:(?P<whole>\d{1,9})(?:\s+|(?=\\)))?(?:(?P<top>\d{1,30})\s?/\s?(?P<bottom>\d{1,30})|"
                    r"\\frac\s*\{\s*(?P<top2>-?\d{1,30})\s*\}\s*\{\s*(?P<bottom2>\d{1,30})\s*\})")
_ONES = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
         "seventeen eighteen nineteen").split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_SMALL = {word: n for n, word in enumerate(_ONES)} | {word: 10 * n for n, word in enumerate(_TENS, start=2)}
_LARGE = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}


@lru_cache(maxsize=8192)
def readings(text: str) -> tuple[Numeral, ...]:
    """Every way to read `text`, which must be one number and nothing else, after `plain`; () where it is none.

    Codes such as 007 are no numbers: their zeros are part of them.
    """
    if not text or len(text) > 80:
        return ()
    if text[-1].isalpha() or text[0].isalpha():
        found = _in_words(text)
        return (found,) if found else ()
    match = _TEN.fullmatch(text)
    if match:
        value = Fraction(10) ** int(match["exponent"]) * _sign(match["sign"])
        return (Numeral(value, abs(value), 0, 1, "power"),)
    match = _RATIO.fullmatch(text)
    if match:
        return _ratio(match)
    match = _WHOLE.fullmatch(text)
    return _decimal(match["body"], _sign(match["sign"]), match["power"] or "") if match else ()


def _sign(text: str | None) -> int:
    return -1 if text and text[0] == "-" else 1


def _ratio(match: re.Match[str]) -> tuple[Numeral, ...]:
    top, bottom = int(match["top"] or match["top2"]), int(match["bottom"] or match["bottom2"])
    if not bottom:
        return ()
    whole = match["whole"]
    if whole is None:
        return (Numeral(Fraction(top, bottom) * _sign(match["sign"]), Fraction(0), 0, 9, "fraction"),)
    if top >= bottom or top <= 0:   # "3 5/4" is no mixed number
        return ()
    return (Numeral((int(whole) + Fraction(top, bottom)) * _sign(match["sign"]), Fraction(0), 0, 9, "mixed"),)


def _decimal(body: str, sign: int, power: str) -> tuple[Numeral, ...]:
    factor = Fraction(1)
    if power:
        factor = Fraction(10) ** int(re.sub(r".*?(?:\^|[eE])", "", power).strip(" {}"))
    found = []
    for digits, likely, abroad in _written(body.rstrip(".") if body.endswith(".") else body):
        whole, _, decimals = digits.partition(".")
        if len(whole) > 1 and whole[0] == "0":   # a code or a telephone number
            return ()
        ulp = factor / 10 ** len(decimals)
        significant = (whole + decimals).lstrip("0")
        value = Fraction(digits if whole else f"0{digits}") * factor * sign
        style = "scientific" if power else "digits"
        found.append(Numeral(value, ulp, len(decimals), max(len(significant), 1), style, likely=likely, abroad=abroad))
    return tuple(found)


def _written(body: str) -> list[tuple[str, bool, bool]]:
    """(digits with a decimal point, likely in English, likely where the comma is the decimal sign) for each reading."""
    if re.fullmatch(r"\d{1,3}(?:[ ']\d{3})+(?:[.,]\d+)?", body):
        return [(re.sub(r"[ ']", "", body).replace(",", "."), True, True)]
    if re.fullmatch(r"\d{1,3}(?:\.\d{3})+,\d+|\d{1,3}(?:\.\d{3}){2,}", body):   # nobody else writes so
        return [(body.replace(".", "").replace(",", "."), True, True)]
    if re.fullmatch(r"[1-9]\d{0,2},\d{3}", body):
        return [(body.replace(",", ""), True, False), (body.replace(",", "."), False, False)]   # abroad: who can tell
    if re.fullmatch(r"\d+,\d+", body):
        return [(body.replace(",", "."), False, True)]
    if re.fullmatch(r"[1-9]\d{0,2}\.\d{3}", body):
        return [(body, True, False), (body.replace(".", ""), False, True)]
    return [(body.replace(",", ""), True, True)]


def _in_words(text: str) -> Numeral | None:
    """"forty-two", "one hundred and twenty", "minus two thousand", "two thirds" and "a half" are numbers."""
    words = re.sub(r"[-\s]+", " ", text.casefold()).split()
    sign = -1 if words[:1] in (["minus"], ["negative"]) else 1
    words = words[1:] if sign < 0 else words
    parts = {"half": 2, "halves": 2, "third": 3, "thirds": 3, "quarter": 4, "quarters": 4, "fourths": 4, "fifths": 5}
    if len(words) == 2 and words[1] in parts and (words[0] == "a" or words[0] in _SMALL):
        top = _SMALL.get(words[0], 1)
        bottom = parts[words[1]]
        return Numeral(Fraction(sign * top, bottom), Fraction(0), 0, 9, "fraction") if 0 < top < bottom else None
    value = _cardinal(words)
    return None if value is None else Numeral(Fraction(sign * value), Fraction(1), 0, len(str(value)), "words")


def _cardinal(words: list[str]) -> int | None:
    if not words or len(words) > 12:
        return None
    total = group = 0
    last = ""    # what may follow what: "twenty three", but not "three twenty"
    for word in words:
        if word == "and" and last in ("hundred", "large"):
            continue
        if word in _SMALL and (last in ("", "hundred", "large", "and") or last == "tens" and 0 < _SMALL[word] < 10):
            group += _SMALL[word]
            last = "tens" if _SMALL[word] >= 20 else "ones"
        elif word == "hundred" and last in ("ones", "tens") and 0 < group < 100:
            group, last = group * 100, "hundred"
        elif word in _LARGE and last in ("ones", "tens", "hundred") and (not total or total % (1000 * _LARGE[word]) == 0):
            total, group, last = total + group * _LARGE[word], 0, "large"
        else:
            return None
    return total + group if last else None
