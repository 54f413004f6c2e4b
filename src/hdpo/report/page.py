"""`report.html` of a run: one self-contained file without scripts or anything fetched from elsewhere.

Reads what the run's folder holds and leaves out what it lacks, so that a run that is still going has a report too.
"""
from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from hdpo.config import LogConfig
from hdpo.config.file import load_config
from hdpo.errors import ConfigError, DataError, UserError
from hdpo.evaluation.evaluate import COLUMNS, Summary, format_value, table_rows
from hdpo.report.charts import Series, legend, line_chart, short, stack_chart
from hdpo.report.rollouts import SCAN_COLUMNS, choose, task_card
from hdpo.reward.audit import disagreements, read_audit
from hdpo.state.dump import DumpedRollout, read_rollouts, rollout_parts
from hdpo.train.metrics import read_metrics

NAMES = {"sft": "after SFT", "rl": "after RL"}
"""How the stages of summary.json are called in the page; others keep their own names."""

_ORDER = {"sft": 0, "rl": 2}
_MAX_DISAGREEMENTS = 50

PANELS: tuple[tuple[str, bool, dict[str, str]], ...] = (
    ("Tool rate", True, {"where needed": "tool/rate_needed", "where not needed": "tool/rate_not_needed",
                         "all": "tool/rate"}),
    ("Accuracy", True, {"all": "reward/accuracy/mean", "with a call": "reward/accuracy_with_tool",
                        "without": "reward/accuracy_without_tool"}),
    ("Bad decisions", True, {"blind calls": "tool/blind_call_rate", "missed calls": "tool/missed_call_rate",
                             "failed calls": "tool/failed_call_rate"}),
    ("Held-out evaluation", True, {"accuracy": "eval/accuracy", "tool rate, needed": "eval/tool_rate_needed",
                                   "tool rate, not needed": "eval/tool_rate_not_needed"}),
    ("Reward", False, {"accuracy": "reward/score/mean", "tool": "reward/tool_score/mean",
                       "format": "reward/format_score/mean"}),
    ("Groups with a signal", True, {"accuracy": "hdpo/groups_with_accuracy_signal", "tool": "hdpo/groups_with_tool_signal",
                                    "tool's share of |A|": "hdpo/tool_advantage_mass"}),
    ("Time of the rollout phase", True, {"engine": "rollout/share_engine", "waiting for tools": "rollout/share_tools",
                                         "waiting for other ranks": "rollout/share_ranks"}),
    ("|Q|, correct rollouts of a group", False, {"mean": "hdpo/q_size_mean"}),
    ("Loss", False, {"accuracy": "actor/pg_loss/acc", "tool": "actor/pg_loss/tool"}),
    ("SFT loss, nat a token", False, {"loss": "sft/loss", "held out": "eval/sft_loss"}),
    ("Gradient norm", False, {"norm": "actor/grad_norm"}),
    ("Entropy, nat", False, {"entropy": "actor/entropy"}),
    ("Trainer against engine, nat", False, {"k1": "mismatch/k1", "k3": "mismatch/k3", "mean |d|": "mismatch/abs"}),
    ("Trainer against engine, ratio", False, {"largest": "mismatch/ratio_max", "99th percentile": "mismatch/ratio_p99",
                                              "median": "mismatch/ratio_p50"}),
    ("Tokens of a response", False, {"mean": "response_length/mean", "sampled": "sampled_length/mean"}),
    ("Lost rollouts", True, {"unscored": "score/unscored", "cut by a budget": "response_length/clip_ratio",
                             "unparseable": "end/unparseable"}),
)
"""Title, whether it is a share, and {label: metric} of each chart; charts and curves without data are left out."""


def write_report(run_folder: str | os.PathLike[str]) -> Path:
    """Write `report.html` into the run's folder and return its path.

    Uses summary.json, metrics.jsonl, eval/*.parquet, audit/*.jsonl and config.yaml, each if present. Raises DataError
    when there is neither a summary nor a metric.
    """
    folder = Path(run_folder)
    metrics = _by_step(read_metrics(folder / "metrics.jsonl"))
    summaries = _read_summary(folder / "summary.json")
    if not metrics and not summaries:
        raise DataError(f"{folder}: no metrics.jsonl and no summary.json to report on")
    sections = [
        _header(folder, metrics, summaries), _tiles(summaries), _table(summaries), _curves(metrics),
        _trajectories(folder, list(summaries)), _disagreements(folder / "audit"), _configuration(folder / "config.yaml")]
    css = resources.files("hdpo").joinpath("report/assets/report.css").read_text()
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"     # the browser holds us to our word
    page = (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(folder.resolve().name)}</title>'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{css}</style></head>'
            f'<body><main>{"".join(sections)}</main></body></html>\n')
    path = folder / "report.html"
    temporary = folder / f".report.html.{os.getpid()}.tmp"
    try:
        temporary.write_text(page)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _read_summary(path: Path) -> dict[str, Summary]:
    """Stages in the order of training, whichever was evaluated first."""
    try:
        found = json.loads(path.read_text())
        return {stage: found[stage] for stage in sorted(found, key=lambda stage: _ORDER.get(stage, 1))}
    except FileNotFoundError:
        return {}
    except json.JSONDecodeError as exc:
        raise DataError(f"{path}: not valid JSON: {exc.msg}") from None


