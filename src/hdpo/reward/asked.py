"""What a question asks for, as far as it bends how an answer is compared: a scale, a percentage, a form, a code, a precision.

Each mark makes a rule more careful or lets it be sure; none is an answer. Everything is read from the words alone.
"""
from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "lakh": 10**5,
          "crore": 10**7, "dozen": 12, "mn": 10**6, "bn": 10**9, "mln": 10**6, "bln": 10**9, "000s": 10**3, "pair": 2}

_SCALE = re.compile(rf"(?<!\w)(?:{'|'.join(SCALES)})s?(?!\w)|[$€£]\s?(?:k|m|bn|b)\b|\((?:in )?['’]?000s?\)")
_PERCENT = re.compile(r"%|\bper ?cent|\bpercentage|\bpct\b")
_SHARE = re.compile(r"\b(?:shares?|fractions?|proportions?|probabilit\w+|chances?|ratios?|parts?|rates?|portions?|likelihood)\b")
_FORM = re.compile(
    r"\b(?:simpl\w+|factor\w*|expand\w*|rationali[sz]\w*|express\w*|writ(?:e|ten) (?!on|in the|at|by)\w*|"
    r"rewrit\w+|convert\w*|reduce[sd]?|lowest terms|(?:standard|scientific|exponential|expanded|decimal|simplest|radical|"
    r"surd|exact|mixed|improper|exponent) "
    r"(?:form|notation|number|fraction)|as an? (?:\w+ )?(?:fraction|decimal|percent\w*|power|factorial|product|sum|ratio|mixed|"
    r"improper|surd|radical|root|integer|whole)|in words|in digits|in figures|roman|binary|hexadecimal|notation|"
    r"power of (?:ten|10|two|2)|factorial|complete the square|partial fraction|multipl\w+|divid\w+|product of|quotient|"
    r"evaluat\w+|comput\w+|derivative|differentiat\w+|integra\w+|how (?:do you|would you|to) (?:write|read|spell)|spell\w*|"
    r"transcri\w+|exactly as)\b")
_CODE = re.compile(r"\b(?:versions?|releases?|firmware|sections?|subsections?|chapters?|clauses?|builds?)\b")
_MAYBE_CODE = re.compile(
    r"\b(?:paragraphs?|headings?|models?|codes?|identifiers?|ids?|figures?|tables?|steps?|items?|exercise|serial|articles?|"
    r"rules?|"
    r"account|phone|room|edition|revision|patch|protocol|kernel|ios|android|python|ubuntu|java|cuda|driver)\b")
_MEASURE = re.compile(
    r"\b(?:how (?:much|many|long|tall|high|far|wide|deep|heavy|old|fast|large|big|hot|cold)|values?|price[sd]?|costs?|averages?|"
    r"means?|median|ratio|percentage|percent|shares?|area|volume|probability|scores?|rates?|heights?|weights?|temperatures?|"
    r"speeds?|mass|distance|times?|differences?|sum|total|length|width|radius|amount|slope|decimals?|accuracy|worth|size|"
    r"maximum|minimum|highest|lowest|density|depth|change|increase|decrease|deviation|balance)\b|%")
_PRECISE = re.compile(
    r"\b(?:(?:one|two|three|four|five|1|2|3|4|5|a) (?:decimals?|significant|sig\.? fig)|decimal places?|"
    r"significant (?:figures?|digits?)|"
    r"nearest|round(?:ed|ing)?|approximat\w+|to the hundredth|to the tenth)\b")
_ORDERED = re.compile(r"\b(?:coordinates?|points?|ordered|vertex|vertices|center|centre|midpoint|vector|intersect\w*)\b")
_DATED = re.compile(r"\b(?:dates?|when|days?|months?|born|birthday|expir\w+|deadline)\b")
_CLOCK = re.compile(r"\b(?:times?|clocks?|when|hours?|o'clock|schedule\w*|depart\w*|arriv\w*|opens?|closes?|watch)\b")
_WARM = re.compile(r"\b(?:temperatures?|kelvin|thermometer|melt\w*|boil\w*|freez\w*|superconduct\w*|heat\w*|cool\w*|cold|hot|"
                   r"cryo\w*|anneal\w*)\b")
