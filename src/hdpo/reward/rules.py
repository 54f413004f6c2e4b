"""Rule verdicts before any judge: exact text, numbers with units, choices, yes/no, lists and mathematics.

A rule answers CORRECT or WRONG only where it can be sure; everything else is UNSCORED, which here means "can't say",
and goes to the judge. A false "correct" teaches a wrong answer, so doubt always goes to the judge. Policies:

    auto    every rule below where the ground truth has that form; free text is never called wrong
    text    normalised equality decides, both ways
    number  a quantity with unit and tolerance; an answer without any number is wrong
    choice  letters and option texts of a multiple-choice question
    yesno   the yes or no the answer begins with
    maths   mathematical equivalence (math-verify, under a hard time limit)
    list    items in order; numbers decide both ways
    judge   no rule: everything goes to the judge

A rule that an answer belongs to and that can't say ends the search: what is no certain number is not tried as a list.
A list of ground truths holds alternatives: one match is enough, as in the reference.
"""
from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from hdpo.reward.asked import Asked, read_question
from hdpo.reward.choice import choice_of, options_of
from hdpo.reward.dates import same_day, same_range, same_ratio, same_time
from hdpo.reward.exact_rules import by_exact_maths, by_size
from hdpo.reward.maths import equivalent, readable
from hdpo.reward.numerals import plain
from hdpo.reward.polarity import YES_NO, is_about, is_refusal, may_mean_none, polarity
from hdpo.reward.quantities import Quantity, compare, parse_quantities
from hdpo.reward.words import normalise, same_text, unwrap
from hdpo.types import Verdict

_MAX_CHARS = 1000   # a longer answer is prose; only exact equality is looked at


@dataclass(frozen=True, slots=True)
class RuleVerdict:
    """UNSCORED means that no rule can say; `rule` names the one that decided ("" if none did)."""

    verdict: Verdict
    rule: str = ""


CANT_SAY = RuleVerdict(Verdict.UNSCORED)


def policy_for(data_source: str, rules: Mapping[str, str]) -> str:
    """The policy of a data source: its own entry, else the longest pattern that matches ("toy/*", "*"), else auto."""
    if data_source in rules:
        return rules[data_source]
    matching = [pattern for pattern in rules if fnmatch.fnmatchcase(data_source, pattern)]
    return rules[max(matching, key=len)] if matching else "auto"


def rule_verdict(prediction: str, ground_truth: str | list[str], policy: str, question: str = "",
                 maths: bool = True) -> RuleVerdict:
    """Judge an extracted answer by rules. May block for some seconds where mathematics is involved.

    With `maths=False` the maths rule is left out, so that the call takes microseconds; `may_need_maths` tells whether
    that could change the result. An empty prediction is WRONG; an empty ground truth can't be judged.
    """
    alternatives = [g for g in ([ground_truth] if isinstance(ground_truth, str) else ground_truth) if g.strip()]
    if not alternatives:
        return CANT_SAY
    if not prediction.strip():
        return RuleVerdict(Verdict.WRONG, "empty answer")
    verdicts = []
    for gold in alternatives:
        verdict = _verdict(prediction, gold, policy, question, maths)
        if verdict.verdict is Verdict.CORRECT:
            return verdict
        verdicts.append(verdict)
    return verdicts[0] if all(v.verdict is Verdict.WRONG for v in verdicts) else CANT_SAY


def may_need_maths(ground_truth: str | list[str], prediction: str, policy: str) -> bool:
    """Whether the maths rule, which may take seconds, has a say. Cheap."""
    if len(prediction) > _MAX_CHARS or policy not in ("auto", "maths"):
        return False
    golds = [ground_truth] if isinstance(ground_truth, str) else ground_truth
    if not any(_gold_readable(gold) for gold in golds):   # first: the G rollouts of a prompt share it
        return False
    looks = policy == "maths" or any(_looks_like_maths(text) for text in [*golds, prediction])
    return looks and readable(unwrap(prediction))


