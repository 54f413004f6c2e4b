"""What does a step's data cost a rank: seconds, bytes read, resident memory, against the reader of row groups? (D1 to D5)

    python benchmarks/bench_data.py [--short] [--gib 6] [--folder DIR] [--layout groups|one] [--json FILE]

Rows have photographs of the sizes that the 8B settings are meant for (corpus.py), in both layouts: row groups of 100 rows, and
one row group. Each contender takes shuffled steps of 128 and 256 rows in a process of its own; with 8 ranks they run side by
side. As in training, a rank of the new reader reads the rows that it claims, the old one all of them. "Just the bytes" reads
as many bytes as the rows have from a flat file, at random places.

Files are put out of the page cache before each measurement. Bytes read: of the old reader what it asks the system for, of the
new one what the disk has to give, read-ahead and all. Resident memory is the process's own; mapped pages are shared by a node's
ranks and can be taken back.
"""
from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import Figure, arguments, in_child, peak_bytes, report
from corpus import write_rows
from row_groups import RowGroups

COLUMNS = ("data_source", "prompt", "images", "reward_model", "extra_info")
ROWS_PER_GIB = 1500          # of generated rows, about
LAYOUTS = {"groups": "groups of 100", "one": "one group"}


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--gib", type=float, default=6.0, help="size of the corpus")
    parser.add_argument("--folder", type=Path, help="where to write it (default: a temporary folder); kept if named")
    parser.add_argument("--layout", choices=tuple(LAYOUTS), help="this layout alone; the JSON file keeps the other's figures")
    parser.add_argument("--take", help="one rank, as JSON: used by the benchmark itself")
    args = parser.parse_args()
    if args.take:
        what = json.loads(args.take)
        print(json.dumps(take(**what) if "reader" in what else copy(**what)))
        return 0
    gib = 0.2 if args.short else args.gib
    with tempfile.TemporaryDirectory() as temporary:
        figures, details = measure(args.folder or Path(temporary), int(gib * ROWS_PER_GIB), args.short,
                                   [args.layout] if args.layout else list(LAYOUTS))
    return not report("data", figures, details, args.json, args.short, keep=args.layout is not None)


# -- one rank, in a process of its own -----------------------------------------------------------------------------------

def take(reader: str, file: str, cache: str, count: int, steps: int, rank: int, ranks: int) -> dict[str, float]:
    """`steps` shuffled steps of `count` rows, after a few rows that load what reading needs."""
    contender = {"groups": Groups, "copy": Copied, "bytes": JustBytes}[reader](file, cache, rank, ranks)
    order = list(range(contender.num_rows))
    random.Random(1).shuffle(order)
    contender.step(order[:8])
    before, held, cpu, start = contender.bytes_read(), own_memory(), time.process_time(), time.perf_counter()
    wanted = peak = 0
    for step in range(steps):
        wanted += contender.step([order[(8 + step * count + i) % len(order)] for i in range(count)])
        peak = max(peak, own_memory() - held)
    return {"cpu_s": (time.process_time() - cpu) / steps, "wall_s": (time.perf_counter() - start) / steps,
            "read": (contender.bytes_read() - before) / steps, "wanted": wanted / steps, "held": float(peak)}


class Groups:
    """Every rank reads all rows of a step and keeps its own."""

    def __init__(self, file: str, cache: str, rank: int, ranks: int) -> None:
        self._rows, self._mine = RowGroups(file, COLUMNS), slice(rank, None, ranks)
        self.num_rows = self._rows.num_rows

    def step(self, indices: list[int]) -> int:
        self.held = self._rows.read(indices)[self._mine]
        return sum(len(image["bytes"]) for row in self.held for image in row["images"])

    def bytes_read(self) -> int:
        return io_counter("rchar")


class Copied:
    """A rank reads its own rows from the memory-mapped copy."""

    def __init__(self, file: str, cache: str, rank: int, ranks: int) -> None:
        from hdpo.data.store import open_rows
        self._rows, self._mine = open_rows([file], cache=cache), slice(rank, None, ranks)
        self.num_rows = len(self._rows)

    def step(self, indices: list[int]) -> int:
        self.held = [self._rows[index] for index in indices[self._mine]]
        return sum(len(image["bytes"]) for row in self.held for image in row["images"])

    def bytes_read(self) -> int:
        return io_counter("read_bytes")


class JustBytes:
    """As many bytes as its rows have, from the file at random places."""

    def __init__(self, file: str, cache: str, rank: int, ranks: int) -> None:
        self._sizes, self._mine = json.loads(Path(file).with_suffix(".sizes.json").read_text()), slice(rank, None, ranks)
        self._file, self._end, self._coin = os.open(file, os.O_RDONLY), os.path.getsize(file), random.Random(2)
        self.num_rows = len(self._sizes)

    def step(self, indices: list[int]) -> int:
        sizes = [self._sizes[index] for index in indices[self._mine]]
        self.held = [os.pread(self._file, size, self._coin.randrange(self._end - size)) for size in sizes]
        return sum(map(len, self.held))

    def bytes_read(self) -> int:
        return io_counter("rchar")


