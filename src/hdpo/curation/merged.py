"""All finished chunks of a job as its result: the rows' files and the manifest."""
from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hdpo.curation.chunks import DROPPED, KEPT, UNREADABLE, Entry
from hdpo.curation.prompts import LEFT_OUT_REASONS, PROMPT_SCHEMA, RL, Selection, prompt_row, system_of
from hdpo.curation.result import DROPPED_SCHEMA, KEPT_SCHEMA, PartWriter, dropped_row, kept_row

if TYPE_CHECKING:
    from hdpo.curation.job import Job


class Merged:
    """Rows in the order of the sources, whichever rank worked on them."""

    def __init__(self, job: Job, version: int) -> None:
        self.job, self.version = job, version

    def write(self) -> dict[str, Any]:
        job = self.job
        counts: dict[str, dict[str, Any]] = {s.name: {n: _counts() for n in job.stages} for s in job.sources}
        first_unreadable = self._demonstrations(counts)
        prompts = self._prompts(counts) if RL in job.stages else {}
        manifest = {**counts, "about": {**self._about(first_unreadable), **prompts}}
        part = job.out / "manifest.json.part"
        part.write_text(json.dumps(manifest, indent=1, ensure_ascii=False))
        os.replace(part, job.out / "manifest.json")
        return manifest

    def _demonstrations(self, counts: dict[str, dict[str, Any]]) -> dict[tuple[str, str], str]:
        job, out = self.job, self.job.out
        first_unreadable: dict[tuple[str, str], str] = {}
        last = job.demonstration_stages[-1]
        with (PartWriter(out / "kept.parquet", KEPT_SCHEMA) as kept,
              PartWriter(out / "dropped.parquet", DROPPED_SCHEMA) as dropped):
            for source, chunk in job.chunks():
                rows: list[dict[str, Any]] = []
                for name in job.demonstration_stages:
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
        return first_unreadable

    def _prompts(self, counts: dict[str, dict[str, Any]]) -> dict[str, Any]:
        job, settings = self.job, self.job.config.curation.prompts
        selection = Selection(settings, job.config.run.seed, [source.name for source in job.sources])
        for source, chunk in job.chunks():
            for entry in job.finished(RL, source, chunk):
                _count(counts[source.name][RL], entry)
                if entry.state == KEPT:
                    selection.offer(source.name, entry)
        taken, quotas = selection.choose()
        with (PartWriter(job.out / "rl.parquet", PROMPT_SCHEMA) as prompts,
              PartWriter(job.out / "rl_dropped.parquet", DROPPED_SCHEMA) as dropped):
            for source, chunk in job.chunks():
                for entry in job.finished(RL, source, chunk):
                    if entry.state != KEPT:
                        dropped.add(dropped_row(source, entry, RL))
                    elif reason := selection.left_out(source.name, entry):
                        counts[source.name][RL]["kept"] -= 1
                        counts[source.name][RL]["dropped"][reason] += 1
                        left = Entry(entry.row, DROPPED, entry.record, reason, LEFT_OUT_REASONS[reason])
                        dropped.add(dropped_row(source, left, RL))
                    else:
                        prompts.add(prompt_row(source, entry, system_of(job.config)))
        return {"rl": {"wanted": settings.count, "prompts": taken, "per_source": quotas,
                       "sha256": {name: _sha256(job.out / name) for name in ("rl.parquet", "rl_dropped.parquet")}}}

    def _about(self, first_unreadable: Mapping[tuple[str, str], str]) -> dict[str, Any]:
        from hdpo import __version__
        digest = {name: _sha256(self.job.out / name) for name in ("kept.parquet", "dropped.parquet")}
        benchmarks = {"benchmarks": self.job.benchmarks} if self.job.benchmarks else {}
        return {"hdpo": __version__, "version": self.version, "stages": self.job.demonstration_stages,
                "seed": self.job.config.run.seed, "job": self.job.key(), "sha256": digest, **benchmarks,
                "first_unreadable": {f"{source}: {reason}": shown for (source, reason), shown in first_unreadable.items()}}


def _counts() -> dict[str, Any]:
    return {"in": 0, "kept": 0, "dropped": Counter(), "unreadable": Counter(), "waiting": Counter()}


def _count(counts: dict[str, Any], entry: Entry) -> None:
    counts["in"] += 1
    if entry.state == KEPT:
        counts["kept"] += 1
    else:
        counts[entry.state][entry.reason] += 1
    extra = entry.record.extra if entry.record is not None else {}
    for benchmark in {found["benchmark"] for found in extra.get("overlap", ())}:
        counts.setdefault("overlaps", Counter())[benchmark] += 1
    if "overlap_unknown" in extra:
        counts.setdefault("overlap_unknown", Counter())[extra["overlap_unknown"]] += 1


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
