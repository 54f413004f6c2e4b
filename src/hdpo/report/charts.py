"""Small charts as inline SVG: lines over steps, and a stack over steps. Colours come from the page's CSS variables."""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape

WIDTH, HEIGHT = 420, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 10, 24
_COLOURS = 8            # --c1 to --c8 in the style sheet
_MAX_POINTS = 160       # a longer run is averaged into this many points
_SMOOTH_FROM = 20       # with at least so many points, a moving average is drawn over the faint raw line

Values = Sequence[float | None]


@dataclass(frozen=True, slots=True)
class Series:
    """One curve: `values` are aligned with the chart's steps, None where a step has no number.

    `colour` is its number among the chart's colours (None: its place); `dashed` tells a second run from the first."""

    label: str
    values: Values
    colour: int | None = None
    dashed: bool = False

    def css(self, index: int) -> str:
        return f"var(--c{(index if self.colour is None else self.colour) % _COLOURS + 1})"


def line_chart(steps: Sequence[int], series: Sequence[Series], *, share: bool = False,
               links: Mapping[int, str] | None = None) -> str:
    """An <svg>. `share` fixes the axis to 0..1 and labels it in per cent; `links` are where a click on a step leads."""
    steps, series = _thin(steps, series)
    present = [value for one in series for value in one.values if value is not None]
    low, high, ticks = (0.0, 1.0, [0.0, 0.5, 1.0]) if share else _axis(min(present), max(present))
    frame = _Frame(steps, low, high)
    parts = [frame.grid(ticks, share)]
    for index, one in enumerate(series):
        colour = one.css(index)
        count = sum(value is not None for value in one.values)
        shown = _smoothed(one.values) if count >= _SMOOTH_FROM else one.values
        if shown is not one.values:
            parts.append(f'<path d="{frame.path(one.values)}" class="raw" stroke="{colour}"/>')
        dashes = ' stroke-dasharray="5 4"' if one.dashed else ""
        parts.append(f'<path d="{frame.path(shown)}" class="line" stroke="{colour}"{dashes}/>')
        if count < _SMOOTH_FROM:        # few points, as of evaluations: show where they are
            parts.append(frame.dots(one.values, colour))
    return frame.svg("".join(parts) + frame.hover(series, share, links or {}))


def stack_chart(steps: Sequence[int], series: Sequence[Series], *, links: Mapping[int, str] | None = None) -> str:
    """An <svg> of the series on top of one another, from 0; a missing value counts as 0."""
    steps, series = _thin(steps, series)
    floor = [0.0] * len(steps)
    tops = []
    for one in series:
        floor = [base + (value or 0.0) for base, value in zip(floor, one.values, strict=True)]
        tops.append(floor)
    low, high, ticks = _axis(0.0, max(floor))
    frame = _Frame(steps, low, high)
    parts = [frame.grid(ticks, False)]
    for index in range(len(series) - 1, -1, -1):        # the tallest first; each next one covers its lower part
        parts.append(f'<path d="{frame.area(tops[index])}" fill="var(--c{index % _COLOURS + 1})" class="area"/>')
    return frame.svg("".join(parts) + frame.hover(series, False, links or {}))


def legend(series: Sequence[Series], last: Sequence[str]) -> str:
    """Colour, name and last value of each curve, as HTML."""
    items = [f'<span><i class="{"dashed" if one.dashed else ""}" style="background:{one.css(index)}"></i>{escape(one.label)} '
             f'<b>{escape(value)}</b></span>' for index, (one, value) in enumerate(zip(series, last, strict=True))]
    return f'<div class="legend">{"".join(items)}</div>'


def short(value: float | None, share: bool = False, digits: int = 3) -> str:
    """A number for an axis or a legend: `digits` significant digits, or per cent."""
    if value is None:
        return "–"
    if share:
        return f"{100 * value:.0f}%" if value in (0.0, 0.5, 1.0) else f"{100 * value:.1f}%"
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.{digits - 2}e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.{digits}g}" if abs(value) < 1000 else f"{value:,.{digits - 3}f}"


