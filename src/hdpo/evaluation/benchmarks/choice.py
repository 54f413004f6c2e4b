"""What multiple-choice benchmarks have in common: options with letters, one of which is right."""
from __future__ import annotations

from collections.abc import Iterator

from hdpo.evaluation.extraction import as_list, choice_letter
from hdpo.evaluation.items import CANT_SAY, Benchmark, Decision, Item, decided, lettered
from hdpo.evaluation.published import Row
from hdpo.reward.choice import options_of

INSTRUCTION = "Choose the right option. Put its letter, and nothing else, into <answer></answer>."


class MultipleChoice(Benchmark):
    """Scored by the letter. A text in which no letter can be found is the judge's, and without one wrong and unparsed."""

    def decide(self, item: Item, answer: str) -> Decision:
        letter = choice_letter(answer, item.options or dict.fromkeys("ABCDEFGH", ""))
        return CANT_SAY if letter is None else decided(letter == item.gold, letter)

    def prompt(self, item: Item) -> str:
        return f"{self.bare(item)}\n{INSTRUCTION}"

    def parse(self, row: Row) -> Iterator[Item]:
        options = self.options(row)
        gold = letter_of(row.text("answer", "label", "Ground truth"), options)
        yield Item(self.row_id(row), self.question(row), gold, options, self.cluster(row), self.parts(row),
                   image=row.raw("image", "bytes"), dropped="" if gold else "it has no answer")

    def row_id(self, row: Row) -> str:
        return row.text("index", "question_id", "Question_id", "data_id") or str(row.number)

    def question(self, row: Row) -> str:
        return row.text("question", "text")

    def options(self, row: Row) -> dict[str, str]:
        return lettered(row) or listed(row.raw("multi-choice options", "options", "Answer choices"))

    def cluster(self, row: Row) -> str:
        return ""

    def parts(self, row: Row) -> tuple[str, ...]:
        part = row.text("category")
        return (part,) if part else ()


def letter_of(gold: str, options: dict[str, str]) -> str:
    """The letter of a published answer: "B", "(B)", "b." or the text of an option."""
    bare = gold.strip("()[]. \n").upper()
    return bare if len(bare) == 1 and bare.isalpha() else choice_letter(gold, options) or ""


def listed(cell: object) -> dict[str, str]:
    """Options from one cell: a list (or the text of one) of "(A) text" or bare texts, or lines "A. text"."""
    items = as_list(cell)
    if items is None:
        text = str(cell or "")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return options_of(text) or dict(zip("ABCDEFGH", lines, strict=False))
    found = {}
    for letter, item in zip("ABCDEFGHIJ", map(str, items), strict=False):
        text = item.strip().translate({0xFF08: "(", 0xFF09: ")"})
        for opening in (f"({letter})", f"{letter}.", f"{letter}:", f"{letter})"):
            if text.startswith(opening):
                text = text[len(opening):].strip()
                break
        found[letter] = text
    return found
