"""Numbers as people write them: signs, separators, powers of ten, number words, fractions, currencies and units.

`parse_quantity` reads a whole string or nothing; it never picks a number out of a sentence. `compare` says whether two
quantities are equal, or that it can't tell (None), which is always the answer when units leave room for doubt.
"""
from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

Unit = tuple[str, Decimal]
"""(dimension, factor to its base unit)"""

_SYMBOLS = {   # case matters: mW is not MW
    "length": "nm:1e-9 µm:1e-6 um:1e-6 mm:0.001 cm:0.01 dm:0.1 m:1 km:1000 in:0.0254 ft:0.3048 yd:0.9144 mi:1609.344",
    "mass": "µg:1e-6 mg:0.001 g:1 kg:1000 lb:453.59237 lbs:453.59237 oz:28.349523125",
    "time": "ns:1e-9 µs:1e-6 ms:0.001 s:1 sec:1 secs:1 min:60 mins:60 h:3600 hr:3600 hrs:3600",
    "volume": "ml:1e-6 mL:1e-6 cl:1e-5 l:0.001 L:0.001 mm³:1e-9 cm³:1e-6 m³:1 mm^3:1e-9 cm^3:1e-6 m^3:1",
    "area": "mm²:1e-6 cm²:1e-4 m²:1 km²:1e6 mm^2:1e-6 cm^2:1e-4 m^2:1 km^2:1e6 sqft:0.09290304 ha:1e4",
    "speed": "m/s:1 km/h:0.2777777777777777778 kph:0.2777777777777777778 mph:0.44704",
    "acceleration": "m/s²:1 m/s^2:1",
    "celsius": "°C:1 ℃:1", "fahrenheit": "°F:1 ℉:1", "kelvin": "K:1",
    "angle": "°:1 rad:57.29577951308232088",
    "data": "B:1 KB:1e3 kB:1e3 MB:1e6 GB:1e9 TB:1e12",
    "energy": "J:1 kJ:1e3 MJ:1e6", "power": "mW:0.001 W:1 kW:1e3 MW:1e6", "voltage": "mV:0.001 V:1 kV:1e3",
    "current": "mA:0.001 A:1", "resistance": "Ω:1 kΩ:1e3", "frequency": "Hz:1 kHz:1e3 MHz:1e6 GHz:1e9",
    "force": "N:1 kN:1e3", "pressure": "Pa:1 kPa:1e3 MPa:1e6",
    "ratio": "%:0.01", "dollar": "$:1 US$:1 USD:1", "euro": "€:1 EUR:1", "pound": "£:1 GBP:1", "rupee": "₹:1 INR:1",
    "yen": "¥:1 JPY:1",
}
_NAMES = {   # singular and plural, case ignored
    "length": "millimeter:0.001 millimetre:0.001 centimeter:0.01 centimetre:0.01 meter:1 metre:1 kilometer:1000 "
              "kilometre:1000 inch:0.0254 foot:0.3048 yard:0.9144 mile:1609.344",
    "mass": "milligram:0.001 gram:1 kilogram:1000 kilo:1000 ounce:28.349523125",
    "time": "millisecond:0.001 second:1 minute:60 hour:3600 day:86400 week:604800",
    "volume": "milliliter:1e-6 millilitre:1e-6 liter:0.001 litre:0.001",
    "angle": "degree:1 deg:1 radian:57.29577951308232088",
    "celsius": "celsius:1", "fahrenheit": "fahrenheit:1", "kelvin": "kelvin:1",
    "energy": "joule:1 kilojoule:1e3", "power": "watt:1 kilowatt:1e3 megawatt:1e6", "voltage": "volt:1",
    "current": "ampere:1 amp:1", "resistance": "ohm:1", "frequency": "hertz:1", "force": "newton:1", "pressure": "pascal:1",
    "ratio": "percent:0.01", "dollar": "dollar:1", "euro": "euro:1", "rupee": "rupee:1", "yen": "yen:1",
}
_IRREGULAR = {"inches": "inch", "feet": "foot"}


def _table(source: dict[str, str]) -> dict[str, Unit]:
    return {name: (dimension, Decimal(factor)) for dimension, text in source.items()
            for name, _, factor in (item.partition(":") for item in text.split())}


