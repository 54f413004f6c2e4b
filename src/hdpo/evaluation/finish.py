"""From kept answers to what a reader opens: predictions.jsonl, results.json, table.md, questions.parquet and the page."""
from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hdpo.background import BackgroundLoop
from hdpo.evaluation.evaluate import summarise, write_summary
from hdpo.evaluation.items import Benchmark, Item, Mark
from hdpo.evaluation.kept import Kept, end_of
from hdpo.evaluation.score import Scoring, score
from hdpo.protocols import Judge
from hdpo.state.dump import DumpedRollout, write_rows
from hdpo.train.rollout_metrics import RolloutRow
from hdpo.types import Judgement, Reward, Verdict

PREDICTION = ("benchmark", "id", "arm", "sample", "answer", "calls", "tools", "failed", "error", "end", "prompt_tokens",
              "response_tokens")
"""What a line of predictions.jsonl holds of an answer."""


def write_predictions(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text("".join(json.dumps({name: record[name] for name in PREDICTION}, ensure_ascii=False) + "\n"
                                 for record in records), encoding="utf-8", errors="replace")
    os.replace(temporary, path)


def finish(folder: Path, kept: Kept, benchmarks: Sequence[Benchmark], items: Mapping[str, Mapping[str, Item]],
           data: Path, records: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], *, judge: Judge | None,
           background: BackgroundLoop, against: Path | None = None, rules_only: bool = False) -> Scoring:
    """Score the records with the code of `hdpo score`, and write everything. Rank 0 alone."""
    predictions = folder / "predictions.jsonl"
    write_predictions(predictions, records)
    asked = [benchmark for benchmark in benchmarks if any(record["benchmark"] == benchmark.name for record in records)]
    found = score(asked, data, predictions, judge=judge, background=background, against=against, rules_only=rules_only,
                  settings=settings, items=items)
    marks = {(name, mark.item.id, arm, mark.sample): mark for name, arms in found.marks.items()
             for arm, several in arms.items() for mark in several}
    pairs = [(record, marks.get((record["benchmark"], record["id"], record["arm"], record["sample"]))) for record in records]
    _write_questions(folder / "questions.parquet", pairs)
    _write_page(folder, kept, pairs)
    return found


Pair = tuple[Mapping[str, Any], Mark | None]


def _write_questions(path: Path, pairs: Sequence[Pair]) -> None:
    """One row per answer; pictures by the name of their content, as files in images/."""
    rows = [{
        "benchmark": record["benchmark"], "id": record["id"], "arm": record["arm"], "sample": record["sample"],
        "question": mark.item.question if mark else "", "gold": mark.item.gold if mark else "", "answer": record["answer"],
        "said": mark.said if mark else "", "verdict": _verdict(mark).value, "unparsed": bool(mark and mark.unparsed),
        "by": mark.by if mark else "none", "detail": mark.detail if mark else "", "parts": list(mark.item.parts) if mark else [],
        "cluster": mark.item.cluster if mark else "", "calls": record["calls"], "tools": record["tools"],
        "failed": record["failed"],
        "end": record["end"], "error": record["error"], "turns": record["turns"], "observations": record["observations"],
        "images": record["images"], "prompt_tokens": record["prompt_tokens"], "response_tokens": record["response_tokens"],
    } for record, mark in pairs]
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    pq.write_table(pa.Table.from_pylist(rows), temporary, compression="zstd")
    os.replace(temporary, path)


def _verdict(mark: Mark | None) -> Verdict:
    if mark is None or mark.correct is None:
        return Verdict.UNSCORED
    return Verdict.CORRECT if mark.correct else Verdict.WRONG


def _write_page(folder: Path, kept: Kept, pairs: Sequence[Pair]) -> None:
    """What `hdpo report` reads: summary.json and eval/ARM.parquet, arms as a run's stages, benchmarks as its families."""
    summaries = {}
    for arm in dict.fromkeys(str(record["arm"]) for record, _ in reversed(pairs)):     # without tools first
        own = [(record, mark) for record, mark in pairs if record["arm"] == arm and record["sample"] == 0]
        rewards = [_reward(record, mark) for record, mark in own]
        summaries[arm] = summarise([_row(record, mark, reward) for (record, mark), reward in zip(own, rewards, strict=True)])
        write_rows(folder / "eval" / f"{arm}.parquet", [
            _dumped(record, mark, reward, kept) for (record, mark), reward in zip(own, rewards, strict=True)])
    write_summary(folder / "summary.json", summaries)


def _reward(record: Mapping[str, Any], mark: Mark | None) -> Reward:
    correct = _verdict(mark) is Verdict.CORRECT
    return Reward(float(correct), 1 / (record["calls"] + 1) if correct else 0.0, correct, record["answer"] is not None,
                  _verdict(mark) is not Verdict.UNSCORED)


def _row(record: Mapping[str, Any], mark: Mark | None, reward: Reward) -> RolloutRow:
    return RolloutRow(
        group=record["id"], data_source=record["benchmark"], tool_needed=None, end=end_of(record), calls=tuple(record["tools"]),
        failed_calls=record["failed"], infrastructure_calls=0, num_turns=len(record["turns"]),
        prompt_length=record["prompt_tokens"],
        response_length=record["response_tokens"], sampled_length=record["sampled_tokens"], seconds=0.0, verdict=_verdict(mark),
        by=mark.by if mark else "none", reward=reward)


def _dumped(record: Mapping[str, Any], mark: Mark | None, reward: Reward, kept: Kept) -> DumpedRollout:
    images = [kept.image(name) for name in record["images"]]
    judgement = Judgement(_verdict(mark), mark.by if mark else "none", mark.detail if mark else record["error"])
    return DumpedRollout(
        step=0, task_id=f"{record['benchmark']}/{record['id']}", data_source=record["benchmark"], tool_needed=None,
        sample_index=record["sample"], prompt="\n\n".join(f"[{m['role']}]\n{m['content']}" for m in record["prompt"]),
        question=record["prompt"][-1]["content"].replace("<image>", ""), turns=record["turns"], calls=record["call_records"],
        observations=record["observations"], images=[image or b"" for image in images], num_prompt_images=record["prompt_images"],
        answer=record["answer"], ground_truth=[mark.item.gold if mark else ""], verdict=judgement.verdict.value, by=judgement.by,
        detail=judgement.detail, end=record["end"], error=record["error"], reward_accuracy=reward.accuracy,
        reward_tool=reward.tool,
        correct=reward.correct, format_ok=reward.format_ok, scored=reward.scored, advantages=[], num_tool_calls=record["calls"],
        prompt_length=record["prompt_tokens"], token_ids=[], mask=[], log_probs=[], weight_version=0, seconds=0.0,
        weight_versions=[], index=0)
