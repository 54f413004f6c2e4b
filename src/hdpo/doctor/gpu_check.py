"""`hdpo doctor --gpu`: minutes that prove a GPU machine before days are spent on it, as one table and one JSON file.

Two child processes, so that what breaks one leaves the other: `kernels` (products, fused loss, packed attention, parking) and
`run` (a ZeRO-3 step of a random model with images, and the engine beside it). Each line has a limit; a line that could not be
measured says why and counts as failed. On a CPU the same code runs on toy sizes, which proves the check and not the machine.
"""
from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

GROUPS = ("hdpo.doctor.gpu_kernels", "hdpo.doctor.gpu_run")
GROUP_S = 900.0


@dataclass(frozen=True)
class Line:
    """One figure and the bound it has to keep; `at_least` turns the bound around. Without a bound it only informs."""

    name: str
    value: float | None
    unit: str = ""
    limit: float | None = None
    at_least: bool = False
    problem: str = ""

    @property
    def ok(self) -> bool:
        if self.problem or self.value is None:
            return not self.problem
        if self.limit is None:
            return True
        return self.value >= self.limit if self.at_least else self.value <= self.limit


class Lines:
    """Collects lines of a child process and hands each on at once, as JSON on its standard output."""

    def __init__(self, out: Any = None) -> None:
        self.out = out or sys.stdout

    def add(self, name: str, value: float | None, unit: str = "", limit: float | None = None, *, at_least: bool = False,
            problem: str = "") -> None:
        self.out.write("LINE " + json.dumps(asdict(Line(name, value, unit, limit, at_least, problem))) + "\n")
        self.out.flush()

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """What goes wrong in the step becomes its line, and the next step goes on."""
        try:
            yield
        except Exception as exc:   # noqa: BLE001  each step is a boundary: a device can fail in any way
            self.add(name, None, problem=f"{type(exc).__name__}: {' '.join(str(exc).split())[:300]}")


def check(out: Callable[[str], None] = print, path: Path | None = None) -> bool:
    """Run all groups, print the table, write the JSON; whether every line is within its limit."""
    lines: list[Line] = []
    where = _machine()
    out(f"GPU check: {where['device']}, torch {where['torch']}, CUDA {where['cuda'] or '-'}, driver {where['driver'] or '-'}")
    for module in GROUPS:
        for line in run_group(module):
            lines.append(line)
            out(format_line(line))
    failed = [line.name for line in lines if not line.ok]
    named = f"; not: {', '.join(failed)}" if failed else ""
    out(f"{len(lines) - len(failed)} of {len(lines)} lines are within their limits{named}")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        found = [asdict(line) | {"ok": line.ok} for line in lines]
        path.write_text(json.dumps({"machine": where, "ok": not failed, "lines": found}, indent=1) + "\n")
    return not failed


def run_group(module: str) -> list[Line]:
    """The lines of a child process; one that ends before its time is a line, too."""
    environment = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive"}
    try:
        done = subprocess.run([sys.executable, "-m", module], capture_output=True, text=True, timeout=GROUP_S,
                              env=os.environ | environment)
        output, errors, ended = done.stdout, done.stderr, f"exit status {done.returncode}" if done.returncode else ""
    except subprocess.TimeoutExpired as exc:
        output, errors, ended = _text(exc.stdout), _text(exc.stderr), f"no end after {GROUP_S:.0f} s"
    lines = [Line(**json.loads(text.partition("LINE ")[2])) for text in output.splitlines() if text.startswith("LINE ")]
    if ended:
        last = (errors.strip().splitlines() or ["no message"])[-1][:300]
        lines.append(Line(module.rpartition("_")[2], None, problem=f"{ended}: {last}"))
    return lines


def _text(output: bytes | str | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def format_line(line: Line) -> str:
    if line.problem:
        return f"  {line.name:<44} {'-':>10}  FAILED: {line.problem}"
    value = "-" if line.value is None else f"{line.value:.4g}"
    bound = "" if line.limit is None else f"{'>=' if line.at_least else '<='} {line.limit:g}"
    verdict = "" if line.limit is None else "ok" if line.ok else "FAILED"
    return f"  {line.name:<44} {value:>10} {line.unit:<8} {bound:<12} {verdict}".rstrip()


def _machine() -> dict[str, Any]:
    import torch

    from hdpo.ranks.devices import nvidia_smi

    cuda = torch.cuda.is_available()
    return {"device": torch.cuda.get_device_name() if cuda else "CPU, toy sizes", "torch": torch.__version__,
            "cuda": torch.version.cuda if cuda else None, "driver": nvidia_smi()[1],
            "gib": torch.cuda.get_device_properties(0).total_memory / 2**30 if cuda else None}
