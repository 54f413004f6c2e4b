"""Flag regressions: python benchmarks/compare.py BASELINE.json CURRENT.json

A figure regresses when it is worse than the baseline by more than its tolerance, or no longer keeps a goal the baseline
kept. Prints one line per figure and exits 1 if any regressed. Refuses to compare a short run with a full one.
"""
from __future__ import annotations

import json
import sys
from pathlib import Path

from common import Figure


def compare(baseline: dict, current: dict) -> list[str]:
    """One line per regressed or missing figure."""
    if (baseline["bench"], baseline["short"]) != (current["bench"], current["short"]):
        raise SystemExit("these two files are not results of the same benchmark at the same size")
    regressions = []
    for name, old_fields in baseline["figures"].items():
        if name not in current["figures"]:
            regressions.append(f"{name}: missing")
            continue
        old, new = Figure(**old_fields), Figure(**current["figures"][name])
        worse = new.value - old.value if old.better == "lower" else old.value - new.value
        lost = old.met and new.met is False
        if lost or worse > old.tolerance * abs(old.value):
            regressions.append(f"{name}: {old.value:.4g} -> {new.value:.4g} {new.unit}{' (goal lost)' if lost else ''}")
    return regressions


def main() -> int:
    if len(sys.argv) != 3:
        print(__doc__)
        return 2
    baseline, current = (json.loads(Path(path).read_text()) for path in sys.argv[1:])
    regressions = compare(baseline, current)
    for line in regressions:
        print(f"REGRESSION {line}")
    print(f"{current['bench']}: {len(regressions)} of {len(baseline['figures'])} figures regressed")
    return bool(regressions)


if __name__ == "__main__":
    sys.exit(main())
