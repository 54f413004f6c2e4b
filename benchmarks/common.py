"""What every benchmark shares: paired timing, peak memory in a child process, the machine it ran on, JSON and a table.

Timing is paired: each round runs every contender once, next to the reference, in rotating order, and the figure is the
median of the per-round ratios. On CPU the clock counts the process's own CPU time over all its threads, so that waiting
behind other work of a busy machine is not charged; caches are still shared with it, and every result carries the load it
was measured under.
"""
from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Figure:
    """One number, which way is better, and the bound it is meant to keep (None: informative)."""

    value: float
    unit: str
    better: str                 # "lower" | "higher"
    goal: float | None = None
    tolerance: float = 0.2      # share by which it may get worse before compare.py calls it a regression

    @property
    def met(self) -> bool | None:
        if self.goal is None:
            return None
        return self.value <= self.goal if self.better == "lower" else self.value >= self.goal


def environment() -> dict[str, Any]:
    import torch

    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    model = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("model name")), platform.machine())
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"), "cpu": model, "cores": os.cpu_count(),
        "threads": torch.get_num_threads(), "load_1min": round(os.getloadavg()[0], 2), "torch": torch.__version__,
        "cuda": cuda,
    }


def paired(contenders: dict[str, Callable[[], object]], reference: str, rounds: int, cuda: bool = False,
           ) -> dict[str, dict[str, float]]:
    """name -> median seconds, and median over rounds of its time divided by the reference's in the same round.

    Seconds are CPU time, or wall time around a synchronised device with cuda=True.
    """
    clock, sync = (time.perf_counter, _synchronize) if cuda else (time.process_time, lambda: None)
    names = list(contenders)
    for run in contenders.values():   # warm-up: pages, caches, lazily compiled kernels
        run()
    times: dict[str, list[float]] = {name: [] for name in names}
    for k in range(rounds):
        for name in names[k % len(names):] + names[:k % len(names)]:
            sync()
            start = clock()
            contenders[name]()
            sync()
            times[name].append(clock() - start)
    return {name: {"seconds": statistics.median(t), "ratio": statistics.median(a / b for a, b in zip(t, times[reference]))}
            for name, t in times.items()}


def _synchronize() -> None:
    import torch

    torch.cuda.synchronize()


def in_child(script: str, arguments: Sequence[str]) -> dict[str, Any] | None:
    """Run `script` with arguments in a fresh process and read the JSON object on its last line; None if it failed."""
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)
    if done.returncode:
        print(f"  {' '.join(arguments)}: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


def peak_bytes(run: Callable[[], object], cuda: bool) -> int:
    """Memory `run` holds at most above what was resident before it. To be called in a process of its own."""
    if cuda:
        import torch

        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        kept = run()
        del kept
        return torch.cuda.max_memory_allocated() - before
    try:
        Path("/proc/self/clear_refs").write_text("5")   # resets VmHWM to the present
    except OSError:
        pass   # then the inputs' own peak bounds the figure from above
    before = _status("VmRSS")
    kept = run()
    del kept
    return _status("VmHWM") - before


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def arguments(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="small shapes, few rounds")
    parser.add_argument("--json", type=Path, help="write the result there")
    return parser


def report(bench: str, figures: dict[str, Figure], details: dict[str, Any], path: Path | None, short: bool,
           keep: bool = False) -> bool:
    """Print the table, write the JSON; True if every goal is met. keep: other figures and details in the file stay."""
    env = environment()
    print(f"\n{bench}{' (short)' if short else ''}, {env['date']}: {env['cpu']}, {env['threads']} of {env['cores']} "
          f"threads, load {env['load_1min']}, torch {env['torch']}, {env['cuda'] or 'no CUDA'}")
    width = max(map(len, figures), default=0)
    for name, figure in figures.items():
        sign = "<=" if figure.better == "lower" else ">="
        goal = "" if figure.goal is None else f"  goal {sign} {figure.goal:g}  {'ok' if figure.met else 'MISSED'}"
        print(f"  {name:<{width}}  {figure.value:>10.4g} {figure.unit}{goal}")
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"bench": bench, "short": short, "environment": env, "details": details,
                   "figures": {name: asdict(figure) for name, figure in figures.items()}}
        if keep and path.exists():
            held = json.loads(path.read_text())
            for key in ("details", "figures"):
                content[key] = held[key] | content[key]
        path.write_text(json.dumps(content, indent=1) + "\n")
    return all(figure.met is not False for figure in figures.values())
