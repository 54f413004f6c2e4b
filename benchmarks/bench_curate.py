"""How many trajectories a second does stage 1 of a curation re-execute, and does it grow with the workers? (C1, C2)

    python benchmarks/bench_curate.py [--short] [--rows 400] [--json FILE]

Recorded trajectories of the embedded world with one Python call each, most with a picture, through `hdpo curate --stages 1` in
the process sandbox: reading, a session a row, comparing, writing. Workers are ranks, each with a tool server of its own; a
machine can't show more than its cores. The fixed cost of a start (imports, server) is measured with as good as no rows and
taken off.
"""
from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import Figure, arguments, report

from hdpo.toyworld.recordings import write_recordings


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--rows", type=int, default=400, help="trajectories")
    args = parser.parse_args()
    rows = 120 if args.short else args.rows
    cores = os.cpu_count() or 1
    figures: dict[str, Figure] = {}
    details: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        few, many = (write_recordings(folder / name, 1, count, ["coldstart"])[0].file
                     for name, count in (("few", 4), ("many", rows)))
        for workers in dict.fromkeys((1, 2, cores)):
            fixed = min(seconds(few, folder / f"few_{workers}_{k}", workers) for k in range(2))
            took = seconds(many, folder / f"many_{workers}", workers) - fixed
            details[f"{workers} workers: fixed seconds"] = fixed
            name = f"C1 stage 1, {workers} worker{'s' * (workers > 1)}"
            figures[name] = Figure(rows / took, "trajectories/s", "higher", None, 0.5)
        one = figures["C1 stage 1, 1 worker"].value
        for workers in dict.fromkeys((2, cores)):
            share = figures[f"C1 stage 1, {workers} workers"].value / one / workers
            figures[f"C2 {workers} workers, share of linear"] = Figure(
                share, "x", "higher", 0.7 if workers <= cores and not args.short else None, 0.4)
    return not report("curate", figures, details, args.json, args.short)


def seconds(file: Path, out: Path, workers: int) -> float:
    """Of one job on so many ranks, from start to end."""
    command = [sys.executable, "-m", "hdpo", "curate", "--source", f"coldstart={file}", "--stages", "1", "--out", str(out),
               "--set", "curation.chunk_rows=16", "--set", f"data.cache={out.parent / 'cache'}"]
    start = time.perf_counter()
    ranks = [subprocess.Popen(command, env={**os.environ, "RANK": str(rank), "WORLD_SIZE": str(workers)},
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for rank in range(workers)]
    codes = [rank.wait() for rank in ranks]
    if any(codes):
        raise SystemExit(f"a job ended with {codes}")
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
