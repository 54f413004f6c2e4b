"""Flag regressions: python benchmarks/compare.py [--accept] [RESULT.json ...]

Each RESULT (default: all in benchmarks/results) is compared with the baseline of the same bench, device and size,
benchmarks/baselines/BENCH_{cpu|cuda}_{short|full}.json. A figure regresses when it is worse than the baseline by more
than its tolerance, when it no longer keeps a goal the baseline kept, or when it is missing. Prints one line per regressed
figure and per result, and exits 1 if any regressed. --accept makes the results the baselines instead.
"""
from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path

from common import Figure

HERE = Path(__file__).resolve().parent


def baseline_path(result: dict, folder: Path = HERE / "baselines") -> Path:
    device = "cuda" if result["environment"].get("cuda") else "cpu"
    return folder / f"{result['bench']}_{device}_{'short' if result['short'] else 'full'}.json"


def compare(baseline: dict, current: dict) -> list[str]:
    """One line per regressed or missing figure of two results of the same bench, device and size."""
    regressions = []
    for name, old_fields in baseline["figures"].items():
        if name not in current["figures"]:
            regressions.append(f"{name}: missing")
            continue
        old, new = Figure(**old_fields), Figure(**current["figures"][name])
        worse = new.value - old.value if old.better == "lower" else old.value - new.value
        lost = old.met and new.met is False
        if lost or math.isnan(new.value) or worse > old.tolerance * abs(old.value):
            regressions.append(f"{name}: {old.value:.4g} -> {new.value:.4g} {new.unit}{' (goal lost)' if lost else ''}")
    return regressions


def main() -> int:
    accept = "--accept" in sys.argv
    paths = [Path(a) for a in sys.argv[1:] if a != "--accept"] or sorted((HERE / "results").glob("*.json"))
    if not paths or any(not path.is_file() for path in paths):
        print(__doc__)
        return 2
    failed = False
    for path in paths:
        current = json.loads(path.read_text())
        baseline = baseline_path(current)
        if accept:
            shutil.copy(path, baseline)
            print(f"{current['bench']}: {baseline.name} is now {path}")
        elif not baseline.exists():
            print(f"{current['bench']}: no baseline {baseline.name}; --accept makes this result one")
        else:
            held = json.loads(baseline.read_text())
            regressions = compare(held, current)
            failed |= bool(regressions)
            print("".join(f"REGRESSION {current['bench']}: {line}\n" for line in regressions), end="")
            print(f"{current['bench']}: {len(regressions)} of {len(held['figures'])} figures regressed")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
