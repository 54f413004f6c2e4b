"""Verdicts of exact mathematics: equal, certainly different, or equal but not written as an answer."""
from __future__ import annotations

import re
from collections import Counter
from fractions import Fraction
from math import prod

from hdpo.reward.asked import Asked, names
from hdpo.reward.exact import Solutions, bounds, exact, is_dimension, solutions
from hdpo.reward.numerals import plain

Found = tuple[bool | None] | None
"""(True,), (False,), (None,) for "can't say", or None where the rule has no say."""


_SIZE_WORDS = re.compile(r"\b(?:rows?|columns?|matri\w+|dimensions?|resolution|shape)\b")


def by_size(prediction: str, gold: str, asked: Asked) -> Found:
    """3 x 2 and 2 x 3 are two sizes, 2-1 and 1-2 two scores: nobody works them out."""
    if not is_dimension(gold):
        return (None,) if is_dimension(prediction) and exact(gold) else None
    if not is_dimension(prediction):
        return (None,) if exact(prediction) else None
    signs = [set(re.findall(r"[-:]|[×x*]", plain(text))) for text in (prediction, gold)]
    if any("-" in s or ":" in s for s in signs) and signs[0] != signs[1]:
        return (None,)
    said, true = ([int(n) for n in re.findall(r"\d+", plain(text))] for text in (prediction, gold))
    if said == true:
        return (True,)
    ends = [(str(max(a, b)), str(min(a, b))) for a, b in zip(said, true, strict=False) if a != b]
    if "-" in signs[0] and any(longer.endswith(shorter) for longer, shorter in ends):
        return (None,)   # 2019-20 is 2019-2020
    if len(said) == len(true) and _SIZE_WORDS.search(asked.text.casefold()):
        return (False,)
    return (None if Counter(said) == Counter(true) or "-" not in signs[0] and prod(said) == prod(true) else False,)


def by_exact_maths(prediction: str, gold: str, asked: Asked) -> Found:
    """Rationals, x = 11, sets of solutions, inequalities and intervals."""
    return _by_bounds(prediction, gold) or _by_loud(prediction, gold) or _by_solutions(prediction, gold, asked)


_PAIR = re.compile(r"(?P<open>[(\[]|\\?\{)(?P<low>[^,;]+)[,;](?P<high>[^,;]+?)(?P<close>[)\]]|\\?\})")


def _by_bounds(prediction: str, gold: str) -> Found:
    true, said = bounds(gold), bounds(prediction)
    if true is None:
        return None
    if said is None:   # [1, 2) and {1, 2} or (1, 2): a set or a point is something else
        pairs = [_PAIR.fullmatch(plain(text)) for text in (prediction, gold)]
        ends = [[getattr(exact(m[e]), "value", None) for e in ("low", "high")] for m in pairs if m]
        return (False,) if len(ends) == 2 and None not in ends[0] + ends[1] else None
    if said[1:] != true[1:]:
        return (False,)
    return (True if said[0] == true[0] or "" in (said[0], true[0]) else None,)


def _by_loud(prediction: str, gold: str) -> Found:
    """ "5!" is 120, or five said loudly. """
    said, true = exact(prediction), exact(gold)
    if said is None or true is None or said.loud is None and true.loud is None:
        return None
    a, b = {said.value, said.loud} - {None}, {true.value, true.loud} - {None}
    return (None if a & b else False,)


def _by_solutions(prediction: str, gold: str, asked: Asked) -> Found:
    said, true = solutions(prediction), solutions(gold)
    if said is None or true is None:
        return None
    if said.name and true.name and said.name != true.name:
        return (None,)
    if said.values != true.values:
        return (None if _may_be_rounded(said, true, prediction + gold) else False,)
    if not said.done or asked.code and "." in prediction + gold or asked.ordered and len(true.values) > 1:
        return (None,)
    if said.name and not true.name and not _asks_for(asked, said.name):
        return (None,)
    if said.name == true.name and not said.marked and (asked.form or not true.done or names(asked, prediction)):
        return (None,)   # the same number written otherwise
    figures = [re.findall(r"\d+|\.", plain(text)) for text in (prediction, gold)]
    return (None if asked.form and figures[0] != figures[1] else True,)


def _may_be_rounded(said: Solutions, true: Solutions, text: str) -> bool:
    if "." not in text or len(said.values) != len(true.values):
        return False
    return all(abs(a - b) <= max(abs(b) / 20, Fraction(1, 10**9))
               for a, b in zip(sorted(said.values), sorted(true.values), strict=True))


def _asks_for(asked: Asked, name: str) -> bool:
    """Whether "x = 11" may stand for 11: the question has an x that it doesn't give, or isn't known."""
    if not asked.text:
        return True
    given = re.search(rf"(?<![\w\\]){re.escape(name)}\s*=\s*-?\d", asked.text)
    return bool(re.search(rf"(?<![\w\\]){re.escape(name)}(?!\w)", asked.text)) and not given
