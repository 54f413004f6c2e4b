"""Dates, times of day, ranges and ratios: two short writings of one thing, or of two."""
from __future__ import annotations

import datetime
import re
from fractions import Fraction
from functools import lru_cache

from hdpo.reward.asked import Asked
from hdpo.reward.numerals import plain, readings

_MONTHS = {name[:3]: n for n, name in enumerate(
    "january february march april may june july august september october november december".split(), start=1)}
_MONTH = (r"(?P<month>jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?|"
          r"nov(?:ember)?|dec(?:ember)?)\.?")
_DAY = r"(?P<day>\d{1,2})(?:st|nd|rd|th)?"
_WEEKDAYS = "monday tuesday wednesday thursday friday saturday sunday".split()
_NAMED = [re.compile(pattern) for pattern in (
    rf"{_DAY}(?: of)?[ -]{_MONTH}(?:,? |-)(?P<year>\d{{4}})", rf"{_MONTH} {_DAY},? (?P<year>\d{{4}})",
    rf"{_MONTH},? (?P<year>\d{{4}})", rf"(?P<year>\d{{4}}),? {_MONTH} {_DAY}")]
_NUMBERS = re.compile(r"(\d{1,4})([/.-])(\d{1,2})\2(\d{1,4})")

Day = tuple[int, int, int]
"""(year, month, day); day 0 is the whole month"""


@lru_cache(maxsize=4096)
def days(text: str) -> frozenset[Day]:
    """Every day (or month) that the WHOLE of `text` may mean; empty if it is no date. 03/04/2020 is two."""
    low = plain(text).casefold()
    if not low or len(low) > 40:
        return frozenset()
    match = re.match(rf"({'|'.join(_WEEKDAYS)}),? ", low)
    found = _days(low[match.end():] if match else low)
    return frozenset(day for day in found if not match or day[2] and datetime.date(*day).weekday() == _WEEKDAYS.index(match[1]))


def _days(low: str) -> set[Day]:
    for pattern in _NAMED:
        match = pattern.fullmatch(low)
        if match:
            day = int(match.groupdict().get("day") or 0)
            return _valid({(int(match["year"]), _MONTHS[match["month"][:3]], day)})
    match = _NUMBERS.fullmatch(low)
    if not match:
        return set()
    first, middle, last = (int(match[n]) for n in (1, 3, 4))
    if len(match[1]) == 4 and len(match[4]) <= 2:
        return _valid({(first, middle, last)})
    if len(match[4]) != 4 or len(match[1]) > 2:
        return set()
    return _valid({(last, middle, first)} | ({(last, first, middle)} if match[2] != "." else set()))


def _valid(found: set[Day]) -> set[Day]:
    return {(y, m, d) for y, m, d in found if 1 <= m <= 12 and 1 <= y and 0 <= d <= 31 and _exists(y, m, d or 1)}


def _exists(year: int, month: int, day: int) -> bool:
    try:
        datetime.date(year, month, day)
    except ValueError:
        return False
    return True


def same_day(prediction: str, gold: str) -> tuple[bool | None] | None:
    """(True,), (False,) or (None,) where both are dates; a year alone is the truth of any day in it. None: not dates."""
    said, true = days(prediction), days(gold)
    year = re.fullmatch(r"\d{4}", plain(gold))
    if said and year:
        return (all(day[0] == int(year[0]) for day in said) or False,)
    if not said or not true:
        return None
    if _digits(prediction) == _digits(gold) and len(said) == len(true):   # 03/04/2020 and 3.4.2020, in the same order
        return (True if said == true else None,)
    if len(said) == len(true) == 1:
        (a,), (b,) = said, true
        if a[2] and b[2] or not a[2] and not b[2]:
            return (a == b,)
        return (False if a[:2] != b[:2] else True if a[2] else None,)   # a day within the true month; a month is too little
    return (None if said & true else False,)


