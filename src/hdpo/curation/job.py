"""The job: sources through stages, in chunks, on any number of ranks; then one manifest and the rows that were kept.

    OUT/kept.parquet      demonstrations for SFT (messages, images, ...) with source, source_file, source_row
    OUT/dropped.parquet   the others, with stage, reason and detail; unreadable rows among them, without messages
    OUT/manifest.json     {SOURCE: {STAGE: {"in", "kept", "dropped": {reason: n}, "unreadable", "waiting"}}, "about": ...}
    OUT/work/             finished chunks; the same command goes on from them

Rows that wait (a failure of ours, a judge's unreadable reply) are tried again by the same command.
"""
from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from hdpo.config import Config
from hdpo.curation.chunks import DROPPED, KEPT, UNREADABLE, WAITING, Entry, chunk_path, read_chunk, write_chunk
from hdpo.curation.record import Outcome, Record, Unreadable, Waits
from hdpo.curation.result import DROPPED_SCHEMA, KEPT_SCHEMA, PartWriter, dropped_row, kept_row
from hdpo.curation.source import READERS, Source
from hdpo.data.store import open_rows
from hdpo.errors import ConfigError, DataError

POLL_S = 0.5
VERSION = 1
"""Of readers and stages: chunks of another version are not taken for finished."""


class Stage(Protocol):
    """One stage for a batch of records; blocks. An outcome each, in order, or why the record waits."""

    def run(self, records: Sequence[Record]) -> list[Outcome | Waits]: ...


def open_sources(config: Config) -> list[Source]:
    """Raises ConfigError for an unknown reader, DataError for files that can't be read."""
    files: dict[str, list[str]] = {}
    for item in config.curation.sources:
        name, eq, value = item.partition("=")
        if not eq or name not in READERS:
            raise ConfigError(f"--source {item}: expected NAME=FILE, NAME one of {', '.join(READERS)}")
        files.setdefault(name, []).append(value)
    if not files:
        raise ConfigError("nothing to curate: give --source NAME=FILE or curation.sources")
    return [Source(name, open_rows(found, cache=config.data.cache, image_root=config.data.image_root))
            for name, found in files.items()]


