"""Two runs beside each other: their last evaluations, their curves, and the settings that differ."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from hdpo.evaluation.evaluate import COLUMNS, format_value, table_rows
from hdpo.report.curves import curves
from hdpo.report.run import Run


def comparison(runs: Sequence[Run]) -> str:
    one, other = runs
    facts = ", ".join(f"{escape(run.name)}: {run.metrics[-1]['step'] if run.metrics else 0} steps" for run in runs)
    header = (f'<header class="page"><p>hdpo, two runs</p><h1>{escape(one.name)} → {escape(other.name)}</h1>'
              f"<p>{facts}; dashed curves are {escape(other.name)}'s</p></header>")
    return header + _evaluations(one, other) + _settings(one, other) + curves(runs)


def _evaluations(one: Run, other: Run) -> str:
    if not one.summaries or not other.summaries:
        return ""
    stages = [list(run.summaries)[-1] for run in (one, other)]
    parts = [dict(table_rows(run.summaries[stage])) for run, stage in zip((one, other), stages, strict=True)]
    head = "".join(f"<th>{title}</th>" for title, _ in COLUMNS)
    lines = []
    for label in dict.fromkeys([*parts[0], *parts[1]]):
        cells = []
        for _, name in COLUMNS:
            values = [format_value(name, rows.get(label, {}).get(name)) for rows in parts]
            cells.append(f'<td><span class="was">{values[0]}</span> <b>{values[1]}</b></td>')
        rows = parts[0].get(label) or parts[1][label]
        lines.append(f'<tr><th>{escape(label)}</th><td>{rows["rows"]}</td>{"".join(cells)}</tr>')
    which = " → ".join(f"{escape(run.name)}, {escape(stage)}" for run, stage in zip((one, other), stages, strict=True))
    return (f'<section><h2>Held-out tasks: {which}</h2><div class="scroll" tabindex="0"><table><thead><tr><th></th><th>tasks</th>'
            f'{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div></section>')


def _settings(one: Run, other: Run) -> str:
    flat = [dict(_flat(_config(run.folder / "config.yaml"))) for run in (one, other)]
    names = [name for name in dict.fromkeys([*flat[0], *flat[1]]) if flat[0].get(name) != flat[1].get(name)]
    if not all(flat):
        return ""

    def cell(value: Any) -> str:
        return f"<td>{escape(str(value))}</td>"

    lines = "".join(f"<tr><th>{escape(name)}</th>{''.join(cell(part.get(name, '–')) for part in flat)}</tr>" for name in names)
    table = (f'<div class="scroll" tabindex="0"><table class="words"><thead><tr><th>setting</th><th>{escape(one.name)}</th>'
             f'<th>{escape(other.name)}</th></tr></thead><tbody>{lines}</tbody></table></div>')
    return f"<section><h2>Settings that differ</h2>{table if names else '<p>None.</p>'}</section>"


def _config(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, yaml.YAMLError):
        return None


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from _flat(entry, f"{name}.{key}" if name else str(key))
    elif name:
        yield name, value
