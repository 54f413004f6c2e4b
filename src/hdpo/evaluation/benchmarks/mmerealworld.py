"""MME-RealWorld, in full, Lite and CN: five options each, the last of which is "not in the image".

Overall is micro. `avg_c` is the paper's Avg-C, the unweighted mean over domains (subtasks). `share_e` is how often E was
answered. Questions on one picture are a cluster.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence

from hdpo.evaluation.benchmarks.choice import MultipleChoice
from hdpo.evaluation.extraction import choice_letter
from hdpo.evaluation.items import Decision, Figures, Item, Mark, by_part, decided, mean, picture_key
from hdpo.evaluation.published import Row
from hdpo.evaluation.statistics import NOTHING, Estimate

LEAD_INS = ("The best answer is", "The correct answer is", "The answer is", "The answer", "The best option is",
            "The correct option is", "Best answer:", "Best option:", "最佳答案是", "正确答案是", "答案是", "答案")


class MMERealWorld(MultipleChoice):
    required = (("question", "Text"), ("answer", "Ground truth"), ("multi-choice options", "Answer choices", "A"))
    hashes_images = True
    hub_splits = ("train",)

    def __init__(self, kind: str) -> None:
        self.name = f"mmerealworld-{kind}" if kind else "mmerealworld"
        self.title = f"MME-RealWorld{'-' + kind.upper() if kind == 'cn' else '-Lite' if kind else ''}"
        special = {"": r"(?i)(?:^|[/_-])(?:cn|lite)[/_.-]", "cn": r"(?i)[/_-]lite[/_.-]", "lite": r"(?i)[/_-]cn[/_.-]"}
        self.exclude = special[kind]
        self.layouts = (("*.parquet",), ("*.tsv",), ("*.json",), ("*.jsonl",))

    def parse(self, row: Row) -> Iterator[Item]:
        for item in super().parse(row):
            path = row.text("Image") if "Question_id" in row else ""
            yield Item(item.id, item.question, item.gold, item.options, path or picture_key(item.image), item.parts,
                       image=item.image, dropped=item.dropped)

    def row_id(self, row: Row) -> str:
        return row.text("Question_id", "index") or str(row.number)

    def parts(self, row: Row) -> tuple[str, ...]:
        """Task, Task/Subtask and Task/Subtask/Category, however the copy spells them."""
        task, _, subtask = row.text("Task").partition("/")
        fine = row.text("l2-category")
        if task:
            subtask, fine = row.text("Subtask"), fine or row.text("Category")
        else:
            task, _, subtask = row.text("category").partition("/")
        names = [name for name in (task[:1].upper() + task[1:], subtask, _merged(fine)) if name]
        return tuple("/".join(names[:k + 1]) for k in range(len(names)))

    def decide(self, item: Item, answer: str) -> Decision:
        for lead in LEAD_INS:
            if answer.lower().startswith(lead.lower()):
                answer = answer[len(lead):].lstrip(" :：") or answer
                break
        letter = choice_letter(answer, item.options)
        return super().decide(item, answer) if letter is None else decided(letter == item.gold, letter)

    def figures(self, marks: Sequence[Mark]) -> Figures:
        parts = by_part(marks)
        variants = {"avg_c": _over_domains(marks)}
        for task in sorted({mark.item.parts[0] for mark in marks if len(mark.item.parts) > 1}):
            own = [mark for mark in marks if mark.item.parts[:1] == (task,)]
            variants[f"{task.lower()}_avg_c"] = _over_domains(own)
        read = [mark.said for mark in marks if mark.said]
        return Figures(mean(marks), variants, parts, extra={"share_e": read.count("E") / len(read) if read else None})


def _over_domains(marks: Sequence[Mark]) -> Estimate:
    domains: dict[str, list[Mark]] = {}
    for mark in marks:
        if len(mark.item.parts) > 1:
            domains.setdefault(mark.item.parts[1].partition("/")[2], []).append(mark)
    scores = [score for found in domains.values() if (score := mean(found).score) is not None]
    return Estimate(sum(scores) / len(scores), len(scores)) if scores else NOTHING


def _merged(fine: str) -> str:
    """Finer categories that name the attribute asked for are one."""
    return "attribute" if "attribute" in fine.lower() else fine
