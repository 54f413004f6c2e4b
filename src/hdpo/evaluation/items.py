"""The records of an evaluation and the protocol of a benchmark: rows -> items, an answer -> a decision, marks -> figures.

Item (a question) -> Mark (what one answer to it is worth) -> Figures. A mark is three-valued: an answer nobody could judge
is unscored, leaves every figure and is counted. Shares are in [0, 1].
"""
from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from hdpo.evaluation.extraction import LETTERS
from hdpo.evaluation.published import Row, find_files, read_dataset, read_rows
from hdpo.evaluation.statistics import Estimate, estimate
from hdpo.types import Verdict


@dataclass(frozen=True, slots=True)
class Item:
    """One question. `cluster` is shared by items that stand or fall together; `parts` are the categories it counts in.

    `image` is the path of its picture as it stands in the file; None where the row holds the picture itself, which is read
    when it is needed. An item that is `dropped` (the reason, in words) has an id and is never scored.
    """

    id: str
    question: str
    gold: str
    options: Mapping[str, str] = field(default_factory=dict)     # letter -> text; "" where the picture holds the text
    cluster: str = ""
    parts: tuple[str, ...] = ()
    kind: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
    image: Any = None
    dropped: str = ""
    source: Path | str | None = None     # the file or dataset its row is in, and the number of the row there
    row: int = 0


@dataclass(frozen=True, slots=True)
class Decision:
    """What the rules say about an answer: UNSCORED means they can't. `unparsed`: no answer was found in it."""

    verdict: Verdict
    unparsed: bool = False
    said: str = ""             # what was read in the answer: a letter, a number


UNPARSED = Decision(Verdict.WRONG, unparsed=True)
CANT_SAY = Decision(Verdict.UNSCORED)


def decided(correct: bool, said: str = "") -> Decision:
    return Decision(Verdict.CORRECT if correct else Verdict.WRONG, said=said)


@dataclass(frozen=True, slots=True)
class Mark:
    """What one answer is worth. `correct` is None where it is unscored; `by` is "rule", "judge", "cache" or "none"."""

    item: Item
    sample: int
    correct: bool | None
    unparsed: bool = False
    by: str = "rule"
    said: str = ""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Unit:
    """What one figure averages over: usually a question, for some benchmarks a composite of several."""

    id: str
    cluster: str
    value: float


@dataclass(frozen=True, slots=True)
class Figures:
    """`score` over n units; `variants` are other official readings of the same answers, `parts` categories."""

    score: Estimate
    variants: Mapping[str, Estimate]
    parts: Mapping[str, Estimate]
    notes: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)


class Benchmark:
    """One benchmark. A subclass says where its rows are, what they mean, and how its score is made of marks."""

    name: str = ""
    title: str = ""
    layouts: Sequence[Sequence[str]] = ()
    """File patterns of each published layout; the first layout that is there is read."""
    exclude: str = ""
    hub_splits: Sequence[str] = ("test",)
    """Splits of the published dataset, in their numbers' order."""
    required: Sequence[tuple[str, ...]] = (("question",), ("answer",))
    """Columns that every row has, each under one of its published names."""
    judge: Literal["fallback", "maths", "required"] = "fallback"
    """fallback: rules decide, a judge only what they can't read. maths: free-form answers need one. required: all do."""
    hashes_images: bool = False
    """Whether clusters are told by the pictures."""
    prompt_version: str = "1"

    def files(self, folder: Path) -> list[Path]:
        return find_files(folder, self.layouts, self.exclude)

    def items(self, folder: Path | str) -> Iterator[Item]:
        """Items in the order of the published files, or of the dataset of this name, with unique ids. Raises DataError."""
        seen: dict[str, int] = {}
        sources = self.splits(folder) if isinstance(folder, str) else self.files(folder)
        for source in sources:
            rows = read_dataset(source, self.hashes_images) if isinstance(source, str) else read_rows(source, self.hashes_images)
            for number, row in enumerate(rows):
                for names in self.required if number == 0 else ():
                    row.require(*names)
                for item in self.parse(row):
                    count = seen[item.id] = seen.get(item.id, 0) + 1
                    yield replace(item, id=item.id if count == 1 else f"{item.id}#{count}", source=source, row=row.number,
                                  image=item.image if is_path(item.image) else None)

    def splits(self, dataset: str) -> list[str]:
        """The splits of a published dataset, as `datasets` names them; a name with a split of its own is taken as it is."""
        return [dataset] if ":" in dataset else [f"{dataset}:{split}" for split in self.hub_splits]

    def parse(self, row: Row) -> Iterator[Item]:
        raise NotImplementedError

    def decide(self, item: Item, answer: str) -> Decision:
        """Whether `answer` (never empty) is right, by rules alone."""
        raise NotImplementedError

    def judged(self, item: Item) -> tuple[str, str]:
        """(question with the grading rule, ground truth) as the judge is shown them."""
        options = "".join(f"\n({letter}) {text}" for letter, text in item.options.items() if text)
        truth = f"({item.gold}) {item.options[item.gold]}" if item.options.get(item.gold) else item.gold
        return item.question + options, truth

    def prompt(self, item: Item) -> str:
        """The user's text, in this project's own words."""
        raise NotImplementedError

    def bare(self, item: Item) -> str:
        """The question and its options alone, for a model whose own prompt says how to answer."""
        return item.question + "".join(f"\n{letter}. {text}" for letter, text in item.options.items() if text)

    def figures(self, marks: Sequence[Mark]) -> Figures:
        return Figures(mean(marks), {}, by_part(marks))

    def units(self, marks: Sequence[Mark]) -> list[Unit]:
        """What the score averages over, each once: two runs are compared unit by unit."""
        return units(marks)


