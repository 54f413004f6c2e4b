"""Answers -> marks: the benchmark's rules first, the project's judge where they can't say, three values all the way."""
from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from hdpo.background import BackgroundLoop
from hdpo.errors import UserError
from hdpo.evaluation.extraction import final_answer
from hdpo.evaluation.items import UNPARSED, Benchmark, Item, Mark
from hdpo.evaluation.predictions import Prediction
from hdpo.protocols import Judge
from hdpo.types import Verdict

AT_ONCE = 512     # questions put to the judge before the first is awaited
WAY_OUT = ("set JUDGE_BASE_URL (and JUDGE_API_KEY, JUDGE_MODEL), or --set judge.base_url=http://HOST:PORT/v1; "
           "`make judge` serves one")


def check_judge(benchmarks: Sequence[Benchmark], judge: bool, *, rules_only: bool, known: bool = False) -> None:
    """Raises UserError, before anything is loaded, for a benchmark whose official score needs a judge where there is none.

    `known`: the answers are there, so that rules may turn out to decide all of them.
    """
    for benchmark in benchmarks:
        if judge or benchmark.judge == "fallback" or benchmark.judge == "maths" and (rules_only or known):
            continue
        rules = "; --rules-only scores its multiple-choice questions alone" if benchmark.judge == "maths" else ""
        raise UserError(f"{benchmark.name} is scored by a judge and none is configured: {WAY_OUT}{rules}")


def mark_all(benchmark: Benchmark, items: Mapping[str, Item], predictions: Sequence[Prediction], judge: Judge | None,
             background: BackgroundLoop | None, *, rules_only: bool = False) -> list[Mark]:
    """One mark per prediction whose item is not dropped, in order. Raises UserError where a judge is needed and missing."""
    marks: list[Mark | None] = []
    open_questions: list[tuple[int, Item, Prediction, str]] = []
    for prediction in predictions:
        item = items[prediction.id]
        if item.dropped:
            continue
        answer = final_answer(prediction.answer)
        if prediction.error:
            marks.append(Mark(item, prediction.sample, None, by="none", detail=prediction.error))
        elif rules_only and benchmark.judge == "maths" and "multi" not in item.kind:
            marks.append(Mark(item, prediction.sample, None, by="none", detail="free-form, left out by --rules-only"))
        elif (mark := by_rule(benchmark, item, prediction.sample, answer)) is not None:
            marks.append(mark)
        else:
            open_questions.append((len(marks), item, prediction, answer))
            marks.append(None)
    if open_questions and judge is None:
        if benchmark.judge != "fallback" and not rules_only:
            raise UserError(f"{len(open_questions)} of {len(marks)} answers to {benchmark.name} need a judge and none is "
                            f"configured (the first: {open_questions[0][1].id}): {WAY_OUT}; --rules-only scores its "
                            "multiple-choice questions alone")
        for place, item, prediction, answer in open_questions:
            marks[place] = Mark(item, prediction.sample, False, unparsed=True, said=answer[:200])
    elif open_questions:
        assert background is not None and judge is not None
        found = background.run(_ask(benchmark, judge, open_questions))
        for (place, *_), mark in zip(open_questions, found, strict=True):
            marks[place] = mark
    return [mark for mark in marks if mark is not None]


def by_rule(benchmark: Benchmark, item: Item, sample: int, answer: str) -> Mark | None:
    """The mark that rules alone give an answer; None where they can't say."""
    decision = benchmark.decide(item, answer) if answer else UNPARSED
    if decision.verdict is Verdict.UNSCORED:
        return None
    return Mark(item, sample, decision.verdict is Verdict.CORRECT, decision.unparsed, said=decision.said or answer[:200])


async def _ask(benchmark: Benchmark, judge: Judge, questions: Sequence[tuple[int, Item, Prediction, str]]) -> list[Mark]:
    marks: list[Mark] = []
    for start in range(0, len(questions), AT_ONCE):
        marks += await asyncio.gather(*[ask(benchmark, judge, item, prediction.sample, answer)
                                        for _, item, prediction, answer in questions[start:start + AT_ONCE]])
    return marks


async def ask(benchmark: Benchmark, judge: Judge, item: Item, sample: int, answer: str) -> Mark:
    """The judge's mark; unscored, with the reason, where it gives no verdict."""
    question, truth = benchmark.judged(item)
    said = await judge.judge(question, truth, answer)
    correct = None if said.verdict is Verdict.UNSCORED else said.verdict is Verdict.CORRECT
    return Mark(item, sample, correct, by=said.by, said=answer[:200], detail=said.detail)


def audit_records(benchmark: Benchmark, arm: str, marks: Sequence[Mark]) -> list[dict[str, Any]]:
    """One record per answer that was put to a judge: what it was shown and what it said."""
    records = []
    for mark in marks:
        if mark.by in ("judge", "cache"):
            question, truth = benchmark.judged(mark.item)
            verdict = "unscored" if mark.correct is None else "correct" if mark.correct else "wrong"
            records.append({"benchmark": benchmark.name, "arm": arm, "id": mark.item.id, "sample": mark.sample,
                            "question": question, "ground_truth": truth, "prediction": mark.said, "verdict": verdict,
                            "by": mark.by, "detail": mark.detail})
    return records
