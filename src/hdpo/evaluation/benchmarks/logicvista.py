"""LogicVista: 448 puzzles whose options are drawn in the picture, one of them without question or answer (n = 447).

Several letters can be right together; one answer is a digit. The letters must be the same set.
"""
from __future__ import annotations

import re
from collections.abc import Iterator

from hdpo.evaluation.extraction import as_list, choice_letters, plain
from hdpo.evaluation.items import CANT_SAY, Benchmark, Decision, Item, decided
from hdpo.evaluation.published import Row


class LogicVista(Benchmark):
    name, title = "logicvista", "LogicVista"
    layouts = (("dataset.json",), ("*.parquet",), ("LogicVista*.tsv",), ("*.tsv",), ("*.json",))
    required = (("question",), ("answer",))

    def parse(self, row: Row) -> Iterator[Item]:
        question, gold = row.text("question"), row.text("answer")
        cell = row.raw("skill")
        skills = as_list(cell) or re.split(r"\s*[,;]\s*", str(cell or ""))
        yield Item(row.key or row.text("index", "id", "question_id") or str(row.number), question, gold,
                   parts=tuple(str(skill).strip() for skill in skills if str(skill).strip()),
                   image=row.raw("image", "imagename", "imagesource"), dropped="" if gold else "it has no answer")

    def decide(self, item: Item, answer: str) -> Decision:
        gold = choice_letters(item.gold)
        if gold is None:
            same = plain(answer).removeprefix("option ").strip("() ") == plain(item.gold)
            return decided(same, answer) if same or len(answer.split()) == 1 else CANT_SAY
        said = choice_letters(answer)
        return CANT_SAY if said is None else decided(said == gold, ", ".join(sorted(said)))

    def prompt(self, item: Item) -> str:
        return (f"{item.question}\nPut the letter of the right option into <answer></answer>; if several options are right, "
                "all their letters with commas between them.")
