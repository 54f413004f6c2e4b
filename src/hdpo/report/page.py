"""`report.html` of a run: one self-contained file that fetches nothing.

Reads what the run's folder holds and leaves out what it lacks, so that a run that is still going has a report too.
"""
from __future__ import annotations

import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from hdpo.config import LogConfig
from hdpo.config.file import load_config
from hdpo.errors import ConfigError, DataError
from hdpo.evaluation.evaluate import COLUMNS, Summary, format_value, table_rows
from hdpo.report.compare import comparison
from hdpo.report.curves import curves
from hdpo.report.document import document, write_page
from hdpo.report.embed import embed
from hdpo.report.funnel import funnel
from hdpo.report.rollouts import SCAN_COLUMNS, choose, task_card
from hdpo.report.run import Run, read_run
from hdpo.report.shelf import Shelf
from hdpo.reward.audit import disagreements, read_audit
from hdpo.state.dump import DumpedRollout, read_rollouts, rollout_parts
from hdpo.text import one_line
from hdpo.train.timeline import read_timeline

NAMES = {"sft": "after SFT", "rl": "after RL", "tools": "with tools", "no_tools": "without tools"}
"""How the stages of summary.json are called in the page; others keep their own names."""

_MAX_DISAGREEMENTS, _MAX_PROBLEMS = 50, 12
MOST_TIMELINES = 200         # steps whose timeline a report.html holds; a served page asks for all


def write_report(run_folder: str | os.PathLike[str], against: str | os.PathLike[str] | None = None) -> Path:
    """Write `report.html` into the run's folder and return its path; with another run `report_against_NAME.html`.

    Raises DataError when there is nothing to report on.
    """
    folder = Path(run_folder)
    name = "report.html" if against is None else f"report_against_{Path(against).resolve().name}.html"
    return write_page(folder / name, page_of([folder] if against is None else [folder, Path(against)]))


def page_of(folders: Sequence[Path], *, served: bool = False) -> str:
    """The page of a run, of two beside each other, or of a curation's result. Uses what is there of summary.json, metrics.jsonl,
    timeline.jsonl, eval/*.parquet, rollouts/*.parquet, audit/*.jsonl, config.yaml, manifest.json and kept and dropped rows.

    `served`: rows are had from the server that sends the page, instead of some of them being in it. Raises DataError.
    """
    shelves, left_out = [Shelf(folder) for folder in folders], list[str]()
    curation = [(folder / "manifest.json").is_file() for folder in folders]
    tasks: list[str] = []
    if any(curation):
        if len(folders) > 1:
            raise DataError("results of a curation can't be compared with --compare")
        overview, views = funnel(folders[0]), [("rollouts", "Rows")]
    elif len(folders) > 1:
        runs = [_run(shelf) for shelf in shelves]
        left_out += [problem for run in runs for problem in run.left_out]
        overview = comparison(runs)
        views = [("pairs", "Task by task"), ("rollouts", "Rollouts"), ("timeline", "Time")]
    else:
        run = _run(shelves[0])
        overview, tasks = _overview(run)
        left_out += run.left_out
        views = [("rollouts", "Rollouts"), ("pairs", "Before and after"), ("timeline", "Time")]
    settings = "".join(_configuration(folder / "config.yaml") for folder in folders)
    data: dict[str, Any] = {"runs": [shelf.name for shelf in shelves], "served": served}
    if served:
        data["dumps"] = [dump.public(run) for run, shelf in enumerate(shelves) for dump in shelf.dumps()]
    else:
        data |= embed(shelves, tasks, left_out)
        data["timelines"] = [read_timeline(folder / "timeline.jsonl")[-MOST_TIMELINES:] for folder in folders]
    return document(" and ".join(data["runs"]), [
        ("overview", "Overview", _problems(left_out) + overview), *((name, label, "") for name, label in views),
        *([("settings", "Configuration", settings)] if settings else [])], data, served=served)


def _run(shelf: Shelf) -> Run:
    run = read_run(shelf.folder)
    if not run.metrics and not run.summaries and not shelf.dumps():
        raise DataError(run.left_out[0] if run.left_out else
                        f"{shelf.folder}: no metrics.jsonl, no summary.json and no rollouts to report on{_near(shelf.folder)}")
    return run


def _near(folder: Path) -> str:
    """A folder inside of it that has something, where one looked a level too high."""
    names = ("metrics.jsonl", "summary.json", "manifest.json")
    found = sorted(path.parent.name for name in names for path in folder.glob(f"*/{name}"))
    return f"; {folder / found[0]} has some" if found else ""


def _problems(left_out: Sequence[str]) -> str:
    if not left_out:
        return ""
    lines = "".join(f"<li>{escape(one_line(problem))}</li>" for problem in left_out[:_MAX_PROBLEMS])
    more = f"<li>and {len(left_out) - _MAX_PROBLEMS} more</li>" if len(left_out) > _MAX_PROBLEMS else ""
    return f'<section class="problems" role="note"><h2>Left out, because it can\'t be read</h2><ul>{lines}{more}</ul></section>'


