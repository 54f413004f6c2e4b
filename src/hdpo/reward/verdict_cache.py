"""A persistent cache of verdicts in front of any judge, so that a resumed or repeated run costs nothing.

One SQLite file in WAL mode, which several processes of one host may use at once (WAL needs shared memory: on several
hosts, give each its own file). Only CORRECT and WRONG are kept: an outage is not worth remembering. Reads and writes
are collected while the database thread is busy and done in one go, so that thousands of look-ups take milliseconds.
"""
from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sqlite3
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from hdpo.errors import ConfigError, JudgeError
from hdpo.protocols import Judge
from hdpo.text import valid
from hdpo.types import Judgement, Verdict

_BUSY_S = 30.0          # how long one process waits for another one's transaction
_MAX_DETAIL = 4000      # characters kept of a raw reply
_CHUNK = 500            # keys per SELECT

Rows = dict[bytes, tuple[str, str]]


class FingerprintedJudge(Judge, Protocol):
    async def fingerprint(self) -> str:
        """All that determines a verdict besides the arguments of `judge`. Raises JudgeError when it can't be known."""
        ...


class CachedJudge:
    """Implements `hdpo.protocols.Judge` over another one. Equal questions in flight are asked once.

    Raises ConfigError at construction if `path` can't be opened as a cache. A database that fails later costs cached
    verdicts, never a wrong one: it is counted in `stats` and the judge is asked.
    """

    def __init__(self, judge: FingerprintedJudge, path: str | os.PathLike[str]) -> None:
        self._judge = judge
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hdpo-verdicts")
        try:
            self._database = self._thread.submit(_open, Path(path)).result()
        except (sqlite3.Error, OSError) as exc:
            raise ConfigError(f"judge.cache: {path} can't be used as a verdict cache: {exc}") from None
        self._wanted: dict[bytes, list[asyncio.Future[tuple[str, str] | None]]] = {}
        self._reader: asyncio.Task[None] | None = None
        self._unsaved: Rows = {}
        self._writer: asyncio.Task[None] | None = None
        self._asking: dict[bytes, asyncio.Task[Judgement]] = {}
        self._counts: Counter[str] = Counter()

    async def judge(self, question: str, ground_truth: str | list[str], prediction: str) -> Judgement:
        try:
            fingerprint = await self._judge.fingerprint()
        except JudgeError as exc:
            return Judgement(Verdict.UNSCORED, "judge", str(exc))
        key = verdict_key(fingerprint, question, ground_truth, prediction)
        if key not in self._asking:
            row = await self._find(key)
            if row is not None:
                self._counts["cache_hits"] += 1
                return Judgement(Verdict(row[0]), "cache", row[1])
        if key not in self._asking:   # another one may have begun meanwhile
            self._asking[key] = asyncio.create_task(self._ask(key, question, ground_truth, prediction))
            return await asyncio.shield(self._asking[key])
        self._counts["cache_shared"] += 1
        return await asyncio.shield(self._asking[key])

    def stats(self) -> dict[str, float]:
        """The judge's own, and hits, shared questions and database errors since the previous call."""
        own = {f"judge/{name}": float(count) for name, count in self._counts.items()}
        self._counts = Counter()
        judge_stats = getattr(self._judge, "stats", None)
        return own | (judge_stats() if judge_stats else {})

    async def close(self) -> None:
        """Write what is unsaved, close the file and the judge."""
        for task in self._asking.values():
            task.cancel()
        await asyncio.gather(*self._asking.values(), return_exceptions=True)
        if self._writer is not None:
            await self._writer
        await asyncio.get_running_loop().run_in_executor(self._thread, self._database.close)
        self._thread.shutdown()
        await self._judge.close()

    async def _ask(self, key: bytes, question: str, ground_truth: str | list[str], prediction: str) -> Judgement:
        try:
            judgement = await self._judge.judge(question, ground_truth, prediction)
            if judgement.verdict is not Verdict.UNSCORED:
                self._unsaved[key] = (judgement.verdict.value, valid(judgement.detail[:_MAX_DETAIL], "judge"))
                if self._writer is None or self._writer.done():
                    self._writer = asyncio.create_task(self._write_all())
            return judgement
        finally:
            del self._asking[key]

    async def _find(self, key: bytes) -> tuple[str, str] | None:
        if key in self._unsaved:
            return self._unsaved[key]
        found: asyncio.Future[tuple[str, str] | None] = asyncio.get_running_loop().create_future()
        self._wanted.setdefault(key, []).append(found)
        if self._reader is None or self._reader.done():
            self._reader = asyncio.create_task(self._read_all())
        return await found

    async def _read_all(self) -> None:
        loop = asyncio.get_running_loop()
        while self._wanted:
            batch, self._wanted = self._wanted, {}
            try:
                rows = await loop.run_in_executor(self._thread, _select, self._database, list(batch))
            except sqlite3.Error:
                self._counts["cache_errors"] += 1
                rows = {}
            for key, waiting in batch.items():
                for found in waiting:
                    if not found.done():   # its question was cancelled
                        found.set_result(rows.get(key))

    async def _write_all(self) -> None:
        loop = asyncio.get_running_loop()
        while self._unsaved:
            batch = dict(self._unsaved)
            try:
                await loop.run_in_executor(self._thread, _insert, self._database, batch)
            except (sqlite3.Error, ValueError):   # a text that no database can hold
                self._counts["cache_errors"] += 1
            for key in batch:   # only now: until it is in the file, a look-up must find it here
                del self._unsaved[key]