def _by_step(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per step: an evaluation writes a line of its own beside that of the step it follows."""
    steps: dict[int, dict[str, Any]] = {}
    for row in rows:
        steps.setdefault(row["step"], {}).update(row)
    return [steps[step] for step in sorted(steps)]


def _name(stage: str) -> str:
    return NAMES.get(stage, stage)


def _header(folder: Path, metrics: Sequence[dict[str, Any]], summaries: dict[str, Summary]) -> str:
    facts = []
    if metrics:
        facts.append(f'{metrics[-1]["step"]} steps')
    if summaries:
        facts.append(f'{next(iter(summaries.values()))["rows"]} held-out tasks')
    return f'<header class="page"><p>hdpo run</p><h1>{escape(folder.resolve().name)}</h1><p>{", ".join(facts)}</p></header>'


def _tiles(summaries: dict[str, Summary]) -> str:
    """The four numbers that say whether it worked, first stage against last."""
    if not summaries:
        return ""
    stages = list(summaries)
    first, last = summaries[stages[0]], summaries[stages[-1]]
    tiles = []
    for title, name in (("Accuracy", "accuracy"), ("Tool rate where needed", "tool_rate_needed"),
                        ("Tool rate where not needed", "tool_rate_not_needed"), ("Calls a task", "calls_mean")):
        if last[name] is None:
            continue
        full = max(1.0, first[name] or 0.0, last[name])
        shown = [("before", first), ("after", last)] if first is not last else [("after", last)]
        bars = "".join(f'<i class="{kind}" style="width:{100 * (part[name] or 0.0) / full:.1f}%"></i>'
                       for kind, part in shown)
        before = f'<small>{escape(_name(stages[0]))} {format_value(name, first[name])}</small>' if first is not last else ""
        tiles.append(f'<div class="tile"><h2>{title}</h2><p>{format_value(name, last[name])}{before}</p>'
                     f'<div class="bars">{bars}</div></div>')
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _table(summaries: dict[str, Summary]) -> str:
    if not summaries:
        return ""
    stages = [stages for stages in (list(summaries)[:1], list(summaries)[1:][-1:]) if stages]
    parts = [(name, dict(table_rows(summaries[name]))) for (name,) in stages]
    head = "".join(f"<th>{title}</th>" for title, _ in COLUMNS)
    lines = []
    for label, part in table_rows(summaries[parts[0][0]]):
        cells = []
        for _, name in COLUMNS:
            values = [format_value(name, rows.get(label, {}).get(name)) for _, rows in parts]
            before = f'<span class="was">{values[0]}</span> ' if len(values) > 1 else ""
            cells.append(f"<td>{before}<b>{values[-1]}</b></td>")
        lines.append(f'<tr><th>{escape(label)}</th><td>{part["rows"]}</td>{"".join(cells)}</tr>')
    compared = " → ".join(escape(_name(name)) for name, _ in parts)
    note = ("Tool rate: share of tasks with at least one call. Blind: called though no tool is needed; missed: needed, not "
            "called and wrong; both as shares of all tasks whose need is known.")
    return (f'<section><h2>{compared}</h2><div class="scroll"><table><thead><tr><th></th><th>tasks</th>{head}</tr></thead>'
            f'<tbody>{"".join(lines)}</tbody></table></div><p class="note">{note}</p></section>')


def _trajectories(folder: Path, stages: list[str]) -> str:
    """The same tasks before and after, where both dumps exist; otherwise those of the one that does, or training rollouts."""
    dumps = [(stage, folder / "eval" / f"{stage}.parquet") for stage in stages[:1] + stages[1:][-1:]]
    dumps = [(stage, path) for stage, path in dumps if rollout_parts(path)]
    if not dumps:
        return _training_rollouts(folder)
    scans = [read_rollouts(path, columns=SCAN_COLUMNS) for _, path in dumps]
    chosen = choose(scans[0], scans[-1])
    if not chosen:
        return ""
    found: list[dict[str, DumpedRollout]] = []
    for _, path in dumps:
        rows = read_rollouts(path, task_ids=[task for task, _ in chosen])
        found.append({row.task_id: row for row in reversed(rows)})
    cards = [task_card(why, [(_name(stage), rows[task]) for (stage, _), rows in zip(dumps, found, strict=True)])
             for task, why in chosen]
    names = " and ".join(escape(_name(stage)) for stage, _ in dumps)
    return f'<section><h2>The same tasks, {names}</h2>{"".join(cards)}</section>'


def _training_rollouts(folder: Path) -> str:
    """Of a run without evaluation: the first log.samples tasks of its last step, two rollouts of each group."""
    steps = sorted({path.name.split(".")[0] for path in (folder / "rollouts").glob("step_*.parquet")})
    if not steps:
        return ""
    dump = folder / "rollouts" / f"{steps[-1]}.parquet"
    rows = read_rollouts(dump, columns=SCAN_COLUMNS)
    chosen = [task for task, _ in choose(rows, rows, _samples(folder / "config.yaml"))]
    groups: dict[str, list[DumpedRollout]] = {}
    for row in read_rollouts(dump, task_ids=chosen):
        groups.setdefault(row.task_id, []).append(row)
    cards = []
    for task in chosen:
        group = groups[task]
        # the one that earned least beside the one that earned most: what the group is compared by
        pair = sorted(group, key=lambda row: (row.verdict == "correct", -row.num_tool_calls))
        shown = [pair[0], pair[-1]] if len(pair) > 1 else pair
        cards.append(task_card(f"{len(group)} rollouts", [(f"rollout {group.index(row) + 1}", row) for row in shown]))
    return f'<section><h2>Rollouts of step {int(steps[-1].removeprefix("step_"))}</h2>{"".join(cards)}</section>' if cards else ""


def _samples(path: Path) -> int:
    """log.samples of the run; a folder without a readable configuration shows the default."""
    try:
        return load_config(path, environment={}).log.samples
    except ConfigError:
        return LogConfig().samples


def _curves(metrics: Sequence[dict[str, Any]]) -> str:
    if not metrics:
        return ""
    steps = [row["step"] for row in metrics]
    cards = []
    for title, share, names in PANELS:
        curves = [Series(label, [row.get(name) for row in metrics]) for label, name in names.items()]
        curves = [curve for curve in curves if any(value is not None for value in curve.values)]
        if curves:
            last = [short(next(v for v in reversed(curve.values) if v is not None), share) for curve in curves]
            cards.append(_chart(title, legend([c.label for c in curves], last), line_chart(steps, curves, share=share)))
    seen = dict.fromkeys(name for row in metrics for name in row)       # in the order things happen in a step
    phases = [name for name in seen if name.startswith("time/") and name != "time/step"]
    if phases:
        timed = [row for row in metrics if any(name in row for name in phases)]     # not an evaluation before step 1
        stack = [Series(name.removeprefix("time/"), [row.get(name) for row in timed]) for name in phases]
        key = legend([one.label for one in stack], [short(timed[-1].get(name)) for name in phases])
        cards.append(_chart("Seconds of a step", key, stack_chart([row["step"] for row in timed], stack)))
    return f'<section><h2>Training</h2><div class="charts">{"".join(cards)}</div></section>'


def _chart(title: str, key: str, svg: str) -> str:
    return f'<figure><figcaption>{escape(title)}</figcaption>{key}{svg}</figure>'


def _disagreements(folder: Path) -> str:
    """Where the rules decided and the judge, asked about the same answer, says otherwise."""
    checked = [record for record in read_audit(folder) if "judge_verdict" in record]
    if not checked:
        return ""
    differ = disagreements(checked)
    fields = ("question", "ground_truth", "prediction", "verdict", "detail", "judge_verdict", "judge_detail")
    lines = ["<tr>" + "".join(f"<td>{escape(str(record.get(name)))}</td>" for name in fields) + "</tr>"
             for record in differ[-_MAX_DISAGREEMENTS:]]
    titles = "".join(f"<th>{title}</th>" for title in ("question", "truth", "prediction", "rule says", "rule", "judge says",
                                                       "reply"))
    table = (f'<div class="scroll"><table class="words"><thead><tr>{titles}</tr></thead><tbody>{"".join(lines)}</tbody>'
             "</table></div>") if lines else ""
    shown = f" The last {len(lines)} of them:" if len(lines) < len(differ) else ""
    return (f'<section><h2>Rules against the judge</h2><p>{len(differ)} of {len(checked)} cross-checked verdicts differ.'
            f"{shown}</p>{table}</section>")


def _configuration(path: Path) -> str:
    if not path.exists():
        return ""
    text = escape(path.read_text())
    return f'<section><details><summary>Configuration</summary><pre class="text">{text}</pre></details></section>'


def main(argv: Sequence[str]) -> int:
    """`hdpo report`. Raises UserError."""
    parser = argparse.ArgumentParser(prog="hdpo report", description="Write RUN/report.html from what a run has logged.")
    parser.add_argument("run", type=Path, help="the run's folder, for example runs/demo")
    options = parser.parse_args(argv)
    if not options.run.is_dir():
        raise UserError(f"no such run folder: {options.run}")
    print(write_report(options.run))
    return 0
