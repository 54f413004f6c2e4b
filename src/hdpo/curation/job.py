"""The job: sources through stages, in chunks, on any number of ranks; then one manifest and the rows that were kept.

    OUT/kept.parquet      demonstrations for SFT (messages, images, ...) with source, source_file, source_row
    OUT/dropped.parquet   the others, with stage, reason and detail; unreadable rows among them, without messages
    OUT/rl.parquet        prompts for RL (stages 2 and 4), see prompts.py; OUT/rl_dropped.parquet those left out, with the reason
    OUT/manifest.json     {SOURCE: {STAGE: {"in", "kept", "dropped": {reason: n}, "unreadable", "waiting"}}, "about": ...}
    OUT/work/             finished chunks; the same command goes on from them

Rows that wait (a failure of ours, a judge's unreadable reply) are tried again by the same command.
"""
from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from hdpo.config import Config
from hdpo.curation.benchmarks import key_of
from hdpo.curation.chunks import DROPPED, KEPT, UNREADABLE, WAITING, Entry, chunk_path, read_chunk, read_states, write_chunk
from hdpo.curation.merged import Merged
from hdpo.curation.prompts import RL, candidate
from hdpo.curation.record import Outcome, Record, Unreadable, Waits
from hdpo.curation.source import READERS, Source
from hdpo.data.store import open_rows
from hdpo.errors import ConfigError, DataError
from hdpo.progress import progress

POLL_S = 0.5
VERSION = 3
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
    """`stages`: their names ("1" to "4"), in the order in which rows pass them. After 2 and 4 prompts for RL are chosen too, as
    one more stage that begins with what stage 2 has counted."""

    def __init__(self, config: Config, stages: Sequence[str], rank: int = 0, ranks: int = 1) -> None:
        self.config, self.rank, self.ranks = config, rank, ranks
        self.demonstration_stages = list(stages)
        self.stages = [*stages, *([RL] if {"2", "4"} <= set(stages) else [])]
        if not config.curation.out:
            raise ConfigError("no folder for the result: give --out DIR")
        self.out, self.size = Path(config.curation.out), config.curation.chunk_rows
        self.sources = open_sources(config)
        self.benchmarks: dict[str, Any] = {}       # what stage 4 compares with, for the manifest
        self._claim_folder()

    def key(self) -> dict[str, Any]:
        settings = self.config.curation.model_dump(mode="json", exclude={"sources", "out", "concurrency"})
        rest: dict[str, Any] = {}
        if set(self.stages) - {"1"}:
            rest = {"model": self.config.model.path, "judge": self.config.judge.model, "seed": self.config.run.seed}
        if "4" in self.stages and self.config.curation.decontamination.data:
            rest["benchmarks"] = key_of(self.config.curation.decontamination)
        if RL in self.stages:
            rest["tools"] = list(self.config.tools.allowed)
        return {"version": VERSION, "sources": {s.name: s.rows.fingerprint for s in self.sources}, "settings": settings, **rest}

    def _claim_folder(self) -> None:
        """The folder belongs to one set of sources and settings. Raises ConfigError for another job's."""
        key, file = self.key(), self.out / "job.json"
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
        mine = [(source, chunk) for number, (source, chunk) in enumerate(self.chunks()) if number % self.ranks == self.rank]
        for name, stage in stages.items():
            rows = sum(len(self._rows(*place)) for place in mine)
            with progress(f"stage {name}", "row", total=rows, shown=self.rank == 0) as bar:
                for source, chunk in mine:
                    self._work(name, stage, source, chunk)
                    bar.update(len(self._rows(source, chunk)))
        if self.rank:
            return {}
        self._wait_for_others()
        return Merged(self, VERSION).write()

    def chunks(self) -> Iterator[tuple[Source, int]]:
        for source in self.sources:
            yield from ((source, chunk) for chunk in range(-(-len(source.rows) // self.size)))

    def _rows(self, source: Source, chunk: int) -> range:
        return range(chunk * self.size, min((chunk + 1) * self.size, len(source.rows)))

    def _work(self, name: str, stage: Stage, source: Source, chunk: int) -> None:
        path = chunk_path(self.out, name, source.name, chunk)
        states = read_states(path)
        if states is not None and WAITING not in states.values() and self._came(name, source, chunk) <= states.keys():
            return
        known = {entry.row: entry for entry in read_chunk(path) or () if entry.state != WAITING}
        given = self._given(name, source, chunk)
        todo = [entry for entry in given if entry.state == KEPT and entry.row not in known]
        found = stage.run([entry.record for entry in todo if entry.record is not None]) if todo else []
        for entry, outcome in zip(todo, found, strict=True):
            known[entry.row] = _entry_of(entry, outcome)
        first = name in (self.stages[0], RL)       # also says what never came to it
        entries = [known[e.row] if e.row in known else e for e in given if e.row in known or (first and e.state != KEPT)]
        write_chunk(path, entries)

    def _given(self, name: str, source: Source, chunk: int) -> list[Entry]:
        """What the stage before has kept, or the rows themselves; for RL what stage 2 has decided."""
        if name == RL:
            decided = read_chunk(chunk_path(self.out, "2", source.name, chunk)) or []
            return [candidate(entry) for entry in decided if entry.state in (KEPT, DROPPED)]
        before = self.stages[:self.stages.index(name)]
        if before:
            return [e for e in read_chunk(chunk_path(self.out, before[-1], source.name, chunk)) or [] if e.state == KEPT]
        return [read_row(source, index) for index in self._rows(source, chunk)]

    def _came(self, name: str, source: Source, chunk: int) -> set[int]:
        """Rows that a later stage must have, with those that an earlier one has decided since; nothing for the first."""
        place = self.stages.index(name)
        before = "2" if name == RL else self.stages[place - 1] if place else None
        states = read_states(chunk_path(self.out, before, source.name, chunk)) if before else None
        return {row for row, state in (states or {}).items() if state == KEPT or (name == RL and state == DROPPED)}

    def finished(self, name: str, source: Source, chunk: int) -> list[Entry]:
        entries = read_chunk(chunk_path(self.out, name, source.name, chunk))
        if entries is None:
            raise DataError(f"{chunk_path(self.out, name, source.name, chunk)}: can't be read; remove it and start again")
        return entries

    def _wait_for_others(self) -> None:
        while any(not chunk_path(self.out, name, source.name, chunk).exists()
                  for name in self.stages for source, chunk in self.chunks()):
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
