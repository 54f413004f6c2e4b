"""SEED-Bench-2-Plus: 2,277 questions on charts, maps and web pages. Micro accuracy and the three kinds."""
from __future__ import annotations

from hdpo.evaluation.benchmarks.choice import MultipleChoice
from hdpo.evaluation.items import lettered
from hdpo.evaluation.published import Row


class Seed2Plus(MultipleChoice):
    name, title = "seed2plus", "SEED-Bench-2-Plus"
    layouts = (("*.parquet",), ("SEED*.tsv",), ("SEED-Bench-2-plus*.json",), ("*.tsv",), ("*.json",))

    def row_id(self, row: Row) -> str:
        return row.text("question_id", "index", "data_id") or str(row.number)

    def options(self, row: Row) -> dict[str, str]:
        return lettered(row, [f"choice_{letter}" for letter in "abcdefgh"]) or super().options(row)

    def parts(self, row: Row) -> tuple[str, ...]:
        kind = row.text("question_image_type", "category")
        return (kind,) if kind else ()
