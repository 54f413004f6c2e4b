"""timeline.jsonl: for every step and rank, when each phase began and how long it took. Rank 0 writes what all ranks gather."""
from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Span = tuple[str, float, float]
"""(phase, seconds after the step began, seconds it took)."""


class Timeline:
    """One line a step: {"step", "seconds", "ranks": [{"spans", "parts"}]}. `parts` divide a phase: {"rollout": {"tools": s}}.

    The first line that a process writes takes the place of those of its step and later ones, which a run that went back wrote.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._begun = path, False

    def write(self, step: int, seconds: float, ranks: Iterable[dict[str, Any]]) -> None:
        if not self._begun:
            kept = [line for line in read_timeline(self._path) if line["step"] < step]
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}.tmp")
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
            os.replace(temporary, self._path)
            self._begun = True
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, "seconds": round(seconds, 4), "ranks": list(ranks)}) + "\n")


class Spans:
    """The phases of this rank's step, as they are timed."""

    def __init__(self) -> None:
        self._spans: list[Span] = []
        self._parts: dict[str, dict[str, float]] = {}

    def note(self, phase: str, start: float, seconds: float) -> None:
        self._spans.append((phase, round(start, 4), round(seconds, 4)))

    def divide(self, phase: str, parts: Mapping[str, float]) -> None:
        """Where the phase's seconds went; adds to what was said before in the step."""
        held = self._parts.setdefault(phase, {})
        for name, seconds in parts.items():
            held[name] = round(held.get(name, 0.0) + max(0.0, seconds), 4)

    def take(self) -> dict[str, Any]:
        found = {"spans": self._spans, "parts": self._parts}
        self._spans, self._parts = [], {}
        return found


def read_timeline(path: Path) -> list[dict[str, Any]]:
    """The lines in the order of the steps; one that a crash has torn is left out. A missing file has none."""
    found: dict[int, dict[str, Any]] = {}
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            record = json.loads(line)
            _check(record)
            found[int(record["step"])] = record
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return [found[step] for step in sorted(found)]


def _check(record: dict[str, Any]) -> None:
    """Raises what arithmetic on a record of another shape does."""
    float(record["seconds"])
    for rank in record["ranks"]:
        for _, start, seconds in rank["spans"]:
            float(start + seconds)
        for parts in rank["parts"].values():
            float(sum(parts.values()))
