"""HR-Bench 4K and 8K: 200 questions, each asked with four rotations of its options.

The score is the mean over the rotations, which are one cluster a question; `all_four_right` is the share of questions
that are right in every rotation.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence

from hdpo.evaluation.benchmarks.choice import MultipleChoice
from hdpo.evaluation.items import Figures, Item, Mark, all_right, mean, picture_key
from hdpo.evaluation.published import Row
from hdpo.evaluation.statistics import Estimate


class HRBench(MultipleChoice):
    required = (("question",), ("answer",), ("A",), ("B",), ("category",))
    hashes_images = True      # no column says which rows are one question

    def __init__(self, size: str) -> None:
        self.name, self.title = f"hrbench{size}", f"HRBench-{size.upper()}"
        self.hub_splits = (f"hrbench_{size}",)
        self.layouts = ((f"hr_bench_{size}.parquet",), (f"*hrbench_{size}*.parquet",), (f"*{size}*.parquet",),
                        (f"hr_bench_{size}.tsv",), (f"*{size}*.tsv",), ("*.parquet",), ("*.tsv",))

    def parse(self, row: Row) -> Iterator[Item]:
        for item in super().parse(row):
            yield Item(item.id, item.question, item.gold, item.options, f"{picture_key(item.image)} {item.question}", item.parts,
                       extra={"cycle": row.text("cycle_category")}, image=item.image, dropped=item.dropped)

    def figures(self, marks: Sequence[Mark]) -> Figures:
        parts = sorted({part for mark in marks for part in mark.item.parts})
        return Figures(over_cycles(marks), {"all_four_right": all_right(marks, size=4)},
                       {part: over_cycles([mark for mark in marks if part in mark.item.parts]) for part in parts})


def over_cycles(marks: Sequence[Mark]) -> Estimate:
    """The mean over rotations of the accuracy of each; with all rows there it is the accuracy over rows."""
    micro = mean(marks)
    cycles = {mark.item.extra["cycle"] for mark in marks}
    means = [mean([mark for mark in marks if mark.item.extra["cycle"] == cycle]).score for cycle in sorted(cycles)]
    scores = [score for score in means if score is not None]
    if not scores:
        return micro
    return Estimate(sum(scores) / len(scores), micro.n, micro.se, micro.interval, micro.clusters)