def verdict_key(fingerprint: str, question: str, ground_truth: str | list[str], prediction: str) -> bytes:
    """20 bytes of all that determines a verdict."""
    truth = ground_truth if isinstance(ground_truth, str) else tuple(ground_truth)
    key = _asked(fingerprint, question, truth).copy()
    key.update(prediction.encode("utf-8", "surrogatepass"))
    return key.digest()


@lru_cache(maxsize=4096)
def _asked(fingerprint: str, question: str, truth: str | tuple[str, ...]) -> hashlib.blake2b:
    """What the G rollouts of a prompt have in common. JSON, so that no two different triples give the same text."""
    return hashlib.blake2b(json.dumps([fingerprint, question, truth]).encode(), digest_size=20)


def _open(path: Path) -> sqlite3.Connection:
    path.parent.mkdir(parents=True, exist_ok=True)
    database = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
    deadline = time.monotonic() + _BUSY_S
    while True:   # switching to WAL doesn't wait for other processes that do the same
        try:
            database.execute("PRAGMA journal_mode=WAL")
            break
        except sqlite3.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
    database.execute("PRAGMA synchronous=NORMAL")   # a power cut may lose the newest verdicts, never the file
    database.execute("CREATE TABLE IF NOT EXISTS verdicts (key BLOB PRIMARY KEY, verdict TEXT NOT NULL, "
                     "detail TEXT NOT NULL, created REAL NOT NULL) WITHOUT ROWID")
    return database


def _select(database: sqlite3.Connection, keys: Sequence[bytes]) -> Rows:
    rows: Rows = {}
    for start in range(0, len(keys), _CHUNK):
        chunk = keys[start:start + _CHUNK]
        marks = ",".join("?" * len(chunk))
        found = database.execute(f"SELECT key, verdict, detail FROM verdicts WHERE key IN ({marks})", chunk)
        rows.update((key, (verdict, detail)) for key, verdict, detail in found)
    return rows


def _insert(database: sqlite3.Connection, rows: Rows) -> None:
    database.execute("BEGIN IMMEDIATE")
    try:
        database.executemany("INSERT OR IGNORE INTO verdicts VALUES (?, ?, ?, ?)",
                             [(key, verdict, detail, time.time()) for key, (verdict, detail) in rows.items()])
        database.execute("COMMIT")
    except BaseException:   # whatever it was: an open transaction would lock out every process that shares the file
        database.execute("ROLLBACK")
        raise
