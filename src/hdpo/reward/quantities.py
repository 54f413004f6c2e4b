"""Quantities: a number with a scale, a currency, a unit or a counted thing, and whether two of them are the same.

`parse_quantities` reads a whole string or nothing; it never picks a number out of a sentence. `compare` is True, False or
None: can't tell, which is always the answer when units, scales, separators or roundings leave room for doubt.
"""
from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache

from hdpo.reward.asked import SCALES, Asked
from hdpo.reward.numerals import NUMBER, Numeral, plain, readings
from hdpo.reward.same_number import same_number
from hdpo.reward.units import UNSURE, Unit, same_noun, unit_of

_CURRENCY = r"US\$|[$€£¥₹]"
_UNIT_WORD = r"(?:[^\W\d_]|[°%$€£¥₹℃℉])(?:[^\W\d_]|[°$/²³]|\^[23])*"
_QUANTITY = re.compile(
    rf"(?P<sign>[+-]\s?)?(?P<money>{_CURRENCY})?\s?(?P<sign2>[+-])?"
    rf"(?P<number>\d{{1,9}}\s+\d{{1,30}}\s?/\s?\d{{1,30}}|\d{{0,9}}\\frac\s*\{{-?\d{{1,30}}\}}\s*\{{\d{{1,30}}\}}|"
    rf"\d{{1,30}}\s?/\s?\d{{1,30}}|"
    rf"10\s?\^\s?\{{?[+-]?\d{{1,3}}\}}?|{NUMBER.replace('?P<body>', '?:').replace('?P<power>', '?:')})"
    r"(?:(?:[\s-]?(?P<scale>hundred|thousand|million|billion|trillion|dozen|lakh|crore|bn|mn)s?)(?![A-Za-z/])|"
    r"(?P<letter>[kKMBTm])(?![A-Za-z/²³^]))?"
    rf"(?P<gap>[\s-]?)(?P<unit>{_UNIT_WORD}(?: {_UNIT_WORD}){{0,2}})?")
_LETTERS = {"k": 10**3, "K": 10**3, "M": 10**6, "m": 10**6, "B": 10**9, "T": 10**12}
_ORDINALS = {word: n for n, word in enumerate(
    "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth fifteenth "
    "sixteenth seventeenth eighteenth nineteenth twentieth".split(), start=1)}
NOTHING = Asked()   # a question that isn't known
ORDINAL, DECADE = "-th", "-s"   # no unit is written so


@dataclass(frozen=True, slots=True)
class Quantity:
    """One reading of a number with what stood around it."""

    number: Numeral
    unit: Unit | None = None   # None: no unit, or one that isn't known
    unit_text: str = ""        # as written, "" when there was none
    likely: bool = True        # as far as the unit goes; the number has its own doubts

    @property
    def bare(self) -> bool:
        return not self.unit_text


@lru_cache(maxsize=8192)
def parse_quantities(text: str, warm: bool = False) -> tuple[Quantity, ...]:
    """The readings of the quantity that is the WHOLE of `text`, likeliest first; () if it is none. `warm`: K is kelvin."""
    text = plain(text)
    if not text or len(text) > 80:
        return ()
    if text[0].isalpha() and not text.startswith("US$"):
        return _in_words(text)
    match = _QUANTITY.fullmatch(text)
    if not match or match["sign"] and match["sign2"] or match["gap"] == "-" and not match["unit"]:
        return ()
    sign = "-" if "-" in (match["sign"] or "") + (match["sign2"] or "") else ""
    numbers = readings(sign + match["number"].strip())
    unit, money = match["unit"] or "", match["money"] or ""
    if not numbers or money and unit or unit.casefold().split(" ")[0].removesuffix("s") in SCALES:
        return ()   # "$5 each", "83 thousand million": let somebody else decide
    if match["scale"]:
        numbers = tuple(n.scaled(SCALES[match["scale"]]) for n in numbers)
    found = [_with_unit(number, unit or money, match["gap"]) for number in numbers]
    return tuple(r for q in found for r in (_lettered(q, match["letter"], warm) if match["letter"] else [q]))


