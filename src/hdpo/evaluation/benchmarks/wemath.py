"""We-Math: 525 problems of two or three steps, each asked whole and step by step (1,740 questions).

Of a problem with its steps s and the whole m: IK some s wrong, m wrong; IG all s right, m wrong; strict: CM all s right and
m right, RM some s wrong and m right; loose: CM any s right and m right, RM all s wrong and m right. The score is
(CM + IG / 2) / problems, over the problems that are complete here: a missing row takes its problem out and is named.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from hdpo.evaluation.benchmarks.choice import MultipleChoice, letter_of, listed
from hdpo.evaluation.extraction import choice_letter
from hdpo.evaluation.items import CANT_SAY, Decision, Figures, Item, Mark, Unit, by_unit, decided, lettered, mean, merged
from hdpo.evaluation.published import Row

KINDS = ("IK", "IG", "CM", "RM")
Problem = tuple[list[bool], bool]     # steps in order, the whole


class WeMath(MultipleChoice):
    name, title = "wemath", "WeMath"
    hub_splits = ("testmini",)
    layouts = (("*.parquet",), ("testmini*.json",), ("WeMath*.tsv",), ("*.tsv",), ("*.json",))
    exclude = r"knowledge_structure"
    required = (("question",), ("answer",), ("ID", "problem_id"), ("key",), ("option", "A"))

    def parse(self, row: Row) -> Iterator[Item]:
        problem, key = row.text("ID", "problem_id"), row.text("key")
        problem = problem if "step" in problem else f"{key[:1]}steps_{problem}"     # a number that both kinds may have
        options = lettered(row) or split_options(row.text("option"))
        concept = row.text("knowledge concept")
        gold = letter_of(row.text("answer"), options)
        part = "S1" if "multi" not in key else "S2" if key.startswith("2") else "S3"
        yield Item(f"{problem}/{key}", row.text("question"), gold, options, problem, (part, *[concept] * bool(concept)),
                   kind=key, image=row.raw("image", "image_path"), dropped="" if gold else "it has no answer")

    def decide(self, item: Item, answer: str) -> Decision:
        letter = _after_answer(answer, item) or choice_letter(answer, item.options)
        return CANT_SAY if letter is None else decided(letter == item.gold, letter)

    def figures(self, marks: Sequence[Mark]) -> Figures:
        found, broken = problems(marks)
        strict, loose = (by_unit(worths(found, loose=loose)) for loose in (False, True))
        shown = ", ".join(broken[:5]) + " ..." * (len(broken) > 5)
        notes = (f"{len(broken)} problems are incomplete and left out: {shown}",) if broken else ()
        concepts = {name for mark in marks for name in mark.item.parts}
        parts = {name: mean([mark for mark in marks if name in mark.item.parts]) for name in sorted(concepts)}
        return Figures(strict, {"strict": strict, "loose": loose}, parts, notes, extra={
            "problems": {mode: shares(found, loose=mode == "loose") for mode in ("strict", "loose")}})

    def units(self, marks: Sequence[Mark]) -> list[Unit]:
        return merged(worths(problems(marks)[0], loose=False))


def _after_answer(answer: str, item: Item) -> str | None:
    """The official rule: the letter right after the last "Answer"; a longer word there is no letter."""
    tail = answer.rpartition("Answer")[2].lstrip("><: .(*\n") if "Answer" in answer else ""
    letter = tail[:1]
    return letter if letter in item.options and not tail[1:2].isalnum() and not tail[1:2] == " " else None


def split_options(text: str) -> dict[str, str]:
    """ "A. 3cm;B. 4cm; C. no correct answer" -> {"A": "3cm", ...}."""
    options: dict[str, str] = {}
    for piece in text.split(";"):
        piece = piece.strip()
        expected = "ABCDEFGHI"[len(options)] if len(options) < 9 else ""
        if expected and piece[:1] == expected and piece[1:2] in (".", ":", ")", "、", "．"):
            options[expected] = piece[2:].strip()
        elif options:
            options[max(options)] += f";{piece}"      # a semicolon inside an option
    return options or listed(text)


def problems(marks: Sequence[Mark]) -> tuple[dict[tuple[str, int], Problem], list[str]]:
    """Complete problems by (ID, sample), and the IDs of those with a row that is missing or unscored."""
    rows: dict[tuple[str, int], dict[str, bool | None]] = {}
    for mark in marks:
        rows.setdefault((mark.item.cluster, mark.sample), {})[mark.item.kind] = mark.correct
    found: dict[tuple[str, int], Problem] = {}
    for name, keys in rows.items():
        steps = next((int(key[0]) for key in keys if key[:1].isdigit()), 0)
        values = [keys.get(f"{steps}steps_{k + 1}") for k in range(steps)]
        whole = keys.get(f"{steps}steps_multi")
        if steps and whole is not None and None not in values:
            found[name] = ([bool(value) for value in values], whole)
    broken = sorted({name for name, sample in rows if (name, sample) not in found})
    return found, broken


def kind_of(problem: Problem, *, loose: bool) -> str:
    steps, whole = problem
    if not whole:
        return "IG" if all(steps) else "IK"
    return "CM" if (any(steps) if loose else all(steps)) else "RM"


def worths(found: dict[tuple[str, int], Problem], *, loose: bool) -> list[Unit]:
    worth = {"CM": 1.0, "IG": 0.5, "IK": 0.0, "RM": 0.0}
    return [Unit(name, name, worth[kind_of(problem, loose=loose)]) for (name, _), problem in found.items()]


def shares(found: dict[tuple[str, int], Problem], *, loose: bool) -> dict[str, Any]:
    kinds = [kind_of(problem, loose=loose) for problem in found.values()]
    known = kinds.count("RM") + kinds.count("CM")
    return {**{kind: kinds.count(kind) / len(kinds) if kinds else None for kind in KINDS},
            "RM_rate": kinds.count("RM") / known if known else None}
