"""Plain text, multiple choice and yes/no answers: what people add around an answer, and what may safely be ignored."""
from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

_TRANSLATE = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | str.maketrans({
    "\u00a0": " ", "\u202f": " ", "\u2009": " ", "\u3000": " ", "\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"',
    "\u2010": "-", "\u2011": "-", "\u2013": "-", "\u2014": "-", "\u2212": "-", "\u200b": None, "\ufeff": None})
_WRAPPERS = [re.compile(pattern, re.DOTALL) for pattern in (
    r"\*\*([^*]+)\*\*", r"\*([^*]+)\*", r"`([^`]+)`", r'"([^"]+)"', r"'([^']+)'", r"\$\$([^$]+)\$\$",
    r"\$([^$]+)\$", r"\\\(((?:(?!\\\)).)+)\\\)", r"\\\[((?:(?!\\\]).)+)\\\]",
    r"\\(?:boxed|text|mathrm|textbf|mathbf)\{([^{}]+)\}",
    r"\\boxed\{((?:[^{}]|\{[^{}]*\})+)\}")]
_OPENING = ("*", "`", '"', "'", "$", "\\")
_PREFIX = re.compile(r"^(?:so,? |therefore,? |thus,? )?(?:the )?(?:(?:final|correct) )?answer(?: is:?|:)\s+", re.IGNORECASE)


def unwrap(text: str) -> str:
    """Drop what formats an answer without being part of it: markdown, quotes, \\boxed, "The answer is", a final period."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", text).translate(_TRANSLATE)
    text = text.strip()
    for _ in range(6):   # \boxed{\text{**x**}} is deep enough
        before = text
        text = _PREFIX.sub("", text, count=1)
        for wrapper in _WRAPPERS if text.startswith(_OPENING) else ():
            match = wrapper.fullmatch(text)
            if match:
                text = match[1].strip()
        if text.endswith((".", "!", ";", ":", ",")) and not text.endswith("..."):
            text = text[:-1].strip()
        if text == before:
            break
    return text


@lru_cache(maxsize=8192)
def normalise(text: str) -> str:
    """The comparison key of an unwrapped text. Signs, brackets, percent, accents and superscripts keep their meaning."""
    text = re.sub(r"(?<=[^\W\d_])-(?=[^\W\d_])", " ", text.casefold())
    text = re.sub(r"(?<=[^\W\d_]),(?=\s+[^\W\d_])", " ", text)
    text = " ".join(text.split())
    return re.sub(r"^(?:the|an|a) (?=\w\w)", "", text)


def same_text(prediction: str, gold: str) -> bool | None:
    """Whether two unwrapped texts agree: True, False, or None where only the case differs and case may carry meaning
    (Co is not CO, Mg not mg, CoCl2 not COCl2).
    """
    if normalise(prediction) != normalise(gold):
        return False
    if prediction == gold:
        return True
    case_differs = any(a != b and a.casefold() == b.casefold() and (len(a) <= 2 or any(c.isdigit() for c in a))
                       for a, b in zip(_tokens(prediction), _tokens(gold), strict=False))
    return None if case_differs and normalise(gold) not in YES_NO else True


def _tokens(text: str) -> list[str]:
    return re.findall(r"\w+", re.sub(r"^(?:the|an|a) (?=\w\w)", "", text, flags=re.IGNORECASE))


# --- yes / no ---------------------------------------------------------------------------------------------------------

YES_NO = {"yes": True, "no": False, "true": True, "false": False}
_POLAR = re.compile(r"\b(?:yes|no|true|false|not|never|neither|nor|none|maybe|but|cannot|unclear|wait)\b|n't\b")


def polarity(text: str) -> bool | None:
    """The yes or no an unwrapped answer begins with, if nothing after it takes it back."""
    match = re.match(r"(yes|no|true|false)\b(?:[,.;:!\s-]+|$)", text.casefold())
    if not match or _POLAR.search(text.casefold(), match.end()):
        return None
    return YES_NO[match[1]]


# --- multiple choice --------------------------------------------------------------------------------------------------

_MARKER = re.compile(r"(?<![\w(\[])(?:[(\[]([A-J])[)\]]|([A-J])[).:])(?=\s|\w)\s*")
_LETTER = re.compile(r"(?:(?:option|choice|answer)\s+)?(?:[(\[]([A-Ja-j])[)\]]|([A-Ja-j])[).:]?)", re.IGNORECASE)
_LETTER_TEXT = re.compile(r"(?:(?:option|choice)\s+)?(?:[(\[]([A-J])[)\]]\s*|([A-J])[).:]\s+|([A-J]):)(.+)", re.DOTALL)
_LETTERS = re.compile(r"[(\[]?[A-J][)\]]?(?:(?:\s*[,;&/]\s*|\s+and\s+|,\s*and\s+)[(\[]?[A-J][)\]]?)+")


def options_of(question: str) -> dict[str, str]:
    """Letter -> option text of a multiple-choice question: the last run A, B, ... of "A. text" or "(A) text" markers."""
    runs: list[list[re.Match[str]]] = []
    for match in _MARKER.finditer(question):
        letter = match[1] or match[2]
        if letter == "A":
            runs.append([match])
        elif runs and ord(letter) == ord("A") + len(runs[-1]):
            runs[-1].append(match)
    run = next((r for r in reversed(runs) if len(r) >= 2), [])
    options: dict[str, str] = {}
    ends = [match.start() for match in run[1:]] + [len(question)]
    for match, end in zip(run, ends, strict=False):
        text = question[match.end():end].strip()
        options[match[1] or match[2]] = unwrap(text.split("\n")[0].rstrip(" ,;"))
    return options


def choice_of(answer: str, options: dict[str, str], lenient: bool = False) -> frozenset[str] | None:
    """The letters an unwrapped answer names, by letter, by "B. text" or by the text of exactly one option; None if it
    names none, or contradicts itself ("B. Paris" where B is London). `lenient` believes the letter of "B. text" when the
    options are unknown.
    """
    by_text = {letter for letter, text in options.items() if text and normalise(text) == normalise(answer)}
    match = _LETTER.fullmatch(answer)
    letter = (match[1] or match[2]).upper() if match else None
    if letter and (not options or letter in options):
        return frozenset(letter) if not by_text or by_text == {letter} else None   # an option whose TEXT is a letter
    if _LETTERS.fullmatch(answer):
        letters = frozenset(re.findall(r"[A-J]", answer))
        return letters if not options or letters <= options.keys() else None
    if lenient and re.fullmatch(r"[A-J]{2,}", answer) and len(set(answer)) == len(answer):
        return frozenset(answer)
    if len(by_text) == 1:
        return frozenset(by_text)
    match = _LETTER_TEXT.fullmatch(answer)
    if match:
        letter = match[1] or match[2] or match[3]
        if letter in options:
            return frozenset(letter) if normalise(unwrap(match[4])) == normalise(options[letter]) else None
        return frozenset(letter) if lenient and not options else None
    return None