_BY_SYMBOL, _BY_NAME = _table(_SYMBOLS), _table(_NAMES)
_MULTIPLIERS = {"hundred": 10**2, "thousand": 10**3, "k": 10**3, "K": 10**3, "million": 10**6, "M": 10**6,
                "billion": 10**9, "bn": 10**9, "trillion": 10**12}
_ONES = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
         "seventeen eighteen nineteen").split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_WORDS = {word: n for n, word in enumerate(_ONES)} | {word: 10 * n for n, word in enumerate(_TENS, start=2)}

_CURRENCY = r"US\$|[$€£¥₹]"
_UNIT_WORD = r"(?:[^\W\d_]|[°%$€£¥₹℃℉])(?:[^\W\d_]|[°$/^²³]|(?<=\^)[23])*"
_UNSURE = {"angle", "celsius", "fahrenheit", "kelvin"}   # "25 degrees" may be any of them, and 0 °C is 32 °F
_QUANTITY = re.compile(
    rf"(?P<sign>[+-]?)(?P<money>{_CURRENCY})?\s?(?P<sign2>[+-]?)"
    r"(?P<number>\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d{1,3}(?: \d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
    r"(?P<power>[eE][+-]?\d{1,3}|\s?(?:×|x|\*|\\times|\\cdot)\s?10\s?\^\s?\{?[+-]?\d{1,3}\}?)?"
    r"(?:\s?/\s?(?P<denominator>\d+))?"
    r"(?:(?:\s?(?P<multiplier>hundred|thousand|million|billion|trillion|bn)|(?P<letter>[kKM]))(?![A-Za-z/]))?"
    rf"\s?(?P<unit>{_UNIT_WORD}(?: {_UNIT_WORD}){{0,2}})?")