def _overview(run: Run) -> tuple[str, list[str]]:
    """(HTML, the held-out tasks that it shows)."""
    try:
        cards, tasks = _trajectories(run.folder, list(run.summaries))
    except DataError as exc:
        cards, tasks = "", []
        run.left_out.append(str(exc))
    steps = {int(path.name[5:11]) for path in (run.folder / "rollouts").glob("step_*.parquet") if path.name[5:11].isdecimal()}
    links = {step: f"#rollouts?dump=0%2Fstep_{step:06d}" for step in steps}
    return "".join([_header(run), _tiles(run.summaries), _table(run.summaries), curves([run], links), cards,
                    _disagreements(run.folder / "audit")]), tasks


def _name(stage: str) -> str:
    return NAMES.get(stage, stage)


def _header(run: Run) -> str:
    facts = []
    if run.metrics:
        facts.append(f'{run.metrics[-1]["step"]} steps')
    if run.summaries:
        facts.append(f'{next(iter(run.summaries.values()))["rows"]} held-out tasks')
    return f'<header class="page"><p>hdpo run</p><h1>{escape(run.name)}</h1><p>{", ".join(facts)}</p></header>'


def _tiles(summaries: dict[str, Summary]) -> str:
    """The four numbers that say whether it worked, first stage against last."""
    if not summaries:
        return ""
    stages = list(summaries)
    first, last = summaries[stages[0]], summaries[stages[-1]]
    tiles = []
    for title, name in (("Accuracy", "accuracy"), ("Tool rate where needed", "tool_rate_needed"),
                        ("Tool rate where not needed", "tool_rate_not_needed"), ("Calls a task", "calls_mean")):
        if last.get(name) is None:
            continue
        full = max(1.0, first.get(name) or 0.0, last[name])
        shown = [("before", first), ("after", last)] if first is not last else [("after", last)]
        bars = "".join(f'<i class="{kind}" style="width:{100 * (part.get(name) or 0.0) / full:.1f}%"></i>'
                       for kind, part in shown)
        before = f'<small>{escape(_name(stages[0]))} {format_value(name, first.get(name))}</small>' if first is not last else ""
        tiles.append(f'<div class="tile"><h2>{title}</h2><p>{format_value(name, last[name])}{before}</p>'
                     f'<div class="bars">{bars}</div></div>')
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _table(summaries: dict[str, Summary]) -> str:
    if not summaries:
        return ""
    stages = [stages for stages in (list(summaries)[:1], list(summaries)[1:][-1:]) if stages]
    parts = [(name, dict(table_rows(summaries[name]))) for (name,) in stages]
    known = [(title, name) for title, name in COLUMNS        # of tasks whose need is not known, no decision is good or bad
             if any(row.get(name) is not None for _, rows in parts for row in rows.values())]
    head = "".join(f"<th>{title}</th>" for title, _ in known)
    lines = []
    for label, part in table_rows(summaries[parts[0][0]]):
        cells = []
        for _, name in known:
            values = [format_value(name, rows.get(label, {}).get(name)) for _, rows in parts]
            before = f'<span class="was">{values[0]}</span> ' if len(values) > 1 else ""
            cells.append(f"<td>{before}<b>{values[-1]}</b></td>")
        lines.append(f'<tr><th>{escape(label)}</th><td>{part["rows"]}</td>{"".join(cells)}</tr>')
    compared = " → ".join(escape(_name(name)) for name, _ in parts)
    note = "Tool rate: share of tasks with at least one call." + (
        " Blind: called though no tool is needed; missed: needed, not called and wrong; both as shares of all tasks whose need "
        "is known." if ("blind", "blind_call_rate") in known else "")
    return (f'<section><h2>{compared}</h2><div class="scroll"><table><thead><tr><th></th><th>tasks</th>{head}</tr></thead>'
            f'<tbody>{"".join(lines)}</tbody></table></div><p class="note">{note}</p></section>')


def _trajectories(folder: Path, stages: list[str]) -> tuple[str, list[str]]:
    """The same tasks before and after, where both dumps exist; otherwise those of the one that does, or training rollouts; and
    the tasks' ids."""
    dumps = [(stage, folder / "eval" / f"{stage}.parquet") for stage in stages[:1] + stages[1:][-1:]]
    dumps = [(stage, path) for stage, path in dumps if rollout_parts(path)]
    if not dumps:
        return _training_rollouts(folder), []
    scans = [read_rollouts(path, columns=SCAN_COLUMNS) for _, path in dumps]
    chosen = choose(scans[0], scans[-1])
    if not chosen:
        return "", []
    found: list[dict[str, DumpedRollout]] = []
    for _, path in dumps:
        rows = read_rollouts(path, task_ids=[task for task, _ in chosen])
        found.append({row.task_id: row for row in reversed(rows)})
    last = _name(dumps[-1][0])
    cards = [task_card(why.replace("after training", last),
                       [(_name(stage), rows[task]) for (stage, _), rows in zip(dumps, found, strict=True)])
             for task, why in chosen]
    names = " and ".join(escape(_name(stage)) for stage, _ in dumps)
    title = f"The same tasks, {names}" if len(dumps) > 1 else f"Some tasks, {names}"
    return f'<section><h2>{title}</h2>{"".join(cards)}</section>', [task for task, _ in chosen]


def _training_rollouts(folder: Path) -> str:
    """Of a run without evaluation: the first log.samples tasks of its last step, two rollouts of each group."""
    steps = [dump.id for dump in Shelf(folder).dumps() if dump.kind == "step"]
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
    try:
        text = escape(path.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return ""
    return f'<section><h2>{escape(path.resolve().parent.name)}</h2><pre class="text settings">{text}</pre></section>'