def _verdict(prediction: str, gold: str, policy: str, question: str, maths: bool) -> RuleVerdict:
    if policy == "judge":
        return CANT_SAY
    answer, target = unwrap(prediction[:4 * _MAX_CHARS]), _unwrapped(gold)
    same = same_text(answer, target) if len(prediction) < 4 * _MAX_CHARS else prediction.strip() == gold.strip()
    if policy == "text":
        return RuleVerdict(Verdict.WRONG if same is False else Verdict.CORRECT, "text")
    if same or _UNIT_GAP.sub("", answer) == _UNIT_GAP.sub("", target):
        return RuleVerdict(Verdict.CORRECT, "same text")
    if len(answer) > _MAX_CHARS:
        return CANT_SAY
    asked = read_question(question)
    if policy in ("maths", "number"):
        asked = replace(asked, measure=True, code="")   # what is computed or measured is no version
    if policy not in ("auto", "maths"):
        return _RULES[policy](answer, target, asked, True) or CANT_SAY
    for name in _AUTO if policy == "auto" else ("number", "size", "exact"):
        verdict = _RULES[name](answer, target, asked, False)
        if verdict:
            return verdict
    if same is None or not maths or policy == "auto" and not (_looks_like_maths(target) or _looks_like_maths(answer)):
        return CANT_SAY
    found = equivalent(answer, target, question)
    return CANT_SAY if found is Verdict.UNSCORED else RuleVerdict(found, "maths")


@lru_cache(maxsize=4096)
def _unwrapped(gold: str) -> str:
    return unwrap(gold)   # the G rollouts of a prompt share it


@lru_cache(maxsize=4096)
def _gold_readable(gold: str) -> bool:
    return readable(_unwrapped(gold))


@lru_cache(maxsize=1024)
def _options(question: str) -> dict[str, str]:
    return options_of(question)


def _decided(correct: bool | None, rule: str) -> RuleVerdict:
    return CANT_SAY if correct is None else RuleVerdict(Verdict.CORRECT if correct else Verdict.WRONG, rule)


def _number(answer: str, gold: str, asked: Asked, explicit: bool) -> RuleVerdict | None:
    target = parse_quantities(gold, asked.warm)
    if not target:
        return None
    said = parse_quantities(answer, asked.warm)
    if not said:
        return _decided(False, "number") if explicit and not _holds_a_number(answer) else None
    if not explicit and _is_fraction(said) and _is_fraction(target) and _figures(answer) != _figures(gold) and (
            asked.dated or said[0].number.value == target[0].number.value):
        return CANT_SAY   # 3/4 and 6/8 may be scores or dates
    return _decided(compare(said, target, asked), "number")


def _is_fraction(found: tuple[Quantity, ...]) -> bool:
    return found[0].number.style == "fraction"


def _figures(text: str) -> list[str]:
    return re.findall(r"\d+", plain(text))


def _holds_a_number(answer: str) -> bool:
    return any(c.isnumeric() for c in answer) or any(
        q[0].bare for q in map(parse_quantities, re.findall(r"[A-Za-z]+(?:-[A-Za-z]+)?", answer)) if q)


def _yesno(answer: str, gold: str, asked: Asked, explicit: bool) -> RuleVerdict | None:
    target = YES_NO.get(normalise(gold))
    said = polarity(answer, asked.text) if target is not None else None
    if said is None:
        return None
    crossed = (normalise(gold) in ("yes", "no")) != answer.casefold().startswith(("yes", "no"))
    return CANT_SAY if crossed and asked.negated else _decided(said == target, "yes/no")   # is it false that ...: true?


def _refusal(answer: str, gold: str, asked: Asked, explicit: bool) -> RuleVerdict | None:
    if not is_refusal(answer):
        return None
    options = _options(asked.text)
    unknown = re.fullmatch(r"[A-J]", gold) and not (options and all(options.values()))
    if may_mean_none(gold) or unknown or any(map(may_mean_none, options.values())) or is_about(
            asked.text, answer):
        return CANT_SAY
    return _decided(False, "refusal")


def _choice(answer: str, gold: str, asked: Asked, explicit: bool) -> RuleVerdict | None:
    options = _options(asked.text)
    if not explicit and not options and not re.fullmatch(r"[A-J]", gold):
        return None
    if not options and re.fullmatch(r"\(?[a-j]\)?", answer) and not explicit:
        return CANT_SAY   # with no options in sight, a and A may be two things
    target, said = choice_of(gold, options, explicit), choice_of(answer, options, explicit)
    if not target or said is None or not said and len(target) > 1:
        return None
    return _decided(said == target, "choice")


def _date(answer: str, gold: str, asked: Asked, explicit: bool) -> RuleVerdict | None:
    found = same_day(answer, gold) or same_time(answer, gold, asked)
    return _decided(found[0], "date") if found else None


def _ratio(answer: str, gold: str, asked: Asked, explicit: bool) -> RuleVerdict | None:
    found = same_ratio(answer, gold, asked)
    return _decided(found[0], "ratio") if found else None