def _with_unit(number: Numeral, unit: str, gap: str) -> Quantity:
    attached = not gap
    if attached and unit in ("st", "nd", "rd", "th") and number.decimals == 0:
        return Quantity(number, None, ORDINAL)
    if attached and unit == "s" and number.style == "digits" and number.value % 10 == 0 and 20 <= number.value < 2100:
        return Quantity(number, None, DECADE)
    return Quantity(number, unit_of(unit) if unit else None, unit)


def _lettered(quantity: Quantity, letter: str, warm: bool) -> list[Quantity]:
    """Readings of "300K": a factor, or a unit. Money counts in millions, what is warm in kelvin."""
    factor = replace(quantity, number=quantity.number.scaled(_LETTERS[letter]))
    if quantity.unit_text:
        return [factor] if letter != "m" or quantity.unit and quantity.unit[0] in ("dollar", "euro", "pound sterling") else []
    unit = replace(quantity, unit=unit_of(letter), unit_text=letter)
    if letter == "K":
        return [unit] if warm else [factor, replace(unit, likely=False)]
    if letter in "kM":
        return [factor]
    return [replace(unit, likely=letter == "m"), replace(factor, likely=False)]


def _in_words(text: str) -> tuple[Quantity, ...]:
    words = text.split(" ")
    if text.casefold() in _ORDINALS:
        n = Fraction(_ORDINALS[text.casefold()])
        return (Quantity(Numeral(n, Fraction(1), 0, 2, "words"), None, ORDINAL),)
    for count in range(len(words), max(len(words) - 4, 0), -1):
        found = readings(" ".join(words[:count]))
        if found:
            unit = " ".join(words[count:])
            if unit in ("or", "and", "to"):
                return ()
            return tuple(Quantity(n, unit_of(unit) if unit else None, unit) for n in found)
    return ()


def compare(predictions: tuple[Quantity, ...], golds: tuple[Quantity, ...], asked: Asked = NOTHING) -> bool | None:
    """Whether two quantities are the same, over all their readings: the likely ones decide, the others may object."""
    likely = [(p, g) for p in predictions for g in golds if _likely(p, asked) and _likely(g, asked)]
    first = compare_one(*likely[0], asked) if likely else None
    if first is True:
        return True
    if first is None and likely:
        return None
    others = [compare_one(p, g, asked) for p in predictions for g in golds]
    return False if all(other is False for other in others) else None


def _likely(quantity: Quantity, asked: Asked) -> bool:
    return quantity.likely and (quantity.number.abroad if asked.foreign else quantity.number.likely)


def compare_one(prediction: Quantity, gold: Quantity, asked: Asked) -> bool | None:
    if prediction.bare != gold.bare:
        return _one_unit(prediction, gold, asked)
    if {prediction.unit_text, gold.unit_text} & {ORDINAL, DECADE} and prediction.unit_text != gold.unit_text:
        return None
    if prediction.unit and gold.unit:
        if prediction.unit[0] != gold.unit[0]:
            unsure = {prediction.unit[0], gold.unit[0]} <= UNSURE or "yen or yuan" in (prediction.unit[0], gold.unit[0]) or any(
                len(q.unit_text) == 1 and q.unit_text.isalpha() for q in (prediction, gold))   # "5m": metres or minutes?
            return None if unsure else False
        if prediction.unit[1] != gold.unit[1]:
            return _converted(prediction, gold, asked)
    elif prediction.unit or gold.unit or not same_noun(prediction.unit_text, gold.unit_text):
        return None
    return same_number(prediction.number, gold.number, asked, with_unit=not gold.bare)


