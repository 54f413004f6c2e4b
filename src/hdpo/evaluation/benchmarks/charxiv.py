"""CharXiv, validation: four descriptive questions and one reasoning question about each of 1,000 figures. A judge decides.

Each answer is judged by itself, under the rubric of its template or answer type, which is part of the question the judge
sees. A question's rubric comes from reasoning_a_type (inst_category), not from its source.
"""
from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hdpo.evaluation.extraction import plain
from hdpo.evaluation.items import CANT_SAY, Benchmark, Decision, Item, decided
from hdpo.evaluation.published import Row

TEMPLATES = {
    1: "What is the title of the {place}?", 2: "What is the label of the x-axis of the {place}?",
    3: "What is the label of the y-axis of the {place}?", 4: "What is the leftmost labeled tick on the x-axis of the {place}?",
    5: "What is the rightmost labeled tick on the x-axis of the {place}?",
    6: "What is the lowest labeled tick on the y-axis of the {place}?",
    7: "What is the highest labeled tick on the y-axis of the {place}?",
    8: "By how much do neighbouring labeled ticks of the x-axis of the {place} differ?",
    9: "By how much do neighbouring labeled ticks of the y-axis of the {place} differ?",
    10: "How many lines are drawn in the {place}?", 11: "Do any two lines of the {place} cross?",
    12: "How many labeled ticks are on all axes of the {place} together?",
    13: "What are the labels in the legend of the {place}, from top to bottom and then from left to right?",
    14: "By how much do the largest and the smallest labeled tick of the colour bar of the {place} differ?",
    15: "What is the highest labeled tick of the colour bar of the {place}?",
    16: "What is the general trend of the data from left to right in the {place}?",
    17: "How many discrete entries does the legend of the {place} have?",
    18: "What is the layout of the subplots, as rows by columns?", 19: "How many subplots are there?"}
"""Our wording of the 19 published question templates, version 1."""

NONE_RULE = "If what is asked for is not there, answer Not Applicable."
RUBRICS = {
    "title": "the same title; letter case, spacing and notation of formulas do not matter",
    "ocr": "the same text or number as printed; notation of formulas and letter case do not matter, a missing or other term does",
    "quant": "exactly the same number; other notation of it does not matter",
    "bool": "the same yes or no", "enum": "the same labels, all of them and in the same order",
    "trend": "the same trend in other words", "layout": "the same numbers of rows and of columns in this order"}
_RUBRIC_OF = {1: "title", 11: "bool", 13: "enum", 16: "trend", 18: "layout", **dict.fromkeys(range(2, 8), "ocr"),
              **dict.fromkeys((8, 9, 10, 12, 14, 15, 17, 19), "quant")}
_GROUP_OF = {**dict.fromkeys(range(1, 8), "Information Extraction"), **dict.fromkeys((8, 9, 13, 14, 15), "Enumeration"),
             **dict.fromkeys((11, 16, 18), "Pattern Recognition"), **dict.fromkeys((10, 12, 19), "Counting"),
             17: "Compositionality"}

ANSWER_TYPES = {1: "text-in-chart", 2: "text-in-general", 3: "number-in-chart", 4: "number-in-general"}
_FORM = {1: "Answer with text as it is written in the chart, in full, with commas between several terms.",
         2: "Answer with one of the options if there are any, else with a short phrase.",
         3: "Answer with a number that is written in the chart."}
_REASONING_RULE = {
    1: "the same terms, in any order; notation may vary",
    2: "the same option if the question gives options, else the same meaning",
    3: "exactly the same number; notation may vary", 4: "exactly the same number; notation may vary"}


class _CharXiv(Benchmark):
    judge = "required"
    hub_splits = ("validation",)
    exclude = r"(?i)(?:^|[/_-])test[-_.]"

    def __init__(self) -> None:
        self._about: dict[Path, dict[str, Any]] = {}

    def decide(self, item: Item, answer: str) -> Decision:
        """Word for word the truth is right without being judged; everything else is the judge's."""
        return decided(True, answer) if plain(answer) == plain(item.gold) else CANT_SAY

    def judged(self, item: Item) -> tuple[str, str]:
        return f"{item.question}\n\nGrading rule, which goes before all others: {item.extra['rule']}.", item.gold

    def prompt(self, item: Item) -> str:
        return f"{item.question}\n{item.extra['form']} Put the answer, and nothing else, into <answer></answer>."

    def about(self, row: Row, figure: str) -> tuple[str, ...]:
        """Subject and number of subplots as parts, from the row or image_metadata_val.json beside the file."""
        folder = row.file.parent
        if folder not in self._about:
            file = folder / "image_metadata_val.json"
            self._about[folder] = json.loads(file.read_text()) if file.is_file() else {}
        known = self._about[folder].get(figure) or {}
        subject = row.text("category") or str(known.get("category") or "")
        count = int(row.text("num_subplots") or 0)
        shown = "" if not count else "1 subplot" if count == 1 else "2-4 subplots" if count < 5 else "5+ subplots"
        return tuple(part for part in (subject, shown) if part)