_WORD_QUANTITY = re.compile(r"(?P<words>[a-z]+(?:[- ][a-z]+)?)")
_TRANSLATE = str.maketrans("−–\u00a0\u202f\u2009", "--   ")
_MAX_CHARS = 80   # nobody writes a number longer than this


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number with what stood around it."""

    value: Decimal             # in the unit it was written in
    decimals: int              # digits after the point
    digits: int                # significant digits
    fraction: bool             # written as a/b
    unit: Unit | None          # None: no unit, or one that isn't known
    unit_text: str             # as written, "" when there was none

    @property
    def plain(self) -> bool:
        return not self.unit_text


def unit_of(text: str) -> Unit | None:
    if text in _BY_SYMBOL:
        return _BY_SYMBOL[text]
    name = " ".join(text.casefold().split()).removeprefix("degrees ").removeprefix("degree ")
    name = _IRREGULAR.get(name, name)
    return _BY_NAME.get(name) or (_BY_NAME.get(name[:-1]) if name.endswith("s") else None)


def parse_quantity(text: str) -> Quantity | None:
    """The quantity that is the WHOLE of `text`, or None. Codes such as "007" and approximations are not quantities."""
    text = text.strip().translate(_TRANSLATE)
    if not text or len(text) > _MAX_CHARS:
        return None
    if text[0].isalpha() and not text.startswith("US$"):
        return _number_in_words(text)
    match = _QUANTITY.fullmatch(text)
    if not match or (match["sign"] and match["sign2"]):
        return None
    digits = match["number"].replace(",", "").replace(" ", "")
    whole, _, decimals = digits.partition(".")
    if len(whole) > 1 and whole[0] == "0":   # a code or a telephone number: its zeros are part of it
        return None
    try:
        value = Decimal(digits) * (-1 if "-" in match["sign"] + match["sign2"] else 1)
        if match["power"]:
            exponent = re.sub(r".*?(?:\^|[eE])", "", match["power"]).strip(" {}")
            value *= Decimal(10) ** int(exponent)
        if match["denominator"]:
            value /= Decimal(match["denominator"])
    except (InvalidOperation, ZeroDivisionError):
        return None
    value *= _MULTIPLIERS.get(match["multiplier"] or match["letter"], 1)
    unit_text = match["unit"] or ""
    if match["money"] and unit_text:   # "$5 each", "$5 USD": let somebody else decide
        return None
    unit_text = unit_text or match["money"] or ""
    significant = len((whole + decimals).lstrip("0"))
    return Quantity(value, len(decimals), significant, bool(match["denominator"]), unit_of(unit_text), unit_text)


def _number_in_words(text: str) -> Quantity | None:
    match = _WORD_QUANTITY.fullmatch(text.casefold())
    if not match:
        return None
    first, _, second = match["words"].replace("-", " ").partition(" ")
    if first not in _WORDS:
        return None
    value = _WORDS[first]
    if second in _ONES[1:10] and value >= 20:
        return Quantity(Decimal(value + _WORDS[second]), 0, 2, False, None, "")
    return Quantity(Decimal(value), 0, 1, False, unit_of(second), second)


def compare(prediction: Quantity, gold: Quantity, question: str = "") -> bool | None:
    """Whether the prediction equals the gold quantity; None when the units leave room for doubt.

    Tolerance: equal to one part in a million; or, when the coarser of the two has a decimal point and at least three
    significant digits, equal after rounding to it (at most 0.5 %). Integers are never rounded.
    """
    if prediction.plain != gold.plain:
        return _compare_one_unit(prediction, gold, question)
    if prediction.unit and gold.unit:
        if prediction.unit[0] != gold.unit[0]:
            unsure = {prediction.unit[0], gold.unit[0]} <= _UNSURE or any(
                len(q.unit_text) == 1 and q.unit_text.isalpha() for q in (prediction, gold))   # "5m": metres or minutes?
            return None if unsure else False
        if prediction.unit[1] != gold.unit[1]:
            a, b = prediction.value * prediction.unit[1], gold.value * gold.unit[1]
            # other units mean other roundings: 1 mile for 1.6 km is a matter of taste, 1 mile for 5 km is not
            return True if _same(a, b) else (None if _near(a, b) else False)
    elif prediction.unit or gold.unit or _singular(prediction.unit_text) != _singular(gold.unit_text):
        return None
    return _same(prediction.value, gold.value) or _rounds_to(prediction, gold)


def _compare_one_unit(prediction: Quantity, gold: Quantity, question: str) -> bool | None:
    """Only one side names a unit: fine if the question asks in exactly that unit, or counts exactly that thing."""
    with_unit = gold if prediction.plain else prediction
    if _asks_in(question, with_unit):
        return _same(prediction.value, gold.value) or _rounds_to(prediction, gold)
    if with_unit.unit and with_unit.unit[0] == "ratio" and _same(
            prediction.value * (prediction.unit or ("", Decimal(1)))[1], gold.value * (gold.unit or ("", Decimal(1)))[1]):
        return True   # 45% and 0.45
    return None


def _asks_in(question: str, quantity: Quantity) -> bool:
    if not question:
        return False
    if quantity.unit is None:   # a counted thing: "how many red apples" makes "7 apples" the number 7
        noun = re.escape(quantity.unit_text.casefold())
        return bool(re.search(rf"how many (?:(?!of\b)[a-z]+ ){{0,2}}{noun}\b", question.casefold()))
    words = re.findall(rf"(?:km|m|cm|mm)[²³]|(?:km|m|cm|mm)\^[23]|km/h|m/s|°[CF]?|{_CURRENCY}|%|[^\W\d_]+", question)
    named = {unit for word in words if word != "in" and (unit := unit_of(word)) and unit[0] == quantity.unit[0]}
    return named == {quantity.unit}


def _singular(noun: str) -> str:
    return noun.casefold().removesuffix("s")


def _same(a: Decimal, b: Decimal) -> bool:
    return a == b or abs(a - b) <= abs(b) * Decimal("1e-6")


def _near(a: Decimal, b: Decimal) -> bool:
    return abs(a - b) <= abs(b) * Decimal("0.05")


def _rounds_to(a: Quantity, b: Quantity) -> bool:
    coarse = min(a, b, key=lambda q: q.decimals)
    if coarse.decimals < 1 or coarse.digits < 3 or a.fraction or b.fraction:
        return False
    scale = _scale(coarse)
    return abs(a.value - b.value) <= scale / 2


def _scale(quantity: Quantity) -> Decimal:
    """One unit of the last digit written, also under a power of ten: 0.01 for 3.14, 10,000 for 3.14 million."""
    exponent = quantity.value.adjusted() - (quantity.digits - 1)
    return Decimal(1).scaleb(exponent)