def io_counter(name: str) -> int:
    return int(next(line.split()[1] for line in Path("/proc/self/io").read_text().splitlines() if line.startswith(name)))


def own_memory() -> int:
    return int(next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines()
                    if line.startswith("RssAnon"))) * 1024


# -- all of them ---------------------------------------------------------------------------------------------------------

def ranks_of(ranks: int, **what: Any) -> dict[str, float]:
    """Means over ranks that run side by side; the seconds of the slowest."""
    forget(Path(what["file"]).parent)
    processes = [subprocess.Popen([sys.executable, __file__, "--take", json.dumps(what | {"rank": rank, "ranks": ranks})],
                                  stdout=subprocess.PIPE, text=True) for rank in range(ranks)]
    found = [json.loads(process.communicate()[0].strip().splitlines()[-1]) for process in processes]
    mean = {name: sum(one[name] for one in found) / ranks for name in found[0]}
    return mean | {"wall_s": max(one["wall_s"] for one in found), "held": max(one["held"] for one in found)}


def forget(folder: Path) -> None:
    """Put the folder's files out of the page cache."""
    for file in (path for path in folder.rglob("*") if path.is_file()):
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def copy(file: str, cache: str) -> dict[str, float]:
    """Seconds and memory of the one copy that a node makes; to be called in a process of its own."""
    from hdpo.data.store import open_rows
    start = time.process_time()
    held = peak_bytes(lambda: open_rows([file], cache=cache), cuda=False)
    return {"cpu_s": time.process_time() - start, "held": float(held)}


def measure(folder: Path, rows: int, short: bool, layouts: list[str]) -> tuple[dict[str, Figure], dict[str, Any]]:
    folder.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Figure] = {}
    details: dict[str, Any] = {"rows": rows}
    counts, steps = ((128,), 2) if short else ((128, 256), 3)
    for layout, group in ((LAYOUTS[name], 100 if name == "groups" else rows) for name in layouts):
        file, cache = folder / f"{group}.parquet", folder / "cache"
        if not file.exists():
            write_rows(file, rows, group)
        details[f"{layout}: bytes"] = file.stat().st_size
        copied = in_child(__file__, ["--take", json.dumps({"file": str(file), "cache": str(cache)})])
        assert copied is not None
        details[f"{layout}: copy"] = copied
        gib = file.stat().st_size / 2**30
        figures[f"D4 {layout}: the copy, made once a node"] = Figure(copied["cpu_s"] / gib, "CPU s a GiB", "lower", 15, 1.0)
        figures[f"D4 {layout}: memory while it is made"] = Figure(copied["held"] / 2**30, "GiB", "lower", None, 0.5)
        for count in counts:
            for ranks in ((1, 8) if group == 100 or not short else (1,)):
                what = {"file": str(file), "cache": str(cache), "count": count}
                old = ranks_of(ranks, reader="groups", steps=1, **what) if group == 100 or file.stat().st_size < 2**31 else None
                new = ranks_of(ranks, reader="copy", steps=steps, **what)
                least = ranks_of(ranks, reader="bytes", steps=steps, **what)
                name = f"{layout}, take({count}), {ranks} rank{'s' * (ranks > 1)}"
                details[name] = {"row groups": old, "copy": new, "just the bytes": least}
                figures[f"D1 {name}: CPU s a rank"] = Figure(new["cpu_s"], "s", "lower", None, 1.0)
                figures[f"D1 {name}: x just the bytes"] = Figure(new["cpu_s"] / max(1e-4, least["cpu_s"]), "x", "lower",
                                                                 None if short else 1.5, 0.5)
                figures[f"D2 {name}: bytes read a wanted byte"] = Figure(new["read"] / new["wanted"], "x", "lower", 1.5)
                figures[f"D3 {name}: memory held"] = Figure(new["held"] / 2**20, "MiB", "lower", None, 0.5)
                if old is not None:
                    figures[f"D1 {name}: row groups / copy, CPU"] = Figure(
                        old["cpu_s"] / new["cpu_s"], "x", "higher", None if short else 10, 0.7)
                    figures[f"D2 {name}: row groups, bytes a wanted byte"] = Figure(old["read"] / old["wanted"], "x", "lower")
                    figures[f"D3 {name}: row groups, memory held"] = Figure(old["held"] / 2**20, "MiB", "lower")
    return figures, details


if __name__ == "__main__":
    sys.exit(main())
