"""What an answer says: the letter of an option, the letters of several, a number. Pure text, shared by all benchmarks.

The multiple-choice rule is VLMEvalKit's, which most published tables used, without its defects: nothing is drawn at
random, the article "A" is no letter, more than four options have letters too, and an answer that says nothing is unparsed.
"""
from __future__ import annotations

import ast
import json
import math
import re
import string
import unicodedata
from collections.abc import Mapping
from typing import Any

LETTERS = string.ascii_uppercase

_REFUSAL = re.compile(r"\b(?:i (?:can(?:'t|not)|am unable to|'m unable to) (?:answer|help|determine|process|see|tell)|"
                      r"(?:cannot|can't|unable to|impossible to) determine the answer|without (?:the|an) image)", re.IGNORECASE)
_LEAD_IN = re.compile(r"^(?:(?:so|therefore|thus|hence),?\s+)?(?:the\s+)?(?:(?:best|final|correct|right)\s+)?"
                      r"(?:answer|option|choice)\s*(?:is\s*:?|:)\s+", re.IGNORECASE)
_NOISE = str.maketrans(dict.fromkeys(".()[],:;!*#{}$`\"'", " "))
_TAG = re.compile(r"<answer>", re.IGNORECASE)
_END_TAG = re.compile(r"</answer>", re.IGNORECASE)
_WORD = re.compile(r"\b([AI])(?:['’](?=\w)|\s+)"
                   r"(?!(?:is|was|are|because|since|as|and|or|nor|but|seems|appears|looks|would|should|for|matches|shows)"
                   r"\b)[a-z]")
"""The article "A" and the pronoun "I": a letter before a small word that does not speak about an option."""
_SAID = re.compile(r"\b(?:answer|option|choice)(?:\s+is)?\s*:?\s*[\s*(\[{$]*(?:option\s+)?([A-Z])(?![A-Za-z'])", re.IGNORECASE)
_MARKED = re.compile(r"^[\s*(\[{$]*(?:option\s+)?([A-Z])\s*[)\].:,*}$]", re.IGNORECASE)


def final_answer(text: Any) -> str:
    """The text to be scored: what stands in the last <answer>, if there is one, else all of it. "" for no answer."""
    if text is None:
        return ""
    text = unicodedata.normalize("NFC", str(text))
    closing = list(_END_TAG.finditer(text))
    if closing:
        opening = [match.end() for match in _TAG.finditer(text, 0, closing[-1].start())]
        if opening:
            return text[opening[-1]:closing[-1].start()].strip()
    return text.rpartition("</think>")[2].strip()


def choice_letter(answer: str, options: Mapping[str, str]) -> str | None:
    """The one letter of `options` (letter -> text, which may be "") that the answer names, or None if it names none.

    In this order: the answer is a letter; exactly one letter stands in it as a word, among its last four words or marked
    as "B." at its start; "the answer is X"; it is, or holds, or is part of, the text of exactly one option.
    """
    answer = unicodedata.normalize("NFKC", answer).strip()
    if not answer or not options:
        return None
    words = answer.translate(_NOISE).split()
    if len(words) == 1 and words[0].upper() in options:
        return words[0].upper()
    bare = _LEAD_IN.sub("", answer, count=1)
    if (exact := _same_text(bare, options)) is not None:
        return exact
    if _REFUSAL.search(answer):
        return None
    if (letter := _by_letter(answer, words, options)) is not None:
        return letter
    return _by_text(bare, options)


def _by_letter(answer: str, words: list[str], options: Mapping[str, str]) -> str | None:
    marked = _MARKED.match(answer)
    named = {word for word in words if word in options and not _only_a_word(word, answer)}
    if len(named) == 1:
        letter = next(iter(named))
        if words.index(letter) >= len(words) - 4 or marked and marked[1] == letter:
            return letter
    said = {match[1] for match in _SAID.finditer(answer) if match[1] in options and not _WORD.match(answer, match.start(1))}
    return next(iter(said)) if len(said) == 1 else None


def _only_a_word(letter: str, answer: str) -> bool:
    """Whether A (or I) stands in the answer as the article (or the pronoun) alone."""
    return letter in "AI" and len(re.findall(rf"\b{letter}\b", answer)) == sum(m[1] == letter for m in _WORD.finditer(answer))


