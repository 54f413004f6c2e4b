"""Who decided what: one JSON Lines file per step and rank, and the disagreements between rule and judge in them.

A small share of what the rules decided (reward.cross_check) is put to the judge too, for this file only: the verdict
that trains is always the first one.
"""
from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hdpo.agent.parse import extract_answer
from hdpo.types import Judgement, Trajectory, Verdict


def audit_record(trajectory: Trajectory, judgement: Judgement, second: Judgement | None = None) -> dict[str, Any]:
    """One line of the file. `second` is what the judge said about an answer that a rule decided, if it was asked."""
    task = trajectory.task
    record: dict[str, Any] = {
        "task": task.id, "data_source": task.data_source, "sample": trajectory.sample_index, "end": trajectory.end.value,
        "question": task.question, "ground_truth": task.ground_truth, "prediction": extract_answer(trajectory.final_turn),
        "verdict": judgement.verdict.value, "by": judgement.by, "detail": judgement.detail}
    if second is not None:
        record["judge_verdict"], record["judge_detail"] = second.verdict.value, second.detail
    return record


class AuditLog:
    """Writes {folder}/step_000012_rank0.jsonl; a step that is repeated after a resume replaces its file.

    Records that the same process writes for the same step, one call after another, are kept together.
    """

    def __init__(self, folder: str | os.PathLike[str], rank: int = 0) -> None:
        self.folder, self.rank = Path(folder), rank
        self._step: int | None = None

    def write(self, step: int, records: Iterable[dict[str, Any]]) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step_{step:06d}_rank{self.rank}.jsonl"
        partial = path.with_suffix(".partial")
        before = path.read_text(encoding="utf-8") if step == self._step else ""
        self._step = step
        with partial.open("w", encoding="utf-8", errors="replace") as file:
            file.write(before)
            for record in records:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        partial.replace(path)
        return path


def read_audit(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All records of a run in the order of steps and ranks, each with its "step". An absent folder has none; a line that a
    crash has torn is left out."""
    records = []
    for path in sorted(Path(folder).glob("step_*_rank*.jsonl")):
        if (step := path.stem.split("_")[1]).isdecimal() and path.is_file():
            with path.open(encoding="utf-8", errors="replace") as file:
                records += [{"step": int(step), **record} for record in map(_record, file) if record]
    return records


def _record(line: str) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and "verdict" in found else None


def disagreements(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records where rule and judge both gave a verdict, and not the same one."""
    unscored = Verdict.UNSCORED.value
    return [r for r in records if r.get("judge_verdict", unscored) != unscored and r["judge_verdict"] != r["verdict"]]