def figure_of(row: Row) -> str:
    path = row.text("figure_path")
    return row.text("figure_id") or row.key or (Path(path).stem if path else "") or str(row.number)


class CharXivDescriptive(_CharXiv):
    name, title = "charxiv_dq", "CharXiv-DQ"
    layouts = (("descriptive_val.json",), ("*val*.parquet",), ("*.parquet",), ("*descriptive_val*.tsv",), ("*descriptive*.json",))
    required = (("qids", "descriptive_q1", "qid", "question"), ("answers", "descriptive_a1", "answer"))

    def parse(self, row: Row) -> Iterator[Item]:
        figure = figure_of(row)
        if "qids" in row:
            pairs = list(zip(row.raw("qids") or [], row.raw("answers") or [], strict=False))
        elif "descriptive_q1" in row:
            pairs = [(row.raw(f"descriptive_q{k}"), row.raw(f"descriptive_a{k}")) for k in range(1, 5)]
        else:
            pairs = [(row.text("qid", "template") or 0, row.text("answer"))]
            figure = row.text("figure_id", "index") or figure
        for k, (template, gold) in enumerate(pairs):
            number = int(float(template or 0))
            place = where(row)
            group = [_GROUP_OF[number]] if number in _GROUP_OF else []
            question = TEMPLATES[number].format(place=place) if number in TEMPLATES else row.text("question")
            yield Item(f"{figure}_{k}" if len(pairs) > 1 else figure, question, str(gold or "").strip(), cluster=figure,
                       parts=(*group, *self.about(row, figure)), kind=str(number),
                       extra={"rule": RUBRICS[_RUBRIC_OF.get(number, "ocr")] + "; for Not Applicable an equivalent of it",
                              "form": NONE_RULE}, image=row.raw("image", "figure_path") or f"images/{figure}.jpg",
                       dropped="" if gold else "it has no answer")


class CharXivReasoning(_CharXiv):
    name, title = "charxiv_rq", "CharXiv-RQ"
    layouts = (("reasoning_val.json",), ("*val*.parquet",), ("*.parquet",), ("*reasoning_val*.tsv",), ("*reasoning*.json",))
    required = (("query", "reasoning_q", "question"), ("answer", "reasoning_a"))

    def parse(self, row: Row) -> Iterator[Item]:
        figure = row.text("figure_id", "index") or figure_of(row)
        kind = int(float(row.text("inst_category", "reasoning_a_type") or 0))
        gold = row.text("reasoning_a", "answer")
        form = _FORM.get(kind) or (f"Answer with a number with {len(gold.partition('.')[2])} decimals." if "." in gold
                                   else "Answer with a whole number.")
        parts = [ANSWER_TYPES[kind]] if kind in ANSWER_TYPES else []
        yield Item(figure, row.text("query", "reasoning_q", "question"), gold, cluster=figure,
                   parts=(*parts, *self.about(row, figure)), kind=str(kind),
                   extra={"rule": _REASONING_RULE.get(kind, _REASONING_RULE[2]), "form": form},
                   image=row.raw("image", "figure_path") or f"images/{figure}.jpg", dropped="" if gold else "it has no answer")


def where(row: Row) -> str:
    """The plot a descriptive question is about, in words."""
    place = row.raw("subplot_loc")
    if isinstance(place, (list, tuple)) and len(place) == 2:
        line, column = (int(value) for value in place)
    elif row.raw("subplot_row") is not None:
        line, column = int(float(row.text("subplot_row"))), int(float(row.text("subplot_col") or 0))
    else:
        return str(place) if place else "current plot"
    if line:
        return f"subplot at row {line} and column {column}"
    return place if isinstance(place, str) and place else "current plot"
