"""The figures as a table, for the terminal and as Markdown. Shares are shown in per cent."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

PAPER = {
    "vstar": 86.4, "hrbench4k": 78.9, "hrbench8k": 74.6, "treebench": 40.7, "mmerealworld": 61.9, "mmerealworld-lite": 61.9,
    "seed2plus": 71.0, "charxiv_dq": 83.0, "charxiv_rq": 46.3, "mathvista": 76.3, "mathverse": 61.3, "wemath": 38.8,
    "dynamath": 65.5, "logicvista": 54.9}
"""The row Qwen3-VL-8B of the paper's table, per cent. It does not say whether MME-RealWorld is the full or the Lite one."""

Cells = list[list[str]]


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def spread(found: Mapping[str, Any]) -> str:
    interval = found.get("ci95")
    return "–" if not interval else f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"


def figures(records: Mapping[str, Mapping[str, Any]], titles: Mapping[str, str], *, paper: bool = False) -> Cells:
    """A heading and one line per benchmark: score, 95 % interval, n, what could not be read or judged, other readings."""
    lines = [["benchmark", "score", "95 %", "n", "± shows", "unparsed", "unscored", *["paper, 8B"] * paper, "also"]]
    for name, found in records.items():
        also = ", ".join(f"{key.replace('_', ' ')} {percent(value)}" for key, value in found["variants"].items())
        given = [f"{PAPER[name]:.1f}" if name in PAPER else "–"] * paper
        lines.append([titles[name], percent(found["score"]), spread(found), str(found["n"]), percent(found["detectable"]),
                      str(found["unparsed"]), str(found["unscored"]), *given, also])
    return lines


def text(cells: Cells) -> str:
    """Aligned columns: the first and the last to the left, numbers to the right."""
    widths = [max(len(line[k]) for line in cells) for k in range(len(cells[0]))]
    last = len(widths) - 1
    lines = ["  ".join(cell.ljust(width) if k in (0, last) else cell.rjust(width)
                       for k, (cell, width) in enumerate(zip(line, widths, strict=True))).rstrip() for line in cells]
    return "\n".join([lines[0], "─" * max(map(len, lines)), *lines[1:]])


def markdown(cells: Cells) -> str:
    head, *rest = [[cell.replace("|", "\\|") for cell in line] for line in cells]
    rule = ["---", *["---:"] * (len(head) - 2), "---"]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *rest]) + "\n"


def comparison(compared: Mapping[str, Mapping[str, Any]], titles: Mapping[str, str]) -> Cells:
    """This run against another: difference in points, its interval, b and c counts, p, and what this n could show."""
    lines = [["benchmark", "difference", "95 %", "won", "lost", "n", "p", "± shows", "test"]]
    for name, found in compared.items():
        difference = "–" if found["difference"] is None else f"{100 * found['difference']:+.1f}"
        p = "–" if found["p"] is None else f"{found['p']:.3g}"
        lines.append([titles[name], difference, spread(found), str(found["won"]), str(found["lost"]), str(found["n"]), p,
                      percent(found["detectable"]), found["test"]])
    return lines


def notes(records: Mapping[str, Mapping[str, Any]]) -> Sequence[str]:
    return [f"{name}: {note}" for name, found in records.items() for note in found["notes"]]


def tools(records: Mapping[str, Mapping[str, Any]], titles: Mapping[str, str], overall: Mapping[str, Any]) -> Cells:
    """Tool use by benchmark and arm; nothing where no answer says how many calls it made."""
    lines = [["tool use", "arm", "score", "rate", "calls", "failed", "answers", "by tool"]]
    for name, found in records.items():
        arms = found.get("arms") or {found["arm"]: found}
        lines += [_tool_line(titles[name], arm, part["score"], part["tool_use"]) for arm, part in arms.items()]
    if len(records) > 1:
        lines += [_tool_line("all", arm, None, use) for arm, use in overall.get("tool_use", {}).items()]
    lines = [line for line in lines if line]
    return lines if len(lines) > 1 else []


def _tool_line(title: str, arm: str, score: float | None, use: Mapping[str, Any]) -> list[str]:
    if not use["answers"]:
        return []
    by_tool = ", ".join(f"{name} {value:.2f}" for name, value in use["by_tool"].items())
    return [title, arm, percent(score), percent(use["tool_rate"]), f"{use['calls_per_question']:.2f}",
            percent(use["failed_share"]),
            str(use["answers"]), by_tool]


def wisdom(records: Mapping[str, Mapping[str, Any]], titles: Mapping[str, str], overall: Mapping[str, Any]) -> Sequence[str]:
    """One line per benchmark with both arms, and one for all of them."""
    found = [(titles[name], record["wisdom"]) for name, record in records.items() if "wisdom" in record]
    if len(found) > 1 and "wisdom" in overall:
        found.append(("all", overall["wisdom"]))
    return [f"{title}: " + ", ".join(_wise(values)) for title, values in found]


def _wise(values: Mapping[str, Any]) -> Sequence[str]:
    shown = [f"{name.replace('_', ' ')} {percent(values[name])} ({spread({'ci95': values[name + '_ci95']})})"
             for name in ("needed", "unneeded", "undecidable", "needed_call", "missed_call", "blind_call")
             if values.get(name) is not None]
    rescue = (f"rescued {values['rescued']}, harmed {values['harmed']} of {values['questions']} "
              f"(McNemar p {values['mcnemar_p']:.3g})")
    return [f"p0 {percent(values['p0'])}", f"p1 {percent(values['p1'])}", *shown, rescue]
