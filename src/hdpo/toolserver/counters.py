"""What the server counts, as Prometheus text."""
from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from hdpo import oddities

BUCKETS_S = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
"""Upper bounds of the latency histogram, seconds."""


class Counters:
    """Calls by tool and outcome, and their duration by tool."""

    def __init__(self) -> None:
        self._calls: Counter[tuple[str, str]] = Counter()
        self._buckets: Counter[tuple[str, float]] = Counter()
        self._seconds: Counter[str] = Counter()

    def record(self, tool: str, outcome: str, seconds: float) -> None:
        """`outcome` is ok, failed (the model's code or call), timeout, restarted or infrastructure (ours)."""
        self._calls[tool, outcome] += 1
        self._seconds[tool] += seconds   # type: ignore[assignment]
        for bound in BUCKETS_S:
            if seconds <= bound:
                self._buckets[tool, bound] += 1

    def text(self, gauges: Mapping[str, float]) -> str:
        lines = [f"# TYPE hdpo_tool_{name} gauge\nhdpo_tool_{name} {value:g}" for name, value in gauges.items()]
        lines.append("# TYPE hdpo_tool_calls_total counter")
        lines += [f'hdpo_tool_calls_total{{tool="{tool}",outcome="{outcome}"}} {count}'
                  for (tool, outcome), count in sorted(self._calls.items())]
        lines.append("# TYPE hdpo_tool_call_seconds histogram")
        for tool, seconds in sorted(self._seconds.items()):
            total = sum(count for (name, _), count in self._calls.items() if name == tool)
            bounds = [(f"{bound:g}", self._buckets[tool, bound]) for bound in BUCKETS_S] + [("+Inf", total)]
            lines += [f'hdpo_tool_call_seconds_bucket{{tool="{tool}",le="{le}"}} {count}' for le, count in bounds]
            lines += [f'hdpo_tool_call_seconds_sum{{tool="{tool}"}} {seconds:g}',
                      f'hdpo_tool_call_seconds_count{{tool="{tool}"}} {total}']
        lines.append("# TYPE hdpo_tool_oddities_total counter")
        lines += [f'hdpo_tool_oddities_total{{name="{name}"}} {times}' for name, times in sorted(oddities.totals().items())]
        return "\n".join(lines) + "\n"