def units(marks: Sequence[Mark]) -> list[Unit]:
    """One unit per question: the share of its scored samples that are right."""
    values: dict[str, list[float]] = {}
    items: dict[str, Item] = {}
    for mark in marks:
        if mark.correct is not None:
            values.setdefault(mark.item.id, []).append(float(mark.correct))
            items[mark.item.id] = mark.item
    return [Unit(name, items[name].cluster or name, sum(v) / len(v)) for name, v in values.items()]


def mean(marks: Sequence[Mark]) -> Estimate:
    return average(units(marks))


def average(found: Sequence[Unit]) -> Estimate:
    return estimate([unit.value for unit in found], [unit.cluster for unit in found])


def by_unit(found: Sequence[Unit]) -> Estimate:
    """As `average`, where units that were sampled several times count once, with their mean."""
    return average(merged(found))


def merged(found: Sequence[Unit]) -> list[Unit]:
    values: dict[str, list[Unit]] = {}
    for unit in found:
        values.setdefault(unit.id, []).append(unit)
    return [Unit(name, same[0].cluster, sum(u.value for u in same) / len(same)) for name, same in values.items()]


def all_right(marks: Sequence[Mark], size: int) -> Estimate:
    """Share of clusters of `size` whose marks are all right, sample by sample; incomplete ones, an unscored mark included, are
    left out."""
    found: dict[tuple[str, int], list[bool | None]] = {}
    for mark in marks:
        found.setdefault((mark.item.cluster, mark.sample), []).append(mark.correct)
    return by_unit([Unit(name, name, float(all(values))) for (name, _), values in found.items()
                    if None not in values and len(values) == size])


def by_part(marks: Sequence[Mark]) -> dict[str, Estimate]:
    names: dict[str, list[Mark]] = {}
    for mark in marks:
        for part in mark.item.parts:
            names.setdefault(part, []).append(mark)
    return {name: mean(names[name]) for name in sorted(names)}


def lettered(row: Row, columns: Sequence[str] = LETTERS[:15]) -> dict[str, str]:
    """Options from columns A, B, C, ...; empty cells are no options."""
    return {name[-1].upper(): row.text(name) for name in columns if row.text(name)}


def is_path(cell: Any) -> bool:
    """Whether a picture's cell is the path of a file, and not the picture."""
    suffixes = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
    return isinstance(cell, str) and len(cell) < 1024 and cell.lower().endswith(suffixes)


def picture_key(cell: object) -> str:
    """A name of a picture's content, from the cell as it stands in the file."""
    data = (cell.get("bytes") or cell.get("path")) if isinstance(cell, dict) else cell
    raw = data if isinstance(data, bytes) else str(data or "").encode()
    return hashlib.blake2b(raw, digest_size=8).hexdigest()
