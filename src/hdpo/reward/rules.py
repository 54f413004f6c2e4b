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

A list of ground truths holds alternatives: one match is enough, as in the reference.
"""
from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from hdpo.reward.maths import equivalent, readable
from hdpo.reward.quantities import Quantity, compare, parse_quantity
from hdpo.reward.words import YES_NO, choice_of, normalise, options_of, polarity, same_text, unwrap
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
    if same:
        return RuleVerdict(Verdict.CORRECT, "same text")
    if len(answer) > _MAX_CHARS or same is None:
        return CANT_SAY
    if policy != "auto":
        if policy == "maths":   # plain numbers need no algebra
            return _number(answer, target, question, False) or (_maths(answer, target, question) if maths else CANT_SAY)
        return _RULES[policy](answer, target, question, True) or CANT_SAY
    for name in ("yesno", "choice", "number", "list"):
        verdict = _RULES[name](answer, target, question, False)
        if verdict:
            return verdict
    if maths and (_looks_like_maths(target) or _looks_like_maths(answer)):
        return _maths(answer, target, question)
    return CANT_SAY


@lru_cache(maxsize=4096)
def _unwrapped(gold: str) -> str:
    return unwrap(gold)   # the G rollouts of a prompt share it


@lru_cache(maxsize=4096)
def _gold_readable(gold: str) -> bool:
    return readable(_unwrapped(gold))


@lru_cache(maxsize=4096)
def _gold_quantity(gold: str) -> Quantity | None:
    return parse_quantity(gold)


@lru_cache(maxsize=1024)
def _options(question: str) -> dict[str, str]:
    return options_of(question)


def _decided(correct: bool, rule: str) -> RuleVerdict:
    return RuleVerdict(Verdict.CORRECT if correct else Verdict.WRONG, rule)


def _number(answer: str, gold: str, question: str, explicit: bool) -> RuleVerdict | None:
    target = _gold_quantity(gold)
    if target is None:
        return None
    quantity = parse_quantity(answer)
    if quantity is None:
        return _decided(False, "number") if explicit and not _holds_a_number(answer) else None
    if not explicit and quantity.fraction and target.fraction and quantity.value == target.value:
        return None   # 3/4 and 6/8 may be scores or dates
    equal = compare(quantity, target, question)
    return None if equal is None else _decided(equal, "number")


def _holds_a_number(answer: str) -> bool:
    return any(c.isnumeric() for c in answer) or any(
        q and not q.unit_text for q in (parse_quantity(word) for word in re.findall(r"[A-Za-z]+(?:-[A-Za-z]+)?", answer)))


def _yesno(answer: str, gold: str, question: str, explicit: bool) -> RuleVerdict | None:
    target = YES_NO.get(normalise(gold))
    said = polarity(answer) if target is not None else None
    return None if said is None else _decided(said == target, "yes/no")


def _choice(answer: str, gold: str, question: str, explicit: bool) -> RuleVerdict | None:
    options = _options(question)
    if not explicit and not options and not re.fullmatch(r"[A-J]", gold):
        return None
    target, said = choice_of(gold, options, explicit), choice_of(answer, options, explicit)
    if target is None or said is None:
        return None
    return _decided(said == target, "choice")


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


def _list(answer: str, gold: str, question: str, explicit: bool) -> RuleVerdict | None:
    gold_bracket, target = _gold_items(gold)
    if len(target) < 2 and not explicit:
        return None
    bracket, said = _items(answer)
    if bracket != gold_bracket and not (explicit and {bracket, gold_bracket} == {"", "["}):
        return None   # a point is not an interval
    if len(said) == len(target) and all(_same_item(a, b) for a, b in zip(said, target, strict=True)):
        return _decided(True, "list")
    numbers, golds = [parse_quantity(item) for item in said], [parse_quantity(item) for item in target]
    if not said or any(q is None or not q.plain for q in numbers + golds):
        return None   # other words may mean the same
    same_set = sorted(q.value for q in numbers if q) == sorted(q.value for q in golds if q)
    return None if same_set else _decided(False, "list")   # whether the order matters is in the question


def _same_item(answer: str, gold: str) -> bool:
    if same_text(answer, gold):
        return True
    a, b = parse_quantity(answer), parse_quantity(gold)
    return bool(a and b and compare(a, b))


_MAY_BE_SIGN = re.compile(r"[\\^√π=<>≤≥*/+\d)]")   # a plain class, because it is searched in every answer
_MATHS_SIGN = re.compile(r"\\[a-zA-Z]|[\^√π=<>≤≥]|\d[a-z]\b|\)\s*\(")
_OPERATOR = re.compile(r"[*/+]\s*[\w(]")
_OPERAND_END = re.compile(r"[\w)]\s*\Z")


def _looks_like_maths(text: str) -> bool:
    return len(text) <= 300 and any(
        _MATHS_SIGN.match(text, m.start()) or _OPERATOR.match(text, m.start()) and _OPERAND_END.search(text[:m.start()])
        for m in _MAY_BE_SIGN.finditer(text))


def _maths(answer: str, gold: str, question: str) -> RuleVerdict:
    verdict = equivalent(answer, gold, question)
    return CANT_SAY if verdict is Verdict.UNSCORED else RuleVerdict(verdict, "maths")


_RULES: dict[str, Callable[[str, str, str, bool], RuleVerdict | None]] = {
    "number": _number, "yesno": _yesno, "choice": _choice, "list": _list}
