"""Plain text: what people add around an answer, and what may safely be ignored when two texts are compared."""
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
# the sentence's own mark; "5!" is a factorial, "12," may be cut from 12,500, and "..." says that something is missing
_FINAL = re.compile(r"(?<!\.)\.\Z|(?<=[^\W\d])(?<!\W\w)(?<!^\w)[!;:,]\Z|(?<=[\])}*`\"'])[;:,]\Z")
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
        text = _FINAL.sub("", text[-3:]).join((text[:-3], "")).strip()
        if text == before:
            break
    return text


@lru_cache(maxsize=8192)
def normalise(text: str) -> str:
    """The comparison key of an unwrapped text. Signs, brackets, percent, accents and superscripts keep their meaning."""
    text = re.sub(r"(?<=\b[A-Z]\.)\s+(?=[A-Z]\.)", "", text)   # J. K. Rowling is J.K. Rowling
    text = re.sub(r"(?<=[^\W\d_])-(?=[^\W\d_])", " ", text.casefold())
    text = re.sub(r"(?<=[^\W\d_]),(?=\s+[^\W\d_])", " ", text)
    text = re.sub(r"(?<=[a-z]\.)(?=[^\W\d_]{2})", " ", text)
    text = " ".join(text.split())
    return re.sub(r"^(?:the|an|a) (?=\w\w)", "", text)


_NAMES_THE_LETTER = re.compile(r"^a (?:minor|major|flat|sharp|positive|negative|plus|minus|level|side|team|class|grade|type)\b")


def same_text(prediction: str, gold: str) -> bool | None:
    """Whether two unwrapped texts agree: True, False, or None where only the case differs and case may carry meaning
    (Co is not CO, Mg not mg, CoCl2 not COCl2, 10 meV not 10 MeV), or only an A, which may be no article (A positive).
    """
    if normalise(prediction) != normalise(gold):
        return False
    if prediction == gold:
        return True
    articles = [_ARTICLE.match(text) for text in (prediction, gold)]
    if (articles[0] is None) != (articles[1] is None):
        article = articles[0] or articles[1]
        assert article is not None
        if article[1] == "A" or _NAMES_THE_LETTER.match(article.string.casefold()):
            return None
    tokens = [_tokens(text) for text in (prediction, gold)]
    before = [""] + tokens[1]
    case_differs = any(a != b and a.casefold() == b.casefold() and _case_matters(a, b, previous)
                       for a, b, previous in zip(*tokens, before, strict=False))
    return None if case_differs and normalise(gold) not in ("yes", "no", "true", "false") else True


_ARTICLE = re.compile(r"(the|an|a) (?=\w\w)", re.IGNORECASE)


_SMALL_WORDS = frozenset("no of to in on at by is as an or do go up we my me us it if so the and for von van de da di la".split())


def _case_matters(a: str, b: str, previous: str) -> bool:
    """`previous` is the word before, "" at the beginning: within a text "of" and "Of" are one word."""
    if previous.isalpha() and len(previous) > 1 and a.casefold() in _SMALL_WORDS:
        return False
    mixed = any(not (t.islower() or t.isupper() or t.istitle()) for t in (a, b))
    return len(a) <= 2 or len(a) <= 4 and (mixed or previous[-1:].isdigit()) or any(c.isdigit() for c in a)


def _tokens(text: str) -> list[str]:
    return re.findall(r"\w+", _ARTICLE.sub("", text, count=1) if _ARTICLE.match(text) else text)
