"""TreeBench: 405 questions that need small evidence. Micro accuracy; Perception, Reasoning and their ten subtasks.

The boxes of target_instances are read by nobody here: an agent that prints none would have no mIoU.
"""
from __future__ import annotations

from hdpo.evaluation.benchmarks.choice import MultipleChoice
from hdpo.evaluation.published import Row


class TreeBench(MultipleChoice):
    name, title = "treebench", "TreeBench"
    layouts = (("TreeBench*.tsv",), ("*.tsv",), ("*.parquet",))

    def parts(self, row: Row) -> tuple[str, ...]:
        category = row.text("category")
        return (category.split("/")[0], category) if "/" in category else (category,) if category else ()