class Job:
    """`stages`: their names ("1", "2", "3"), in the order in which rows pass them."""

    def __init__(self, config: Config, stages: Sequence[str], rank: int = 0, ranks: int = 1) -> None:
        self.config, self.stages, self.rank, self.ranks = config, list(stages), rank, ranks
        if not config.curation.out:
            raise ConfigError("no folder for the result: give --out DIR")
        self.out, self.size = Path(config.curation.out), config.curation.chunk_rows
        self.sources = open_sources(config)
        self._claim_folder()

    def _key(self) -> dict[str, Any]:
        settings = self.config.curation.model_dump(mode="json", exclude={"sources", "out", "concurrency"})
        rest = {"model": self.config.model.path, "judge": self.config.judge.model, "seed": self.config.run.seed} if set(
            self.stages) - {"1"} else {}
        return {"version": VERSION, "sources": {s.name: s.rows.fingerprint for s in self.sources}, "settings": settings, **rest}

    def _claim_folder(self) -> None:
        """The folder belongs to one set of sources and settings. Raises ConfigError for another job's."""
        key, file = self._key(), self.out / "job.json"
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            known = json.loads(file.read_text()) if file.exists() else None
            if known is None and self.rank == 0:
                part = file.with_suffix(".part")
                part.write_text(json.dumps(key, indent=1))
                os.replace(part, file)
        except (OSError, ValueError) as exc:
            raise ConfigError(f"--out {self.out}: {exc}") from exc
        if known is not None and known != key:
            differs = ", ".join(name for name in key if known.get(name) != key[name]) or "an older kind of job"
            raise ConfigError(f"--out {self.out} holds a job with other {differs}: choose another folder, or remove it")

    def run(self, stages: Mapping[str, Stage]) -> dict[str, Any]:
        """The manifest, on rank 0 when all ranks have finished; {} on others."""
        mine = [(source, chunk) for number, (source, chunk) in enumerate(self._chunks()) if number % self.ranks == self.rank]
        for name, stage in stages.items():
            with tqdm(total=sum(len(self._rows(*place)) for place in mine), desc=f"stage {name}", unit="row",
                      disable=self.rank > 0) as bar:
                for source, chunk in mine:
                    self._work(name, stage, source, chunk)
                    bar.update(len(self._rows(source, chunk)))
        if self.rank:
            return {}
        self._wait_for_others()
        return Merged(self).write()

    def _chunks(self) -> Iterator[tuple[Source, int]]:
        for source in self.sources:
            yield from ((source, chunk) for chunk in range(-(-len(source.rows) // self.size)))

    def _rows(self, source: Source, chunk: int) -> range:
        return range(chunk * self.size, min((chunk + 1) * self.size, len(source.rows)))

    def _work(self, name: str, stage: Stage, source: Source, chunk: int) -> None:
        path = chunk_path(self.out, name, source.name, chunk)
        done = read_chunk(path)
        if done is not None and not any(entry.state == WAITING for entry in done):
            return
        known = {entry.row: entry for entry in done or () if entry.state != WAITING}
        given = self._given(name, source, chunk)
        todo = [entry for entry in given if entry.state == KEPT and entry.row not in known]
        found = stage.run([entry.record for entry in todo if entry.record is not None]) if todo else []
        for entry, outcome in zip(todo, found, strict=True):
            known[entry.row] = _entry_of(entry, outcome)
        first = name == self.stages[0]
        entries = [known[e.row] if e.row in known else e for e in given if e.row in known or (first and e.state == UNREADABLE)]
        write_chunk(path, entries)

    def _given(self, name: str, source: Source, chunk: int) -> list[Entry]:
        """What the stage before has kept, or the rows themselves."""
        before = self.stages[:self.stages.index(name)]
        if before:
            return [e for e in read_chunk(chunk_path(self.out, before[-1], source.name, chunk)) or [] if e.state == KEPT]
        return [read_row(source, index) for index in self._rows(source, chunk)]

    def finished(self, name: str, source: Source, chunk: int) -> list[Entry]:
        entries = read_chunk(chunk_path(self.out, name, source.name, chunk))
        if entries is None:
            raise DataError(f"{chunk_path(self.out, name, source.name, chunk)}: can't be read; remove it and start again")
        return entries

    def _wait_for_others(self) -> None:
        while any(not chunk_path(self.out, name, source.name, chunk).exists()
                  for name in self.stages for source, chunk in self._chunks()):
            time.sleep(POLL_S)


def read_row(source: Source, index: int) -> Entry:
    """The row as a record, or why it is unreadable."""
    try:
        record = READERS[source.name](source.rows.row(index), index, source.rows.folders(index))
    except Unreadable as exc:
        return Entry(index, UNREADABLE, None, exc.reason, str(exc))
    except DataError as exc:
        return Entry(index, UNREADABLE, None, "row_unreadable", str(exc))
    return Entry(index, KEPT, record)


def _entry_of(entry: Entry, outcome: Outcome | Waits) -> Entry:
    if isinstance(outcome, Waits):
        return Entry(entry.row, WAITING, entry.record, "waits", str(outcome))
    return Entry(entry.row, DROPPED if outcome.reason else KEPT, outcome.record, outcome.reason, outcome.detail)


class Merged:
    """All finished chunks, in the order of the sources' rows, as the job's result."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def write(self) -> dict[str, Any]:
        job, out = self.job, self.job.out
        counts: dict[str, dict[str, Any]] = {s.name: {n: _counts() for n in job.stages} for s in job.sources}
        first_unreadable: dict[tuple[str, str], str] = {}
        last = job.stages[-1]
        with (PartWriter(out / "kept.parquet", KEPT_SCHEMA) as kept,
              PartWriter(out / "dropped.parquet", DROPPED_SCHEMA) as dropped):
            for source, chunk in job._chunks():
                rows: list[dict[str, Any]] = []
                for name in job.stages:
                    for entry in job.finished(name, source, chunk):
                        _count(counts[source.name][name], entry)
                        if entry.state == UNREADABLE:
                            first_unreadable.setdefault((source.name, entry.reason),
                                                        f"{source.rows.name(entry.row)}: {entry.detail}")
                        if entry.state in (DROPPED, UNREADABLE):
                            rows.append(dropped_row(source, entry, name))
                        elif entry.state == KEPT and name == last:
                            kept.add(kept_row(source, entry))
                dropped.add_all(sorted(rows, key=lambda row: row["source_row"]))
        manifest = {**counts, "about": self._about(first_unreadable)}
        part = out / "manifest.json.part"
        part.write_text(json.dumps(manifest, indent=1, ensure_ascii=False))
        os.replace(part, out / "manifest.json")
        return manifest

    def _about(self, first_unreadable: Mapping[tuple[str, str], str]) -> dict[str, Any]:
        from hdpo import __version__
        digest = {name: _sha256(self.job.out / name) for name in ("kept.parquet", "dropped.parquet")}
        return {"hdpo": __version__, "version": VERSION, "stages": self.job.stages, "seed": self.job.config.run.seed,
                "job": self.job._key(), "sha256": digest,
                "first_unreadable": {f"{source}: {reason}": shown for (source, reason), shown in first_unreadable.items()}}


def _counts() -> dict[str, Any]:
    return {"in": 0, "kept": 0, "dropped": Counter(), "unreadable": Counter(), "waiting": Counter()}


def _count(counts: dict[str, Any], entry: Entry) -> None:
    counts["in"] += 1
    if entry.state == KEPT:
        counts["kept"] += 1
    else:
        counts[entry.state][entry.reason] += 1


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