class _Frame:
    """Maps steps and values to the drawing's coordinates."""

    def __init__(self, steps: Sequence[int], low: float, high: float) -> None:
        self.steps, self.low, self.high = steps, low, high
        self.span = max(steps[-1] - steps[0], 1)

    def x(self, step: int) -> float:
        return _LEFT + (step - self.steps[0]) / self.span * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        inside = min(max((value - self.low) / (self.high - self.low), 0.0), 1.0)
        return HEIGHT - _BOTTOM - inside * (HEIGHT - _TOP - _BOTTOM)

    def path(self, values: Values) -> str:
        """A line through the values there are; a missing one (a step that is not evaluated) is passed over."""
        points = [f"{self.x(step):.1f} {self.y(value):.1f}"
                  for step, value in zip(self.steps, values, strict=True) if value is not None]
        return "M" + "L".join(points) if points else ""

    def area(self, tops: Sequence[float]) -> str:
        base = HEIGHT - _BOTTOM
        return f"{self.path(tops)}L{self.x(self.steps[-1]):.1f} {base}L{self.x(self.steps[0]):.1f} {base}Z"

    def dots(self, values: Values, colour: str) -> str:
        return "".join(f'<circle cx="{self.x(step):.1f}" cy="{self.y(value):.1f}" r="2.5" fill="{colour}"/>'
                       for step, value in zip(self.steps, values, strict=True) if value is not None)

    def grid(self, ticks: Sequence[float], share: bool) -> str:
        lines = []
        digits = next((n for n in range(3, 8) if len({short(tick, share, n) for tick in ticks}) == len(ticks)), 8)
        for tick in ticks:
            y = self.y(tick)
            lines.append(f'<line x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
                         f'<text x="{_LEFT - 7}" y="{y + 3.5:.1f}" text-anchor="end">{short(tick, share, digits)}</text>')
        for step, anchor in {self.steps[0]: "start", self.steps[-1]: "end"}.items():
            lines.append(f'<text x="{self.x(step):.1f}" y="{HEIGHT - 6}" text-anchor="{anchor}">step {step}</text>')
        return f'<g class="grid">{"".join(lines)}</g>'

    def hover(self, series: Sequence[Series], share: bool, links: Mapping[int, str]) -> str:
        """One invisible column per step whose tooltip reads all values there; needs no script."""
        width = (WIDTH - _LEFT - _RIGHT) / max(len(self.steps) - 1, 1)
        columns = []
        for index, step in enumerate(self.steps):
            lines = [f"step {step}"] + [f"{one.label}: {short(one.values[index], share)}" for one in series]
            column = (f'<rect x="{self.x(step) - width / 2:.1f}" y="{_TOP}" width="{width:.1f}" '
                      f'height="{HEIGHT - _TOP - _BOTTOM}"><title>{escape(chr(10).join(lines))}</title></rect>')
            columns.append(f'<a href="{escape(links[step])}" tabindex="-1">{column}</a>' if step in links else column)
        return f'<g class="hover">{"".join(columns)}</g>'

    def svg(self, content: str) -> str:
        return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{content}</svg>'


def _axis(low: float, high: float) -> tuple[float, float, list[float]]:
    """Round limits around [low, high] and three to six ticks; 0 is a limit when it is near."""
    if low > 0 and low < 0.6 * high:
        low = 0.0
    if high <= low:
        low, high = (low - abs(low) * 0.1, high + abs(high) * 0.1) if low else (0.0, 1.0)
    raw = (high - low) / 4
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return first * step, last * step, [index * step for index in range(first, last + 1)]


def _thin(steps: Sequence[int], series: Sequence[Series]) -> tuple[list[int], list[Series]]:
    """Average runs of neighbouring steps so that at most _MAX_POINTS remain."""
    every = math.ceil(len(steps) / _MAX_POINTS)
    starts = range(0, len(steps), every)

    def thinned(values: Values) -> list[float | None]:
        chunks = [[v for v in values[start:start + every] if v is not None] for start in starts]
        return [sum(chunk) / len(chunk) if chunk else None for chunk in chunks]

    last = [steps[min(start + every, len(steps)) - 1] for start in starts]
    return last, [replace(one, values=thinned(one.values)) for one in series]


def _smoothed(values: Values) -> list[float | None]:
    """Exponential moving average whose memory is about a tenth of the curve."""
    keep = 1 - 2 / (max(len(values) / 10, 2) + 1)
    average, out = None, []
    for value in values:
        if value is not None:
            average = value if average is None else keep * average + (1 - keep) * value
        out.append(None if value is None else average)
    return out
