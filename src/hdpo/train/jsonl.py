"""metrics.jsonl: one JSON object a step."""
from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hdpo.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hdpo.protocols import ShownRollout


class JsonlSink:
    """Writes a line a step, flushed at once. A number that is not finite becomes null.

    `resume_step` is the step the run continues with: lines of that and later steps, and a line torn by a crash, are
    removed first, so that every step appears once however often the run was interrupted. None starts an empty file.
    """

    def __init__(self, path: str | os.PathLike[str], resume_step: int | None = None) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [] if resume_step is None else [row for row in read_metrics(self.path) if row["step"] < resume_step]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        os.replace(temporary, self.path)
        self._file = self.path.open("a")

    def write(self, step: int, scalars: dict[str, float]) -> None:
        row = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
        self._file.write(json.dumps({"step": step, **row}) + "\n")
        self._file.flush()

    def write_rollouts(self, step: int, rollouts: Sequence[ShownRollout]) -> None:
        """They are kept in the rollout dumps."""

    def close(self) -> None:
        self._file.close()


def read_metrics(path: str | os.PathLike[str], left_out: list[str] | None = None) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl in file order, each with an integer "step"; a torn last line is left out. Missing file: [].

    Any other line that is no such row raises DataError, or is named in `left_out` where that is given.
    """
    rows = []
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    except OSError as exc:
        raise DataError(f"{path}: {exc.strerror}") from None
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or type(row.get("step")) is not int:
                raise ValueError
            rows.append(row)
        except ValueError:
            problem = f"{path}: line {number} is not JSON with a step"
            if number < len(lines) and left_out is None:
                raise DataError(problem) from None
            if number < len(lines) and left_out is not None:
                left_out.append(problem)
    return rows
