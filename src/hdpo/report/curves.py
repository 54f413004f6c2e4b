"""Which charts a run has, and from which metrics."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from hdpo.report.charts import Series, legend, line_chart, short, stack_chart
from hdpo.report.run import Run

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
                                    "tool's share of the gradient": "hdpo/tool_gradient_share"}),
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


def curves(runs: Sequence[Run], links: Mapping[int, str] | None = None) -> str:
    """The charts of a run; of two, the second's curves are dashed. `links`: where a click on a step leads."""
    if not any(run.metrics for run in runs):
        return ""
    steps = sorted({row["step"] for run in runs for row in run.metrics})
    by_step = [{row["step"]: row for row in run.metrics} for run in runs]
    cards = []
    for title, share, names in PANELS:
        series = [Series(label if not number else f"{label}, {runs[1].name}", [rows.get(step, {}).get(name) for step in steps],
                         colour, bool(number))
                  for colour, (label, name) in enumerate(names.items()) for number, rows in enumerate(by_step)]
        series = [one for one in series if any(value is not None for value in one.values)]
        if series:
            last = [short(next(v for v in reversed(one.values) if v is not None), share) for one in series]
            cards.append(_chart(title, legend(series, last), line_chart(steps, series, share=share, links=links)))
    cards += [_phases(run, links if len(runs) == 1 else None, f", {run.name}" if len(runs) > 1 else "") for run in runs]
    return f'<section><h2>Training</h2><div class="charts">{"".join(cards)}</div></section>'


def _phases(run: Run, links: Mapping[int, str] | None, suffix: str) -> str:
    seen = dict.fromkeys(name for row in run.metrics for name in row)       # in the order things happen in a step
    phases = [name for name in seen if name.startswith("time/") and name != "time/step"]
    if not phases:
        return ""
    timed = [row for row in run.metrics if any(name in row for name in phases)]     # not an evaluation before step 1
    stack = [Series(name.removeprefix("time/"), [row.get(name) for row in timed]) for name in phases]
    key = legend(stack, [short(timed[-1].get(name)) for name in phases])
    return _chart(f"Seconds of a step{suffix}", key, stack_chart([row["step"] for row in timed], stack, links=links))


def _chart(title: str, key: str, svg: str) -> str:
    return f'<figure><figcaption>{escape(title)}</figcaption>{key}{svg}</figure>'
