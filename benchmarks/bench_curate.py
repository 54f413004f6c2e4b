"""How many trajectories a second does stage 1 of a curation re-execute, and does it grow with the workers? (C1, C2)

    python benchmarks/bench_curate.py [--short] [--rows 400] [--json FILE]

Recorded trajectories of the embedded world with one Python call each, most with a picture, through `hdpo curate --stages 1` in
the process sandbox: reading, a session a row, comparing, writing. Workers are ranks, each with a tool server of its own; a
machine can't show more than its cores. The clock runs from the chunk with which every rank is at work, so that the cost of a
start (imports, server) is not in it.
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

CHUNK = 8


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--rows", type=int, default=400, help="trajectories")
    args = parser.parse_args()
    rows = 192 if args.short else args.rows
    cores = os.cpu_count() or 1
    figures: dict[str, Figure] = {}
    details: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        file = write_recordings(folder / "recorded", 1, rows, ["coldstart"])[0].file
        for workers in dict.fromkeys((1, 2, cores)):
            rate, details[f"{workers} workers: whole seconds"] = measure(file, folder / f"out_{workers}", workers)
            figures[f"C1 stage 1, {workers} worker{'s' * (workers > 1)}"] = Figure(rate, "trajectories/s", "higher", None, 0.5)
        one = figures["C1 stage 1, 1 worker"].value
        for workers in dict.fromkeys((2, cores)):
            share = figures[f"C1 stage 1, {workers} workers"].value / one / workers
            figures[f"C2 {workers} workers, share of linear"] = Figure(
                share, "x", "higher", 0.7 if workers <= cores and not args.short else None, 0.4)
    return not report("curate", figures, details, args.json, args.short)


def measure(file: Path, out: Path, workers: int) -> tuple[float, float]:
    """(trajectories a second, seconds of the whole job) on so many ranks."""
    command = [sys.executable, "-m", "hdpo", "curate", "--source", f"coldstart={file}", "--stages", "1", "--out", str(out),
               "--set", f"curation.chunk_rows={CHUNK}", "--set", f"data.cache={out.parent / 'cache'}"]
    start = time.perf_counter()
    ranks = [subprocess.Popen(command, env={**os.environ, "RANK": str(rank), "WORLD_SIZE": str(workers)},
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for rank in range(workers)]
    codes = [rank.wait() for rank in ranks]
    took = time.perf_counter() - start
    if any(codes):
        raise SystemExit(f"a job ended with {codes}")
    finished = sorted(path.stat().st_mtime for path in out.glob("work/stage_1/*/*.parquet"))
    begun = 2 * workers                                  # chunks after which every rank is at work
    return CHUNK * (len(finished) - begun) / (finished[-1] - finished[begun - 1]), took


if __name__ == "__main__":
    sys.exit(main())
