"""What checking every row once has found: its length and why it can't be used, kept beside the copies.

Checking decodes all pictures and tokenises all texts, minutes for a large corpus. One process of a node does it, in threads
and with a progress bar; the others, and later runs with the same rows and settings, read what it found. Because every
rank knows beforehand which rows are good, a step's rows can be settled without reading any of them.
"""
from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hdpo.data.copies import cache_folder, keep, once, unwritable
from hdpo.data.store import RowStore, file_state
from hdpo.errors import DataError
from hdpo.progress import progress

FORMAT = 2
_CHUNK = 1024


@dataclass(frozen=True, slots=True)
class Checked:
    """Of a good row: its length in tokens, the files besides its own that it needs, and the source it names."""

    length: int
    files: tuple[Path, ...] = ()
    source: str = ""


@dataclass(slots=True)
class RowIndex:
    """`lengths[i]` of row i in tokens, -1 for a bad row; `bad` says why. Shorter than the rows where only some were wanted."""

    lengths: list[int] = field(default_factory=list)
    bad: dict[int, str] = field(default_factory=dict)
    sources: list[str] = field(default_factory=list)             # the names of good rows, the most frequent first
    source_of: list[int] = field(default_factory=list)           # for each row the number of its source
    folders: list[str] = field(default_factory=list)             # where the rows lay
    outside: list[list[Any]] = field(default_factory=list)       # [path, bytes, modified] of picture files outside of them

    def good(self) -> list[int]:
        return [row for row, length in enumerate(self.lengths) if length >= 0]

    def holds(self, folders: list[str]) -> bool:
        """Whether files outside of the data are as they were."""
        if not self.outside:
            return True
        with ThreadPoolExecutor(16) as threads:
            return self.folders == folders and list(threads.map(file_state, (path for path, *_ in self.outside))) == self.outside


def index_rows(rows: RowStore, check: Callable[[int], Checked], settings: Any, *, cache: str = "", wanted: int = 0) -> RowIndex:
    """The index of all rows, or of the first up to the `wanted`-th good one; made now unless it is known.

    `check(index)` raises DataError for a bad row. `settings`, JSON, must differ where its outcomes may.
    """
    name = hashlib.blake2b(json.dumps([FORMAT, rows.fingerprint, settings, wanted]).encode(), digest_size=16).hexdigest()
    path, folders = cache_folder(cache) / f"{name}.index.json", rows.all_folders()
    known = _read(path)
    if known is None or not known.holds(folders):
        with once(path.with_suffix(".lock")):
            known = _read(path)
            if known is None or not known.holds(folders):
                known = _check(rows, check, wanted)
                known.folders = folders
                try:
                    keep(path, json.dumps(asdict(known)))
                except OSError as exc:
                    raise unwritable(path, "what is known of the data", exc) from exc
    return known


def _read(path: Path) -> RowIndex | None:
    try:
        known = json.loads(path.read_text())
        return RowIndex(**known | {"bad": {int(row): reason for row, reason in known["bad"].items()}})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _check(rows: RowStore, check: Callable[[int], Checked], wanted: int) -> RowIndex:
    def outcome(index: int) -> Checked | DataError:
        try:
            return check(index)
        except DataError as exc:
            return exc

    index, files, good = RowIndex(), set[Path](), 0
    named: list[str] = []
    with ThreadPoolExecutor(min(32, os.cpu_count() or 1), "hdpo-check") as threads, progress(
            "checking rows", " rows", total=wanted or len(rows), delay_s=1) as bar:
        for found in _in_order(threads, outcome, range(len(rows)), wanted):
            if isinstance(found, DataError):
                index.bad[len(index.lengths)] = str(found)
            else:
                files.update(found.files)
                good += 1
            named.append("" if isinstance(found, DataError) else found.source)
            index.lengths.append(-1 if isinstance(found, DataError) else found.length)
            bar.update()
            if wanted and good == wanted:
                break
    index.outside = [file_state(str(file)) for file in sorted(files)]
    index.sources = [name for name, _ in Counter(named).most_common()]
    place = {name: number for number, name in enumerate(index.sources)}
    index.source_of = [place[name] for name in named]
    return index


def _in_order(threads: ThreadPoolExecutor, function: Callable[[int], Any], numbers: Iterable[int], wanted: int) -> Iterator[Any]:
    """As `map`, without more than a chunk under way."""
    chunk = min(_CHUNK, max(16, wanted)) if wanted else _CHUNK
    numbers = list(numbers)
    for first in range(0, len(numbers), chunk):
        yield from threads.map(function, numbers[first:first + chunk])
