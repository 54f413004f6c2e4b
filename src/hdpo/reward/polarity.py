"""Yes, no, and answers that say that there is no answer."""
from __future__ import annotations

import re

YES_NO = {"yes": True, "no": False, "true": True, "false": False}

_OPENING = re.compile(r"(yes|no|true|false)(?:$|\s*[,.;:!—]+(?!\s*\d)\s*|\s+[–-]+\s+|"
                      r"\s+(?=(?:it|he|she|they|there|this|that|these|those|the|i|we)\b))")
_TAKEN_BACK = re.compile(
    r"\b(?:yes|no|true|false|not|never|neither|nor|none|nope|yeah|yep|nah|but|though|although|however|unless|except|if|or|maybe|"
    r"perhaps|possibly|probably|likely|may|might|could|would|should|cannot|unable|unclear|unsure|uncertain|unknown|unlikely|"
    r"doubt\w*|wait|sorry|actually|rather|instead|otherwise|opposite|incorrect\w*|wrong\w*|guess\w*|assum\w*|suppos\w*|sure|know|"
    r"tell|determin\w*|insufficient|inconclusive|ambiguous|depends?|impossible|missing|unreadable|unavailable|blurr\w+|illegible|"
    r"correction|scratch|mistake|hardly|barely|partly|partially|sometimes|kidding|jok\w+|lied|lie|thought|"
    r"reflection|reconsider\w*|contrary|reverse|mind|n/a)\b|n't\b|[?/]")
_PLAIN_NO = re.compile(
    r"(?:it|he|she|they|there|this|that|these|those|the [a-z]+(?: [a-z]+)?) (?:is|are|was|were|does|do|did|has|have|"
    r"had)(?: not|n't)")


def polarity(text: str, question: str = "") -> bool | None:
    """The yes or no an unwrapped answer begins with, if what follows is a sentence of its own that doesn't take it back.

    "No idea", "No doubt, it is green", "Yes and no", and "No, it is open" where "is it open?" was asked, are neither.
    """
    low = text.casefold().replace("’", "'")
    match = _OPENING.match(low)
    if not match or len(low) > 300:
        return None
    rest = low[match.end():].rstrip(" .!")
    said = YES_NO[match[1]]
    if _TAKEN_BACK.search(rest) and not (said is False and _PLAIN_NO.fullmatch(rest)):
        return None
    asked = re.findall(r"[a-z]+", question.casefold())
    if said is False and asked and not _TAKEN_BACK.search(rest) and re.search(rf"\b{asked[-1]}\b", rest):
        return None
    return said


_SUBJECT = (r"(?:sorry,? |unfortunately,? )?(?:but )?(?:i(?: am|'m)?|we(?: are|'re)?|it(?: is|'s)?|this(?: is)?|"
            r"the (?:answer|question|value|information|image|text)(?: is)?)?\s*")
_SOURCE = r"(?: (?:in|from|on|by|based on) (?:the|this) \w+)?"
_REFUSAL = re.compile(
    r"n/a|n\.a|not (?:available|known|given|provided|visible|shown|specified|stated|mentioned|enough information|sure|"
    r"clear|legible|"
    rf"determinable|answerable|readable|possible to (?:determine|tell|say|answer|know)){_SOURCE}|"
    rf"{_SUBJECT}(?:do not|don't|can not|cannot|can't|could not|couldn't|unable to|am unable to|was unable to|"
    rf"are unable to)\s+(?:be )?"
    r"(?:know|knew|determined?|answer(?:ed)?|tell|told|see|seen|say|said|identif(?:y|ied)|read|find|found|provided?|extracted|"
    r"infer(?:red)?|make (?:it )?out|view|access|help)(?: .*)?|"
    rf"{_SUBJECT}(?:unknown|unclear|unanswerable|undetermined|indeterminable|not (?:known|clear|given|visible|stated|"
    rf"sure|legible)|"
    r"impossible to (?:tell|say|determine|know|answer))(?: (?:in|from|on|by|based on) .*)?|"
    r"no (?:idea|answer|information|image|clue|context|response|comment)(?: .*)?|"
    r"(?:there is )?(?:insufficient|not enough|no sufficient|too little) (?:information|data|context|detail)s?(?: .*)?|"
    r"(?:the )?answer (?:is )?(?:unknown|not (?:known|given|available|provided)|unavailable|"
    r"cannot be (?:determined|given|found)(?: .*)?)")
_HEDGED = re.compile(r"\d|\b(?:but|however|maybe|probably|likely|guess|perhaps|assume|although|though|so|or|looks|seems|appears?|"
                     r"might|except|only|if)\b")
_OF_THAT_KIND = re.compile(
    r"\b(?:not?|n/?a|na|none|nothing|never|cannot|can't|unknown|unclear|un\w+able|undetermin\w+|indetermin\w+|insufficient|null|"
    r"nan|undefined|dne|does not exist|empty|blank|ambig\w+|inconclusive|uncertain|missing|impossible|without|neither|"
    r"nobody|nowhere|"
    r"refus\w+|unspecified|unavailable|information|determined?|available|applicable)\b|^\W*$")


def is_refusal(text: str) -> bool:
    """Whether an unwrapped answer says nothing but that there is none: "N/A", "It cannot be determined from the image"."""
    low = " ".join(text.casefold().replace("’", "'").split()).rstrip(" .!")
    match = _REFUSAL.fullmatch(low) if len(low) <= 200 else None
    return bool(match) and not _HEDGED.search(low)


def may_mean_none(text: str) -> bool:
    """Whether a ground truth or an option itself says that there is nothing, or no answer."""
    return bool(_OF_THAT_KIND.search(text.casefold())) and text.casefold().strip() not in YES_NO


def is_about(question: str, refusal: str) -> bool:
    """Whether a question asks for what a refusal says is lacking: then "It cannot be determined" is an answer."""
    common = ("image", "pictu", "photo", "figur", "chart", "there", "this", "that", "from", "with", "canno", "answe")
    stems = {word[:5] for word in re.findall(r"[a-z]{4,}", refusal.casefold())} - set(common)
    noun = re.match(r"(?:there is )?no ([a-z]+)", refusal.casefold())
    stems |= {noun[1][:5]} if noun else set()
    return any(re.search(rf"\b{stem}", question.casefold()) for stem in stems)
