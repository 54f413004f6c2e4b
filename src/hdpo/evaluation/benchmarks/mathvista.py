"""MathVista testmini: 1,000 questions with options, whole numbers, decimals or lists as answers.

An option is told by its letter, its text or, for a text that is close to exactly one of them, the nearest. Nothing is
chosen for an empty answer. Decimals are rounded to the question's precision on both sides, lists are compared as lists.
"""
from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from typing import Any

from hdpo.evaluation.extraction import LETTERS, as_list, as_number, choice_letter, only_number, plain
from hdpo.evaluation.items import CANT_SAY, Benchmark, Decision, Item, decided
from hdpo.evaluation.published import Row

CLOSE = 0.6     # ratio above which a text counts as a misspelt option
_QUOTED = re.compile(r'[Tt]he answer is "(.*)"\.?$')


class MathVista(Benchmark):
    name, title = "mathvista", "MathVista"
    hub_splits = ("testmini",)
    layouts = (("testmini*.parquet",), ("testmini*.json",), ("MathVista*.tsv",), ("*.parquet",), ("*.tsv",), ("*.json",))
    exclude = r"(?:^|/)test[-_.]"
    required = (("question", "query"), ("answer",), ("answer_type",))

    def parse(self, row: Row) -> Iterator[Item]:
        choices = [str(choice).strip() for choice in as_list(row.raw("choices")) or []]
        options = dict(zip(LETTERS, choices, strict=False))
        about = row.raw("metadata")
        about = about if isinstance(about, dict) else {}
        gold = row.text("answer")
        if options and gold not in choices and gold in options:     # a copy that gives the letter
            gold = options[gold]
        kind = row.text("answer_type") or "text"
        extra = {"precision": int(float(row.text("precision") or 0)), "plain": row.text("question"), "unit": row.text("unit")}
        yield Item(row.text("pid", "index") or row.key or str(row.number), row.text("query") or row.text("question"), gold,
                   options, parts=_parts(row, about), kind="choice" if options else kind, extra=extra,
                   image=row.raw("decoded_image", "image"), dropped="" if gold else "it has no answer")

    def decide(self, item: Item, answer: str) -> Decision:
        quoted = _QUOTED.search(answer)
        said = quoted[1].strip() if quoted else answer
        if item.kind == "choice":
            text = chosen(said, item.options)
            return CANT_SAY if text is None else decided(plain(text) == plain(item.gold), text)
        if item.kind == "list":
            found = as_list(said[said.find("["):said.rfind("]") + 1]) if "[" in said else None
            return CANT_SAY if found is None else decided(_same_list(found, as_list(item.gold)), said)
        if item.kind in ("integer", "float"):
            value, truth = only_number(said), as_number(item.gold)
            if value is None or truth is None:
                return CANT_SAY
            precision = item.extra["precision"]
            same = int(value) == int(truth) if item.kind == "integer" else round(value, precision) == round(truth, precision)
            return decided(same, said)
        return decided(plain(said) == plain(item.gold), said)

    def judged(self, item: Item) -> tuple[str, str]:
        return item.question, item.gold

    def bare(self, item: Item) -> str:
        unit = f" (Unit: {item.extra['unit']})" if item.extra["unit"] else ""
        options = "".join(f"\n({letter}) {text}" for letter, text in item.options.items())
        return f"{item.extra['plain'] or item.question}{unit}{options}"

    def prompt(self, item: Item) -> str:
        form = {"choice": "the letter of the right option", "integer": "a whole number", "list": "a list such as [1, 2]",
                "float": f"a number with {item.extra['precision']} decimal{'s' * (item.extra['precision'] != 1)}"}
        return f"{self.bare(item)}\nPut {form.get(item.kind, 'a short answer')}, and nothing else, into <answer></answer>."


def chosen(said: str, options: dict[str, str] | Any) -> str | None:
    """The text of the option an answer names, or None: by text, by letter, or as the nearest of the texts."""
    same = next((text for text in options.values() if plain(text) == plain(said)), None)
    if same is not None:
        return same
    letter = choice_letter(said, options)
    if letter is not None:
        return options[letter]
    values = {text: value for text in options.values() if (value := as_number(text)) is not None}
    number = as_number(said)
    if number is not None and len(values) == len(set(options.values())):
        return next((text for text, value in values.items() if value == number), None)
    close = sorted(((difflib.SequenceMatcher(None, plain(said), plain(text)).ratio(), text) for text in set(options.values())),
                   reverse=True)
    if close and close[0][0] >= CLOSE and (len(close) == 1 or close[0][0] > close[1][0]):
        return close[0][1]
    return None


def _same_list(said: list[Any], gold: list[Any] | None) -> bool:
    def item(value: Any) -> Any:
        number = as_number(str(value))
        return plain(str(value)) if number is None else number
    return gold is not None and [item(value) for value in said] == [item(value) for value in gold]


def _parts(row: Row, about: dict[str, Any]) -> tuple[str, ...]:
    names = []
    for field in ("task", "skills", "context", "grade", "category"):
        value = about.get(field) if about else row.raw(field)
        names += [str(v) for v in as_list(value) or ([value] if value else [])]
    return tuple(dict.fromkeys(name for name in names if name))