def _digits(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", plain(text))]


_TIME = re.compile(r"(\d{1,2})(?:[:.](\d{2}))?(?::(\d{2}))?\s*(a\.?m\.?|p\.?m\.?)?(?: o'clock)?")


def same_time(prediction: str, gold: str, asked: Asked) -> tuple[bool | None] | None:
    """As `same_day`, for times of day: 5:30 pm is 17:30, and may be 5:30."""
    said, true = _minutes(prediction), _minutes(gold)
    if said is None or true is None or not (asked.clock or said[1] or true[1]):
        return None
    if said[0] == true[0] and said[1] == true[1]:
        return (True,)
    if said[1] and true[1] or said[0] % 720 != true[0] % 720:
        return (said[0] == true[0],)
    other = true if said[1] else said    # the one without am or pm
    return (True if other[0] == (said if said[1] else true)[0] and other[0] >= 780 else None,)


def _minutes(text: str) -> tuple[Fraction, bool] | None:
    """(minutes since midnight, whether am or pm is said)"""
    match = _TIME.fullmatch(plain(text).casefold())
    if not match or not (match[2] or match[4]):
        return None
    hour, minute, half = int(match[1]), int(match[2] or 0), (match[4] or "")[:1]
    if hour > 24 or minute > 59 or half and not 1 <= hour <= 12:
        return None
    hour = hour % 12 + (12 if half == "p" else 0) if half else hour
    return hour * 60 + minute + Fraction(int(match[3] or 0), 60), bool(half)


_RANGE = re.compile(r"(?:from |between )?(?P<low>[+-]?[\d.,]+%?)\s*(?P<sign>-|~|…|to|until|and|through)\s*"
                    r"(?P<high>[+-]?[\d.,]+%?)(?P<unit>(?: ?[a-z°%µ$€]+)?)")


def same_range(prediction: str, gold: str) -> tuple[bool | None] | None:
    """As `same_day`, for "0-100", "0 to 100" and "between 0 and 100"; the same units on both."""
    said, true = _bounds(prediction), _bounds(gold)
    if said is None or true is None:
        return None
    if said[2].strip() != true[2].strip():
        return (None if said[:2] == true[:2] else False,) if not (said[2] and true[2]) else (None,)
    return (said == true,)


def _bounds(text: str) -> tuple[Fraction, Fraction, str] | None:
    low = plain(text).casefold()
    match = _RANGE.fullmatch(low)
    if not match or (match["sign"] == "and") != low.startswith("between"):
        return None
    ends = [readings(match[name].rstrip("%")) for name in ("low", "high")]
    percent = "%" if "%" in low else ""
    if not all(len(end) == 1 and end[0].likely for end in ends) or len(match["high"]) < len(match["low"].lstrip("+-")):
        return None   # 2019-20 is a season
    first, last = ends[0][0].value, ends[1][0].value
    return (first, last, match["unit"].replace("%", "") + percent) if first < last else None


def same_ratio(prediction: str, gold: str, asked: Asked) -> tuple[bool | None] | None:
    """As `same_day`, for "3:4", "3 to 4" and, if a ratio is asked for, "3/4"."""
    said, true = _ratio(prediction, asked.share), _ratio(gold, asked.share)
    if said is None or true is None or not (":" in gold or asked.share and ":" in prediction):
        return None
    if said == true:
        return (True,)
    if not asked.share or len(said) != len(true):
        return (None,)
    scale = {Fraction(a, b) for a, b in zip(said, true, strict=True)}
    return (None if len(scale) == 1 else False,)     # 6:8 for 3:4: who can tell


def _ratio(text: str, with_fractions: bool) -> tuple[int, ...] | None:
    low = plain(text).casefold()
    sign = r"(?:\s*:\s*|\s+to\s+|\s*/\s*)" if with_fractions else r"\s*:\s*"
    parts = re.split(sign, low)
    if not 2 <= len(parts) <= 5 or not all(re.fullmatch(r"[1-9]\d{0,5}", part) for part in parts):
        return None
    return tuple(int(part) for part in parts)
