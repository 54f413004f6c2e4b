"""The ablation's figure (figure.svg) and its page (report.html): one file each, nothing fetched from elsewhere."""
from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path
from statistics import fmean

from hdpo.toyworld.ablation_table import Result, Row, Table

PANELS = {"tool_rate": "tool rate", "accuracy": "accuracy", "tool_rate_needed": "calls where one is needed",
          "tool_rate_not_needed": "calls where none is needed"}
"""Figure of a held-out evaluation -> how it is called."""

Points = dict[int, list[float]]
"""Step -> one value a seed."""


def points(row: Row, start: Sequence[Result], name: str) -> Points:
    """Values of a figure by step, those of SFT of the same seeds at step 0."""
    found: Points = {}
    seeds = {result.seed for result in row.results}
    for result in (*(one for one in start if one.seed in seeds and row.arm != "sft"), *row.results):
        curve = [{"step": 0, **_last(result)}] if result.arm == "sft" else result.curve
        for place in curve:
            if place.get(name) is not None:
                found.setdefault(int(place["step"]), []).append(float(place[name]))
    return dict(sorted(found.items()))


def _last(result: Result) -> dict[str, float]:
    """SFT has no curve: its answers are its figures."""
    return {"accuracy": result.share("accuracy"), "tool_rate": result.share("tool rate"),
            "tool_rate_needed": result.share("needed calls"), "tool_rate_not_needed": result.share("blind calls")}


def draw(table: Table) -> bytes:
    """An SVG: accuracy against tool rate, the way each arm goes, and three rates over steps. Lines are means, bands the range
    of the seeds."""
    import matplotlib
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "hdpo"        # the same bytes for the same results
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(12, 9), layout="constrained")
    start = next((row.results for row in table.rows if row.arm == "sft"), ())
    colours = pyplot.get_cmap("tab10").colors       # type: ignore[attr-defined]
    for row, colour in zip(table.rows, colours * (len(table.rows) // 10 + 1), strict=False):
        style = {"color": colour, "linestyle": "--" if row.arm.startswith("coupled") else "-",
                 "linewidth": 2.6 if row.arm.startswith("hdpo") else 1.6, "label": f"{row.arm} ({len(row.results)})"}
        curves = {name: points(row, start, name) for name in PANELS}
        _way(axes[0][0], curves["tool_rate"], curves["accuracy"], style)
        for axis, name in zip((axes[0][1], axes[1][0], axes[1][1]), ("accuracy", "tool_rate_needed", "tool_rate_not_needed"),
                              strict=True):
            steps, values = list(curves[name]), list(curves[name].values())
            axis.plot(steps, [fmean(v) for v in values], marker="o", markersize=3, **style)
            axis.fill_between(steps, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.08, linewidth=0)
            axis.set(title=PANELS[name], xlabel="RL step", **({} if name == "accuracy" else {"ylim": (-0.03, 1.03)}))
    axes[0][0].set(title="accuracy against tool rate, from SFT on", xlabel="tool rate", ylabel="accuracy")
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False,
                  title="arm (seeds); lines are means, bands and crosses the range over seeds")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    return buffer.getvalue()


def _way(axis: object, rates: Points, accuracies: Points, style: dict[str, object]) -> None:
    """The mean's way over steps, a dot at its end with the range of the seeds as a cross."""
    steps = [step for step in rates if step in accuracies]
    x, y = [fmean(rates[step]) for step in steps], [fmean(accuracies[step]) for step in steps]
    axis.plot(x, y, marker=".", markersize=4, **style)      # type: ignore[attr-defined]
    if steps:
        last = steps[-1]
        spread = [[[max(0.0, m - min(v))], [max(0.0, max(v) - m)]] for m, v in ((x[-1], rates[last]), (y[-1], accuracies[last]))]
        axis.errorbar(x[-1:], y[-1:], xerr=spread[0], yerr=spread[1], fmt="o", markersize=6,        # type: ignore[attr-defined]
                      color=style["color"], capsize=2, linewidth=1)


def write_page(out: Path, table: Table) -> None:
    """Write figure.svg and report.html."""
    picture = draw(table)
    image = f"data:image/svg+xml;base64,{base64.b64encode(picture).decode()}"
    css = resources.files("hdpo").joinpath("report/assets/report.css").read_text()
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    header, *rows = table.cells()
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(f"<tr><th>{escape(cells[0])}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in cells[1:])}</tr>"
                   for cells in rows)
    hours = sum(result.seconds for row in table.rows for result in row.results) / 3600
    plain = table.plain.score
    without = "" if plain is None else f" Asked without offering a tool, SFT is right in {100 * plain:.1f} % of them."
    note = ("p: McNemar over the same questions and seeds. Over seeds: Student's interval of the difference in points." + without)
    page = (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>hdpo ablation</title>'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{css}\nmain img {{ width: 100%; '
            f'max-height: none; background: #fff; border-radius: 12px }}</style></head><body><main>'
            f'<header class="page"><p>hdpo ablation</p><h1>When does a charge on tool calls keep those that are needed?</h1>'
            f'<p>{hours:.1f} hours of training</p></header>'
            f'<section><img alt="accuracy against tool rate" src="{image}">'
            '</section><section><h2>Held-out questions, per cent [95 % interval]</h2><div class="scroll"><table><thead><tr>'
            f'{head}</tr></thead><tbody>{body}</tbody></table></div><p class="note">{escape(note)}</p></section></main></body>'
            '</html>\n')
    for name, content in (("figure.svg", picture), ("report.html", page.encode())):
        part = out / f".{name}.{os.getpid()}.tmp"
        part.write_bytes(content)
        os.replace(part, out / name)
