"""Evaluation: greedy rollouts of held-out tasks, and what they say about accuracy and about tool use.

The rollout and scoring code is that of training, so that a number measured here and a number trained on are the same.
"""
from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from hdpo.config import Config
from hdpo.protocols import Flag
from hdpo.state.dump import write_rollouts
from hdpo.train.rollout_metrics import RolloutRow, behaviour, rollout_rows
from hdpo.types import RewardedGroup, Task, Trajectory

if TYPE_CHECKING:       # whoever only reads results needs no torch
    from hdpo.agent.queue import PromptQueue
    from hdpo.ranks.world import World
    from hdpo.train.metrics import Gather

Summary = dict[str, Any]


class Collects(Protocol):
    stop: Flag | None

    def collect(self, tasks: Sequence[Task], *, queue: PromptQueue, group_size: int, temperature: float, step: int,
                weight_version: int) -> list[tuple[Trajectory, ...]]: ...


class Scores(Protocol):
    def score(self, groups: Sequence[tuple[Trajectory, ...]]) -> list[RewardedGroup]: ...


@dataclass(frozen=True, slots=True)
class EvalResult:
    """`summary` and `rows` cover all ranks; `groups` are this rank's, for its part of the dump."""

    summary: Summary
    rows: tuple[RolloutRow, ...]
    groups: tuple[RewardedGroup, ...]

    def scalars(self) -> dict[str, float]:
        """The summary's numbers as `eval/{name}` and `eval/{data_source}/{name}`, for the log."""
        parts = {"eval": self.summary, **{f"eval/{name}": part for name, part in self.summary["families"].items()}}
        return {f"{prefix}/{key}": float(value) for prefix, part in parts.items()
                for key, value in part.items() if isinstance(value, (int, float))}


def evaluate(rollouts: Collects, scorer: Scores, tasks: Sequence[Task], *, gather: Gather | None = None, rank: int = 0,
             queue: PromptQueue | None = None, step: int = 0, weight_version: int = 0) -> EvalResult:
    """One greedy trajectory per task. Collective: `queue` (None: all tasks) gives each to one rank, and every rank gets
    the result.

    Raises what the scorer raises when too many trajectories are unscored.
    """
    from hdpo.agent.queue import static_queue
    collected = rollouts.collect(
        tasks, queue=queue or static_queue(), group_size=1, temperature=0.0, step=step, weight_version=weight_version)
    groups = tuple(scorer.score(collected))
    mine = rollout_rows(groups, rank=rank)
    rows = tuple(row for part in (gather(mine) if gather is not None else [mine]) for row in part)
    return EvalResult(summary=summarise(rows), rows=rows, groups=groups)


class Evaluator:
    """Holds what an evaluation needs. The engine must carry the weights to be judged when it is called."""

    def __init__(self, config: Config, rollouts: Collects, scorer: Scores, tasks: Sequence[Task], world: World) -> None:
        self.config, self.rollouts, self.scorer, self.tasks, self.world = config, rollouts, scorer, tasks, world

    def __call__(self, label: str, step: int) -> EvalResult | None:
        """Evaluate, dump to eval/{label}.parquet (a part per rank) and enter the figures into summary.json. Collective.

        None, and nothing is written, when the run was asked to stop meanwhile: half an evaluation is no evaluation.
        """
        from hdpo.train.collect import prompt_queue
        world, run = self.world, self.config.run.path
        result = evaluate(self.rollouts, self.scorer, self.tasks, gather=world.gather, rank=world.rank, step=step,
                          weight_version=step, queue=prompt_queue(world, self.config.run.deterministic))
        if world.any(self.rollouts.stop is not None and self.rollouts.stop.is_set()):
            return None
        write_rollouts(run / "eval" / f"{label}.parquet", result.groups, step=step, rank=world.rank, world=world.size)
        if world.is_main:
            path = run / "summary.json"
            known = json.loads(path.read_text()) if path.is_file() else {}
            write_summary(path, {**known, label: result.summary})
        world.barrier()
        return result


def summarise(rows: Sequence[RolloutRow]) -> Summary:
    """`behaviour` of all rows, plus "families" (per data_source) and "need" ("needed", "not_needed"; where known)."""
    families = sorted({row.data_source for row in rows})
    need = {"needed": [row for row in rows if row.tool_needed is True],
            "not_needed": [row for row in rows if row.tool_needed is False]}
    return {
        **behaviour(rows),
        "families": {name: behaviour([row for row in rows if row.data_source == name]) for name in families},
        "need": {name: behaviour(part) for name, part in need.items() if part},
    }


def write_summary(path: str | os.PathLike[str], summaries: dict[str, Summary]) -> None:
    """Write {"sft": ..., "rl": ...} as JSON, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(summaries, indent=2) + "\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


COLUMNS = (("accuracy", "accuracy"), ("tool rate", "tool_rate"), ("calls", "calls_mean"),
           ("blind", "blind_call_rate"), ("missed", "missed_call_rate"), ("unscored", "unscored"))
"""Column title and field of the before/after table, in the terminal and in the report."""


def table_rows(summary: Summary) -> list[tuple[str, Summary]]:
    """(label, statistics) in the table's order: all, by need, by family."""
    need = [(label, summary["need"][name]) for label, name in
            (("tool needed", "needed"), ("tool not needed", "not_needed")) if name in summary["need"]]
    return [("all", summary), *need, *summary["families"].items()]


def format_value(name: str, value: float | None) -> str:
    """Shares in per cent with one decimal, `calls_mean` with two decimals, a dash where nothing was counted."""
    if value is None:
        return "–"
    return f"{value:.2f}" if name == "calls_mean" else f"{100 * value:.1f}%"


def format_table(before: Summary, after: Summary | None = None) -> str:
    """A terminal table, one line per row of `table_rows`; with `after`, each cell reads before → after."""
    others = dict(table_rows(after)) if after is not None else {}
    lines = [["", "rows", *(title for title, _ in COLUMNS)]]
    for label, part in table_rows(before):
        other = others.get(label, {})
        cells = [label, str(part["rows"])]
        for _, name in COLUMNS:
            cell = format_value(name, part[name])
            cells.append(cell if after is None else f"{cell} → {format_value(name, other.get(name))}")
        lines.append(cells)
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = ["  ".join([line[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in
                                                    zip(line[1:], widths[1:], strict=True)]) for line in lines]
    rule = "─" * len(text[0])
    return "\n".join([text[0].rstrip(), rule, *text[1:]])