_KELVIN = re.compile(r"(?<!\w)K(?!\w)")
_NOT_ENGLISH = re.compile(
    r"\b(?:wie|welche[rsnm]?|wieviel\w*|zeigt|ist|der|das|quel(?:le)?s?|combien|est|affiché|cuánt[oa]s?|cuál|qué|el|quanto|"
    r"quanti|qual|qual[eè]|hoeveel|welk[e]?|hvor|vilken|ile|jaki|jaka|jakie|kolik|сколько|какая|какой|kaç)\b")
_MANY_RIGHT = re.compile(
    r"\b(?:an? example|for example|any|one possible|a possible|give an?|antiderivative|primitive|integra\w+|general solution|"
    r"up to|differential|equation of)\b|∫|\\int")
_ANOTHER_UNIT = re.compile(r"\b(?:convert\w*|how many \S+ (?:are|is|in|equal)|into|express\w*|equivalent)\b")
_NEGATED = re.compile(r"\b(?:false|not|untrue|incorrect|wrong|no|never|isn't|aren't|doesn't|don't)\b|n't\b")


@dataclass(frozen=True, slots=True)
class Asked:
    """The marks of one question. `scales`: the factors it names, 1,000 for "in thousands"."""

    text: str = ""
    scales: frozenset[int] = frozenset()
    percent: bool = False
    share: bool = False        # a fraction of a whole: 45% and 0.45 say the same
    form: bool = False         # the way of writing is what is asked for: 1/2 is no answer to "as a decimal"
    code: str = ""             # a version or a section, "surely" or "maybe": 3.10 is not 3.1
    measure: bool = False      # a measured value: 12.50 is 12.5
    precise: bool = False      # it says how to round
    ordered: bool = False      # a point: (3, 2) is not (2, 3)
    dated: bool = False
    clock: bool = False
    warm: bool = False         # about temperature: K is kelvin, else a thousand
    foreign: bool = False      # a language that writes 3,5 and 12.500
    many_right: bool = False   # another expression may be right too
    converts: bool = False     # it gives a value in another unit
    negated: bool = False      # "is it false that": yes and true part ways


@lru_cache(maxsize=1024)
def read_question(question: str) -> Asked:
    """The G rollouts of a prompt share one reading. Never raises; an empty question has no mark."""
    text = question[:20_000]
    low = text.casefold().replace("’", "'")
    scales = set()
    for match in _SCALE.finditer(low):
        word = re.sub(r"[^a-z0]", "", match[0]).removesuffix("s") or "000"
        scales.add(SCALES.get(word, {"k": 10**3, "m": 10**6, "b": 10**9, "000": 10**3}.get(word, 0)))
    return Asked(
        text=text, scales=frozenset(scales - {0}), percent=bool(_PERCENT.search(low)), share=bool(_SHARE.search(low)),
        form=bool(_FORM.search(low)), code=_code(low), measure=bool(_MEASURE.search(low)),
        precise=bool(_PRECISE.search(low)), ordered=bool(_ORDERED.search(low)), dated=bool(_DATED.search(low)),
        clock=bool(_CLOCK.search(low)), warm=bool(_WARM.search(low) or _KELVIN.search(text)),
        foreign=len(set(_NOT_ENGLISH.findall(low))) >= 2, many_right=bool(_MANY_RIGHT.search(low)),
        converts=bool(_ANOTHER_UNIT.search(low)), negated=bool(_NEGATED.search(low)))


def _code(low: str) -> str:
    if _MEASURE.search(low):
        return "maybe" if _CODE.search(low) else ""
    return "surely" if _CODE.search(low) else "maybe" if _MAYBE_CODE.search(low) else ""


def names(asked: Asked, text: str) -> bool:
    """Whether the question itself holds `text`, as a whole: an answer that repeats it has worked nothing out."""
    squeezed, within = _squeeze(text), _squeeze(asked.text)
    if len(squeezed) < 2 or squeezed not in within:
        return False
    return bool(re.search(rf"(?<![\w.]){re.escape(squeezed)}(?!\w|\.\d)", within))


def _squeeze(text: str) -> str:
    return re.sub(r"[\s$,]|\\left|\\right|\\[,;!]", "", text).casefold()