def _converted(prediction: Quantity, gold: Quantity, asked: Asked) -> bool | None:
    """Other units mean other roundings: 1 mile for 1.6 km is a matter of taste, 1 mile for 5 km is not."""
    assert prediction.unit and gold.unit
    a, b = prediction.number.value * prediction.unit[1], gold.number.value * gold.unit[1]
    if a == b:
        return None if asked.converts or asked.form or asked.text and _holds_quantity(asked.text, prediction) else True
    return None if abs(a - b) <= abs(b) / 20 else False


def _holds_quantity(text: str, quantity: Quantity) -> bool:
    """Whether a question gives this very value in this very unit: then it was not worked out."""
    for match in re.finditer(rf"(\d[\d.,]*)[\s-]?({_UNIT_WORD}(?: [a-z]+)?)", text):
        numbers = readings(match[1].rstrip(".,"))
        units = {unit_of(match[2]), unit_of(match[2].split(" ")[0])} - {None}
        if quantity.unit in units and any(n.value == quantity.number.value for n in numbers):
            return True
    return False


def _one_unit(prediction: Quantity, gold: Quantity, asked: Asked) -> bool | None:
    """Only one side names a unit: fine if the question asks in exactly that unit, or counts exactly that thing."""
    with_unit = gold if prediction.bare else prediction
    if with_unit.unit_text in (ORDINAL, DECADE):   # the 1990s are no year
        return False if with_unit.unit_text == DECADE and re.search(r"\byear\b", asked.text.casefold()) else None
    if asked.scales and with_unit.number.scale == 1:
        return None   # "how many thousand visitors": 45 visitors are not 45
    if with_unit.unit and with_unit.unit[0] == "ratio":
        return _percent(prediction, gold, asked)
    return same_number(prediction.number, gold.number, asked, with_unit=True) if _asks_in(asked, with_unit) else None


def _percent(prediction: Quantity, gold: Quantity, asked: Asked) -> bool | None:
    a, b = (q.number.value * (q.unit or ("", Fraction(1)))[1] for q in (prediction, gold))
    bare = prediction if prediction.bare else gold
    as_said = same_number(prediction.number, gold.number, asked, with_unit=True)
    if asked.percent:
        return None if as_said is False and (a == b or abs(a - b) <= bare.number.ulp / 2) else as_said
    if not asked.share or asked.form or not 0 <= bare.number.value <= 1:
        return None
    if as_said is not False:   # 0.45% of something, or 0.45 of it
        return None
    return a == b or (None if abs(a - b) <= max(bare.number.ulp, Fraction(1, 100)) else False)


_COUNTED = r"(?:(?!of\b|pairs?\b|dozen\b|thousand|million|billion|hundred)[a-z]+ ){0,2}"


def _asks_in(asked: Asked, quantity: Quantity) -> bool:
    if not asked.text:
        return False
    low = asked.text.casefold()
    if quantity.unit is None:   # a counted thing: "how many red apples" makes "7 apples" the number 7
        noun = re.escape(quantity.unit_text.casefold())
        return bool(re.search(rf"how many {_COUNTED}{noun}(?![\w-])", low))
    explicit = _units_in(rf"(?:how many|\bin|[(\[](?:in )?|/)\s*({_UNIT_WORD}(?: [a-z]+){{0,2}})", asked.text)
    own = {unit for unit in explicit if unit[0] == quantity.unit[0]}
    if not own:
        mentioned = _units_in(rf"(?<![\w'’-])({_UNIT_WORD})(?![\w'’])", asked.text, single_letters=False)
        own = {unit for unit in mentioned if unit[0] == quantity.unit[0]}
    return own == {quantity.unit}


def _units_in(pattern: str, text: str, single_letters: bool = True) -> set[Unit]:
    found: set[Unit] = set()
    for match in re.finditer(pattern, text, re.IGNORECASE):
        words = match[1].split(" ")
        for count in range(len(words), 0, -1):   # the longest name wins: square meters are no meters
            name = " ".join(words[:count])
            unit = unit_of(name) if name != "in" and (single_letters or len(name) > 1 or name in "%$€£¥₹°") else None
            if unit:
                found.add(unit)
                break
    return found
