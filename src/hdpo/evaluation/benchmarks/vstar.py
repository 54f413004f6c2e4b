"""V*Bench: 191 questions on small details of large pictures. Micro accuracy, and its two subtasks."""
from __future__ import annotations

import random
from collections.abc import Iterator

from hdpo.evaluation.benchmarks.choice import MultipleChoice
from hdpo.evaluation.items import Item
from hdpo.evaluation.published import Row
from hdpo.reward.choice import options_of


class VStar(MultipleChoice):
    """The official test_questions.jsonl, VLMEvalKit's TSV, Parquet copies, or the raw folders.

    Raw files list the right option first. Their options are put into an order that depends on the file's name alone, so
    that a position says nothing.
    """

    name, title = "vstar", "V*Bench"
    layouts = (("test_questions.jsonl",), ("VStarBench*.tsv",), ("*.parquet",),
               ("direct_attributes/*.json", "relative_position/*.json"), ("*.tsv",))
    required = (("question", "text"), ("answer", "label", "options"))

    def parse(self, row: Row) -> Iterator[Item]:
        if "target_object" not in row and "label" in row:
            yield from self._official(row)
        elif row.file.suffix == ".json":
            yield self._raw(row)
        else:
            yield from super().parse(row)

    def _official(self, row: Row) -> Iterator[Item]:
        text, options = row.text("text", "question"), options_of(row.text("text", "question"))
        question = text.split("(A)")[0].strip() if options else text
        gold = row.text("label").strip("()").upper()
        yield Item(row.text("question_id", "index") or str(row.number), question, gold, options, parts=self.parts(row),
                   image=row.raw("image"), dropped="" if gold else "it has no answer")

    def _raw(self, row: Row) -> Item:
        part, name = row.file.parent.name, f"{row.file.parent.name}/{row.file.stem}"
        texts = [str(text) for text in row.raw("options") or []]
        order = list(range(len(texts)))
        random.Random(name).shuffle(order)
        options = {letter: texts[k] for letter, k in zip("ABCDEFGH", order, strict=False)}
        pictures = [row.file.with_suffix(suffix) for suffix in (".jpg", ".jpeg", ".png")]
        picture = next((str(path) for path in pictures if path.is_file()), None)
        gold = "ABCDEFGH"[order.index(0)] if texts else ""
        return Item(name, row.text("question"), gold, options, parts=(part,), image=picture,
                    dropped="" if gold else "it has no options")
