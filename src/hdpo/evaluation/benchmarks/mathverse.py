"""MathVerse testmini: 788 problems in five versions that move ever more of the question into the picture.

The score is the mean of the five; `vision_only` is quoted by some papers. Text Only is a figure of its own and in no mean.
Letters must match; a number's unit may differ. Free-form answers that rules can't compare go to the judge.
"""
from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from hdpo.evaluation.extraction import choice_letter, choice_letters, plain
from hdpo.evaluation.items import CANT_SAY, Benchmark, Decision, Figures, Item, Mark, by_part, decided, mean
from hdpo.evaluation.published import Row
from hdpo.evaluation.statistics import Estimate
from hdpo.reward.choice import options_of
from hdpo.reward.rules import rule_verdict
from hdpo.types import Verdict

VERSIONS = ("Text Dominant", "Text Lite", "Vision Intensive", "Vision Dominant", "Vision Only")
RULE = ("\n\nGrading rule: the answer must be the same option or the same value. The letter of an option must match exactly. "
        "The same quantity in another unit (0.5 m and 50 cm) is the same value.")


class MathVerse(Benchmark):
    name, title = "mathverse", "MathVerse"
    hub_splits = ("testmini",)
    layouts = (("testmini*.parquet",), ("testmini*.json",), ("MathVerse*.tsv",), ("*.parquet",), ("*.tsv",), ("*.json",))
    required = (("problem_index",), ("problem_version",), ("answer",))
    judge = "maths"
    exclude = r"version_split"      # the same rows once more

    def __init__(self) -> None:
        self._questions: dict[str, str] = {}      # of the fullest version seen of each problem

    def parse(self, row: Row) -> Iterator[Item]:
        problem, version = row.text("problem_index"), row.text("problem_version")
        shown = row.text("question")
        full = row.text("question_for_eval") or shown or self._questions.get(problem, "")
        self._questions.setdefault(problem, full)
        about = row.raw("metadata")
        about = about if isinstance(about, dict) else {}
        subject = about.get("subject") or row.text("subject")
        gold = mended(row.text("answer"))
        yield Item(row.text("sample_index", "index") or f"{problem}/{version}", full, gold, options_of(full), problem,
                   (version, *[str(subject)] * bool(subject)), kind=row.text("question_type").lower(),
                   extra={"version": version, "shown": shown}, image=row.raw("image"), dropped="" if gold else "it has no answer")

    def decide(self, item: Item, answer: str) -> Decision:
        said = mended(answer)
        if plain(said) == plain(item.gold):
            return decided(True, said)
        if "multi" in item.kind:
            return _choice(said, item)
        bare = [re.sub(r"\s*(?:°|\\circ|\^\\circ|degrees?)$", "", text.strip("$ ")) for text in (said, item.gold)]
        if plain(bare[0]) == plain(bare[1]):
            return decided(True, said)
        verdict = rule_verdict(bare[0], bare[1], "auto", item.question).verdict
        return CANT_SAY if verdict is Verdict.UNSCORED else decided(verdict is Verdict.CORRECT, said)

    def judged(self, item: Item) -> tuple[str, str]:
        return item.question + RULE, item.gold

    def bare(self, item: Item) -> str:
        return item.extra["shown"] or "Read the question in the picture and answer it."

    def prompt(self, item: Item) -> str:
        form = "the letter of the right option" if "multi" in item.kind else "the answer"
        return f"{self.bare(item)}\nPut {form}, and nothing else, into <answer></answer>."

    def figures(self, marks: Sequence[Mark]) -> Figures:
        shown = [mark for mark in marks if mark.item.extra["version"] != "Text Only"]
        parts = by_part(shown)
        found = {version.lower().replace(" ", "_"): mean([m for m in marks if m.item.extra["version"] == version])
                 for version in (*VERSIONS, "Text Only")}
        found = {name: value for name, value in found.items() if value.n}
        score = _over_versions(mean(shown), [v for name, v in found.items() if name != "text_only"])
        return Figures(score, {"mean": score, **found}, parts)


def _over_versions(micro: Estimate, versions: Sequence[Estimate]) -> Estimate:
    """The mean of the versions; they are equally long where no row is missing, and then it is the micro average."""
    scores = [version.score for version in versions if version.score is not None]
    return Estimate(sum(scores) / len(scores), micro.n, micro.se, micro.interval, micro.clusters) if scores else micro


def _choice(said: str, item: Item) -> Decision:
    gold = choice_letters(item.gold)
    options = item.options or dict.fromkeys("ABCDEF", "")
    if gold is not None and len(gold) > 1:
        letters = choice_letters(said)
        return CANT_SAY if letters is None else decided(letters == gold, said)
    letter, truth = choice_letter(said, options), choice_letter(item.gold, options)
    return CANT_SAY if letter is None or truth is None else decided(letter == truth, letter)


def mended(text: str) -> str:
    """An answer without what went wrong in publishing: degree signs read in another encoding, brackets around a letter."""
    text = text.replace("掳", "°").replace("\u00c2°", "°").replace("º", "°").strip()
    return re.sub(r"^\(([A-H])\)\.?$", r"\1", text)