def _range(answer: str, gold: str, asked: Asked, explicit: bool) -> RuleVerdict | None:
    found = same_range(answer, gold)
    return _decided(found[0], "range") if found else None


def _size(answer: str, gold: str, asked: Asked, explicit: bool) -> RuleVerdict | None:
    found = by_size(answer, gold, asked)
    return _decided(found[0], "size") if found else None


def _exact(answer: str, gold: str, asked: Asked, explicit: bool) -> RuleVerdict | None:
    found = by_exact_maths(answer, gold, asked)
    return _decided(found[0], "exact maths") if found else None


_BRACKETS = {"(": ")", "[": "]", "{": "}"}


def _items(text: str) -> tuple[str, list[str]]:
    """Opening bracket ("" if none) and the items of "a, b and c", "a; b" or "[a, b]"."""
    bracket = ""
    if len(text) > 2 and _BRACKETS.get(text[0]) == text[-1]:
        bracket, text = text[0], text[1:-1]
    parts = re.split(r";|\n" if ";" in text or "\n" in text else r",\s*and\s+|,|\s+and\s+|\s+&\s+", text)
    return bracket, [unwrap(part) for part in parts if part.strip()]


@lru_cache(maxsize=4096)
def _gold_items(gold: str) -> tuple[str, list[str]]:
    return _items(gold)


def _list(answer: str, gold: str, asked: Asked, explicit: bool) -> RuleVerdict | None:
    gold_bracket, target = _gold_items(gold)
    if len(target) < 2 and not explicit:
        return None
    numbers = parse_quantities(gold)
    if numbers and not explicit and (numbers[0].number.likely or asked.foreign):
        return CANT_SAY   # "1,220" is one number
    return _items_agree(answer, gold, asked, explicit)


def _items_agree(answer: str, gold: str, asked: Asked, explicit: bool) -> RuleVerdict | None:
    gold_bracket, target = _gold_items(gold)
    bracket, said = _items(answer)
    if bracket != gold_bracket and not (explicit and {bracket, gold_bracket} == {"", "["}):
        return None   # a point is not an interval
    if len(said) == len(target) and all(_same_item(a, b) for a, b in zip(said, target, strict=True)):
        return _decided(True, "list")
    numbers, golds = [parse_quantities(item) for item in said], [parse_quantities(item) for item in target]
    if not said or any(len(q) != 1 or not q[0].bare or not q[0].number.likely for q in numbers + golds):
        return None   # other words may mean the same
    values, true = ([q[0].number.value for q in found] for found in (numbers, golds))
    if sorted(values) == sorted(true):   # whether the order matters is in the question
        return _decided(False, "list") if bracket == "(" and asked.ordered and values != true else CANT_SAY
    if len(values) == len(true) and any(a != b and compare(p, q) is not False for p, q, a, b in zip(
            numbers, golds, values, true, strict=True)):
        return CANT_SAY   # rounded otherwise
    return _decided(False, "list")


def _same_item(answer: str, gold: str) -> bool:
    if same_text(answer, gold):
        return True
    a, b = parse_quantities(answer), parse_quantities(gold)
    return bool(a and b and compare(a, b))


_MAY_BE_SIGN = re.compile(r"[\\^√π=<>≤≥*/+\d)]")   # a plain class, because it is searched in every answer
_MATHS_SIGN = re.compile(r"\\[a-zA-Z]|[\^√π=<>≤≥]|\d[a-z]\b|\)\s*\(")
_OPERATOR = re.compile(r"[*/+]\s*[\w(]")
_OPERAND_END = re.compile(r"[\w)]\s*\Z")


def _looks_like_maths(text: str) -> bool:
    return len(text) <= 300 and any(
        _MATHS_SIGN.match(text, m.start()) or _OPERATOR.match(text, m.start()) and _OPERAND_END.search(text[:m.start()])
        for m in _MAY_BE_SIGN.finditer(text))


_UNIT_GAP = re.compile(r"(?<=\d)\s+(?=[^\W\d_]|[°%])")
_AUTO = ("choice", "yesno", "refusal", "date", "ratio", "range", "number", "size", "exact", "list")
_RULES: dict[str, Callable[[str, str, Asked, bool], RuleVerdict | None]] = {
    "choice": _choice, "yesno": _yesno, "refusal": _refusal, "date": _date, "ratio": _ratio, "range": _range,
    "number": _number, "size": _size, "exact": _exact, "list": _list}