def plain(text: str) -> str:
    """The comparison key of an option's text."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().strip(" \t\n.,;:!*\"'`$").split())


def _same_text(answer: str, options: Mapping[str, str]) -> str | None:
    same = [letter for letter, text in options.items() if text and plain(text) == plain(answer)]
    return same[0] if len(same) == 1 else None


def _by_text(answer: str, options: Mapping[str, str]) -> str | None:
    """The option whose text stands in the answer; else the option whose text the answer is a part of."""
    said = plain(answer)
    if len(said) <= 2 * sum(map(len, options.values())):
        held = [letter for letter, text in options.items() if plain(text) and _holds(said, plain(text))]
        # "not red" holds "red" as well: the longer text is meant
        longest = [a for a in held if not any(a != b and _holds(plain(options[b]), plain(options[a])) for b in held)]
        if len(longest) == 1:
            return longest[0]
        if held:
            return None
    parts = [letter for letter, text in options.items() if len(said) > 1 and _holds(plain(text), said)]
    return parts[0] if len(parts) == 1 else None


def _holds(text: str, part: str) -> bool:
    """Whether `part` stands in `text` as whole words (where it begins and ends with word characters)."""
    start = r"(?<!\w)" if part[:1].isascii() and part[:1].isalnum() else ""
    end = r"(?!\w)" if part[-1:].isascii() and part[-1:].isalnum() else ""
    return re.search(start + re.escape(part) + end, text) is not None


def choice_letters(answer: str, allowed: str = LETTERS[:9]) -> frozenset[str] | None:
    """The letters of an answer with one or several right options ("A, C", "B and D", "(A)(C)", "AC"); None for none."""
    text = unicodedata.normalize("NFKC", answer).strip()
    words = re.sub(r"[.,;:!*#{}()\[\]$`\"'/&+]", " ", text).split()
    letters = [word for word in words if word.lower() not in ("and", "or", "option", "options", "answer", "the", "is", "are")]
    if letters and all(len(word) == 1 and word.upper() in allowed for word in letters):
        return frozenset(word.upper() for word in letters)
    if len(letters) == 1 and re.fullmatch(f"[{allowed}]+", letters[0]) and len(set(letters[0])) == len(letters[0]):
        return frozenset(letters[0])
    one = rf"\(?[{allowed}]\)?"
    listed = re.search(rf"\b(?:answers?|options?)\s*(?:is|are)?\s*:?\s*({one}(?:\s*(?:,\s*and|,|and|&)\s*{one})+)(?!\w)", text)
    if listed:
        return frozenset(re.findall(rf"\b[{allowed}]\b", listed[1]))
    single = choice_letter(text, dict.fromkeys(allowed, ""))
    return frozenset(single) if single else None


_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?|[-+]?\.\d+")
_FRACTION = re.compile(r"([-+]?)\\d?frac\{([^{}]+)\}\{([^{}]+)\}")


def as_number(text: str) -> float | None:
    """A text that is a number: "1,200", "3/4", "\\frac{1}{2}", "2π", "-π/3", "50%" (50); None for anything else."""
    text = unicodedata.normalize("NFKC", text).strip().strip("$").strip().removesuffix("%").strip()
    text = text.replace("\u2212", "-").replace("\\pi", "π").replace("\\%", "").replace("\\,", "")
    text = re.sub(r"^\\(?:boxed|text|mathrm)\{(.*)\}$", r"\1", text)
    text = _FRACTION.sub(lambda m: f"{m[1]}{m[2]}/{m[3]}", text)
    text = re.sub(r"\bpi\b", "π", text).replace(" ", "").replace("*", "")
    parts = text.split("/")
    if not 1 <= len(parts) <= 2:
        return None
    values = [_factor(part) for part in parts]
    if any(value is None for value in values):
        return None
    if len(values) == 2:
        return None if not values[1] else float(values[0] or 0.0) / values[1]
    return values[0]


def _factor(text: str) -> float | None:
    times_pi = text.endswith("π")
    text = text.removesuffix("π") if times_pi else text
    if times_pi and text in ("", "+", "-"):
        return math.pi * (-1 if text == "-" else 1)
    if not _NUMBER.fullmatch(text):
        return None
    value = float(text.replace(",", "")) * (math.pi if times_pi else 1.0)
    return value if math.isfinite(value) else None


def only_number(text: str) -> float | None:
    """The number an answer states: the answer itself, what follows its last "=", or the only number in it."""
    for piece in (text, text.rpartition("=")[2], text.rpartition("≈")[2]):
        if (value := as_number(piece.strip().rstrip("."))) is not None:
            return value
    found = {match[0] for match in re.finditer(r"(?<![\w.])" + _NUMBER.pattern + r"(?![\d,]*\w*\d)", text)}
    return as_number(next(iter(found))) if len(found) == 1 else None


def as_list(value: Any) -> list[Any] | None:
    """A list, or the list that a text spells in Python or JSON; None for anything else. Nothing is executed."""
    if isinstance(value, (list, tuple)):
        return list(value)
    if not isinstance(value, str) or not value.strip().startswith(("[", "(")):
        return None
    for parse in (ast.literal_eval, json.loads):
        try:
            found = parse(value.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        if isinstance(found, (list, tuple)):
            return list(found)
    return None
