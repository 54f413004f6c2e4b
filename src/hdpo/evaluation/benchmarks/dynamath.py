"""DynaMath: 501 seed questions in ten variants. `average` over all 5,010, `worst`: seeds right in every variant.

A float must be within 0.001 of the truth, absolutely, as published; "2π" is a number. The answer may be the JSON object
the official prompt asks for, with backslashes that JSON does not know.
"""
from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence

from hdpo.evaluation.extraction import as_number, choice_letter, only_number, plain
from hdpo.evaluation.items import CANT_SAY, Benchmark, Decision, Figures, Item, Mark, all_right, by_part, decided, mean
from hdpo.evaluation.published import Row
from hdpo.evaluation.statistics import Estimate
from hdpo.reward.choice import options_of

TOLERANCE = 0.001
_SHORT = re.compile(r'"short[ _]answer"\s*:\s*("(?:[^"\\]|\\.)*"|[^,}\n]+)', re.IGNORECASE | re.DOTALL)


class DynaMath(Benchmark):
    name, title = "dynamath", "DynaMath"
    hub_splits = tuple(f"sample_variant{k}" for k in range(1, 11))
    layouts = (("*sample_variant*.parquet",), ("sample_variant*/*.parquet",), ("*.parquet",), ("DynaMath*.tsv",), ("*.tsv",),
               ("*.jsonl",), ("*.json",))
    required = (("question",), ("ground_truth", "answer"), ("answer_type",))

    def parse(self, row: Row) -> Iterator[Item]:
        seed = row.text("qid", "id", "problem_id") or str(row.number)
        place = [int(found) for found in re.findall(r"variant[_-]?(\d+)", str(row.file))]
        variant = row.text("varid", "variant") or (str(place[-1]) if place else "")
        gold = row.text("ground_truth", "answer")
        level = row.text("knowledge_level")
        yield Item(f"{seed}/{variant}" if variant else seed, row.text("question"), gold, _options(row.text("question")), seed,
                   tuple(part for part in (row.text("subject"), level) if part), kind=row.text("answer_type").lower(),
                   extra={"variant": variant}, image=row.raw("decoded_image", "image"),
                   dropped="" if gold else "it has no answer")

    def decide(self, item: Item, answer: str) -> Decision:
        said = short_answer(answer)
        if not said:
            return CANT_SAY
        if item.kind == "float":
            return _float(said, item.gold)
        if item.kind == "multiple choice":
            letter = choice_letter(said, item.options)
            return CANT_SAY if letter is None else decided(letter == item.gold.strip("() .").upper(), letter)
        gold = plain(item.gold)
        return decided(re.search(rf"(?<!\w){re.escape(gold)}(?!\w)", plain(said)) is not None, said)

    def prompt(self, item: Item) -> str:
        form = {"float": "a number with three decimals", "multiple choice": "the letter of the right option"}
        return f"{item.question}\nPut {form.get(item.kind, 'a short answer')}, and nothing else, into <answer></answer>."

    def figures(self, marks: Sequence[Mark]) -> Figures:
        average, worst = mean(marks), worst_case(marks)
        robust = worst.score / average.score if average.score and worst.score is not None else None
        return Figures(average, {"average": average, "worst": worst}, by_part(marks), extra={"robustness": robust})


def worst_case(marks: Sequence[Mark]) -> Estimate:
    """Share of seeds that are right in all variants there are; seeds that lack a variant are left out."""
    return all_right(marks, size=len({mark.item.extra["variant"] for mark in marks}))


def short_answer(answer: str) -> str:
    """The "short answer" of a JSON object in the text, else the text."""
    start, end = answer.find("{"), answer.rfind("}")
    if 0 <= start < end and "short" in answer.lower():
        body = answer[start:end + 1]
        for text in (body, re.sub(r"\\(?![\"\\/u])", r"\\\\", body)):
            try:
                found = json.loads(text, strict=False)
            except ValueError:
                continue
            if isinstance(found, dict):
                value = next((v for key, v in found.items() if key.lower().replace("_", " ") == "short answer"), None)
                if value is not None:
                    return str(value).strip()
    match = _SHORT.search(answer)
    return match[1].strip().strip('"').strip() if match else answer.strip()


def _float(said: str, gold: str) -> Decision:
    truth = as_number(gold)
    value = as_number(said)
    if value is None and said.split():
        value = as_number(said.split()[0].rstrip(",;"))     # "3.5 cm"
    if value is None:
        value = only_number(said)
    if value is None or truth is None:
        return CANT_SAY
    return decided(abs(value - truth) <= TOLERANCE + 1e-9, said)


def _options(question: str) -> dict[str, str]:
    """Six letters at least: a published answer F must be reachable."""
    return {letter: "" for letter in "ABCDEF"} | options_of(question)
