"""Multiple choice: the options of a question, and the letters that an answer names."""
from __future__ import annotations

import re
from collections.abc import Mapping

from hdpo.reward.words import normalise, unwrap

_MARKER = re.compile(r"(?<![\w(\[])(?:[(\[]([A-J])[)\]]|([A-J])[).:])(?=\s|\w|$|[<$\\\-+.°√π(]|[^\x00-\x7f])\s*")
_LINE_MARKER = re.compile(
    r"^[ \t]*(?:[-*] )?(?:[(\[]([A-J])[)\]]|([A-J])[).:])(?=\s|\w|$|[<$\\\-+.°√π(]|[^\x00-\x7f])[ \t]*", re.MULTILINE)
_LETTER = re.compile(r"(?:(?:option|choice|answer)\s+)?(?:[(\[]([A-Ja-j])[)\]]|([A-Ja-j])[).:]?)", re.IGNORECASE)
_LETTER_TEXT = re.compile(r"(?:(?:option|choice)\s+)?(?:[(\[]([A-J])[)\]]\s*|([A-J])[).:]\s+|([A-J]):)(.+)", re.DOTALL)
_OR = re.compile(r"(?:either )?[(\[]?[A-J][)\]]?(?:,? or )[(\[]?[A-J][)\]]?")
_LETTERS = re.compile(r"[(\[]?[A-J][)\]]?(?:(?:\s*[,;&/]\s*|\s+and\s+|,\s*and\s+)[(\[]?[A-J][)\]]?)+")


def options_of(question: str) -> dict[str, str]:
    """Letter -> option text of a multiple-choice question: the last run A, B, ... of "A. text" or "(A) text" markers.

    An option without text (its text is a picture) has "". Where the texts could be cut in more than one way (initials:
    "A. J. R. R. Tolkien B. C. S. Lewis C. E. B. White") only the letters are known, and all texts are "".
    """
    lines = _run(list(_LINE_MARKER.finditer(question)))
    markers = lines if len(lines) >= 2 else list(_MARKER.finditer(question))
    run = _run(markers)
    if len(run) < 2:
        return {}
    ends = [match.start() for match in run[1:]] + [len(question)]
    options = {_letter(match): unwrap(question[match.end():end].strip().split("\n")[0].rstrip(" ,;"))
               for match, end in zip(run, ends, strict=False)}
    inside = [m for m in markers if run[0].start() <= m.start() and m not in run]
    return dict.fromkeys(options, "") if len(lines) < 2 and inside else options


def _letter(match: re.Match[str]) -> str:
    return str(match[1] or match[2])


def _run(markers: list[re.Match[str]]) -> list[re.Match[str]]:
    """The last run A, B, ... of at least two."""
    runs: list[list[re.Match[str]]] = []
    for match in markers:
        if _letter(match) == "A":
            runs.append([match])
        elif runs and ord(_letter(match)) == ord("A") + len(runs[-1]):
            runs[-1].append(match)
    return next((r for r in reversed(runs) if len(r) >= 2), [])


def choice_of(answer: str, options: Mapping[str, str], lenient: bool = False) -> frozenset[str] | None:
    """The letters an unwrapped answer names, by letter, by "B. text" or by the text of exactly one option; None if it
    names none, or contradicts itself ("B. Rom" where B is London); the empty set if it offers a choice itself ("A or B", or
    "B. Paris" where Paris is option A), which is right under no truth. `lenient` believes the letter of "B. text" when the
    options are unknown. Texts count only where every option has one of its own.
    """
    texts = [normalise(text) for text in options.values()]
    named = all(texts) and len(set(texts)) == len(texts)
    by_text = {letter for letter, text in options.items() if named and normalise(text) == normalise(answer)}
    match = _LETTER.fullmatch(answer)
    letter = (match[1] or match[2]).upper() if match else None
    if letter and (not options or letter in options):
        return frozenset(letter) if not by_text or by_text == {letter} else None   # an option whose TEXT is a letter
    if _OR.fullmatch(answer):
        return frozenset()
    if _LETTERS.fullmatch(answer):
        letters = frozenset(re.findall(r"[A-J]", answer))
        return letters if not options or letters <= options.keys() else None
    if lenient and re.fullmatch(r"[A-J]{2,}", answer) and len(set(answer)) == len(answer):
        return frozenset(answer)
    if by_text:   # before "C. S. Lewis" is taken for option C
        return frozenset(by_text)
    match = _LETTER_TEXT.fullmatch(answer)
    if match:
        letter = match[1] or match[2] or match[3]
        if letter in options:
            said = normalise(unwrap(match[4]))
            if not named or said not in texts:
                return None
            return frozenset(letter if said == normalise(options[letter]) else "")
        return frozenset(letter) if lenient and not options else None
    return None
