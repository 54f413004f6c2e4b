"""Whether two numbers are the same, to the precision and in the scale in which they are written; None: can't tell."""
from __future__ import annotations

import re
from fractions import Fraction

from hdpo.reward.asked import Asked, names
from hdpo.reward.numerals import Numeral


def same_number(prediction: Numeral, gold: Numeral, asked: Asked, with_unit: bool = False) -> bool | None:
    """Equal, different, or too near, too differently written or too differently scaled to tell."""
    scaled = prediction.scale != gold.scale
    if scaled and 1 in (prediction.scale, gold.scale):
        return _one_scale(prediction, gold, asked)
    if prediction.value == gold.value:
        return _same_value(prediction, gold, asked, with_unit)
    if prediction.scale == gold.scale == 1:
        factors = asked.scales | ({100} if asked.percent else frozenset())
        if any(gold.value * s == prediction.value or prediction.value * s == gold.value for s in factors):
            return None
        ratio = prediction.value / gold.value if asked.scales and gold.value else Fraction(0)
        if ratio > 0 and re.fullmatch("10+|1/10+", str(ratio)):   # tens of thousands
            return None
    rounded = _rounded(prediction, gold, asked)
    return None if rounded and asked.code else rounded


def _same_value(prediction: Numeral, gold: Numeral, asked: Asked, with_unit: bool) -> bool | None:
    a, b = prediction, gold
    if asked.form and (a.style != b.style or a.style == "scientific" and a.decimals != b.decimals):
        return None   # 32 x 10^4 is no standard form
    if a.style != b.style and "words" not in (a.style, b.style) and _repeats(asked, a):
        return None   # "write 1/8 as a decimal": 1/8 is no answer
    if a.style == b.style and a.decimals != b.decimals:   # 3.10 and 3.1, 7 and 7.0
        if asked.code == "surely" and a.value.denominator > 1:
            return False
        if 3 in (a.decimals, b.decimals) and abs(a.value) >= 1 and not asked.foreign:
            return None   # 1.000 may be a thousand
        if asked.code or asked.precise and not asked.measure:
            return None
        return True if with_unit or a.scale > 1 or asked.measure or 0 in (a.decimals, b.decimals) else None
    return True


def _repeats(asked: Asked, number: Numeral) -> bool:
    value = number.value
    shown = f"{value.numerator}/{value.denominator}" if number.style == "fraction" else str(value)
    if number.style == "fraction" and names(asked, rf"\frac{{{value.numerator}}}{{{value.denominator}}}"):
        return True
    return value.denominator != 1 and names(asked, shown if number.style == "fraction" else f"{float(value):g}")


def _one_scale(prediction: Numeral, gold: Numeral, asked: Asked) -> bool | None:
    """Only one of them says "million". If the question names that scale, the bare one is meant in it."""
    scaled, bare = (prediction, gold) if prediction.scale > 1 else (gold, prediction)
    meant = bare.scaled(scaled.scale)
    as_meant = same_number(meant, scaled, asked) if bare is prediction else same_number(scaled, meant, asked)
    if asked.scales == {scaled.scale}:
        return as_meant
    if asked.scales and scaled.scale not in asked.scales:
        return None
    as_said = _rounded(prediction, gold, asked) if prediction.value != gold.value else True
    if as_meant is not False:
        return None   # an axis in millions: 83.2 and 83.2 million may be the same
    return None if asked.scales and as_said is False else as_said


def _rounded(prediction: Numeral, gold: Numeral, asked: Asked) -> bool | None:
    """Different values: the same after rounding to the precision of the coarser one? Integers are never rounded."""
    distance = abs(prediction.value - gold.value)
    near = distance / abs(gold.value) if gold.value else Fraction(1)
    if _is_rough(gold) and prediction.ulp < gold.ulp:
        if 2 * distance <= gold.ulp:
            rounds = asked.precise or near <= Fraction(1, 100) and (
                prediction.style == "fraction" or gold.scale > 1 and prediction.scale == 1)
            # 2/3 for 0.67, but who knows about 8.52 for 8.5
            sure = 2 * distance < gold.ulp and (gold.digits >= 3 or gold.digits == 2 and rounds)
            return True if sure else None
        return None if distance < gold.ulp else False
    if _is_rough(prediction) and gold.ulp < prediction.ulp:
        if 2 * distance <= prediction.ulp:
            if gold.ulp and prediction.digits >= 3 and near <= Fraction(1, 200) and not asked.precise:
                return True
            return False if asked.precise and gold.decimals and prediction.decimals < gold.decimals else None
        return None if distance < prediction.ulp else False
    for round_one, other in ((gold, prediction), (prediction, gold)):   # 8,300,000 for 8,336,817
        if round_one.style == "digits" and not round_one.decimals and 2 * distance <= _last_digit(round_one) > other.ulp:
            return None
    return False


def _is_rough(number: Numeral) -> bool:
    return number.style in ("digits", "scientific") and (number.decimals > 0 or number.scale > 1)


def _last_digit(number: Numeral) -> Fraction:
    """What the last digit before a run of three or more zeros is worth; 0 if there is no such run."""
    zeros = re.search(r"0{3,}$", str(abs(number.value))) if number.value.denominator == 1 else None
    return Fraction(10 ** len(zeros[0])) if zeros else Fraction(0)
