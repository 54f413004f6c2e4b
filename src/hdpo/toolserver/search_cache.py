"""A search provider with a memory on disk: each query is asked once, and a recorded run can be replayed offline.

The live web drifts, so rewards that depend on it can't be repeated; a cache file can. Failures are never kept, and an empty
answer, which engines give now and then for no reason, is believed for EMPTY_KEPT_S only.
"""
from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import threading
from pathlib import Path

from hdpo import text
from hdpo.errors import DataError
from hdpo.toolserver.http_service import SearchError
from hdpo.toolserver.providers import Result, TextProvider

EMPTY_KEPT_S = 600.0


class CachedSearch:
    """`TextProvider` in front of another. With `source` None it replays: what is not in the file is a SearchError.

    Several servers may share one file. Concurrent calls with the same query ask the source once.
    """

    def __init__(self, path: str | os.PathLike[str], source: TextProvider | None, scope: str = "") -> None:
        self._source = source
        self._scope = scope                      # e.g. the number of results asked for: other answers, other entries
        self._asking: dict[str, asyncio.Task[list[Result]]] = {}
        self._lock = threading.Lock()
        if source is None and not Path(path).is_file():
            raise DataError(f"{path}: no search cache to replay")
        try:
            self._db = sqlite3.connect(path, timeout=30, check_same_thread=False, isolation_level=None)
            self._db.execute("CREATE TABLE IF NOT EXISTS searches (scope TEXT, query TEXT, results TEXT, "
                             "time TEXT DEFAULT CURRENT_TIMESTAMP, PRIMARY KEY (scope, query))")
        except sqlite3.DatabaseError as exc:
            raise DataError(f"{path}: not a search cache: {exc}") from None

    async def search(self, query: str) -> list[Result]:
        """From the file if it is there, from the source otherwise. Raises SearchError."""
        key = " ".join(query.split())
        known = await asyncio.to_thread(self._read, key)
        if known is not None:
            return known
        if self._source is None:
            raise SearchError("replaying: this query is not in the search cache")
        task = self._asking.get(key)
        if task is None:
            task = self._asking[key] = asyncio.create_task(self._ask(key, query))
            task.add_done_callback(lambda _: self._asking.pop(key, None))
        return await asyncio.shield(task)

    async def _ask(self, key: str, query: str) -> list[Result]:
        assert self._source is not None
        results = await self._source.search(query)
        await asyncio.to_thread(self._write, key, results)
        return results

    def _read(self, key: str) -> list[Result] | None:
        with self._lock:
            row = self._db.execute(
                "SELECT results, strftime('%s', 'now') - strftime('%s', time) FROM searches WHERE scope = ? AND query = ?",
                (self._scope, key)).fetchone()
        if row is None:
            return None
        found = [(title, link, snippet) for title, link, snippet in text.valid_tree(json.loads(row[0]), "search")]
        stale = not found and self._source is not None and (row[1] is None or row[1] > EMPTY_KEPT_S)
        return None if stale else found

    def _write(self, key: str, results: list[Result]) -> None:
        with self._lock:
            self._db.execute("INSERT OR REPLACE INTO searches (scope, query, results) VALUES (?, ?, ?)",
                             (self._scope, key, json.dumps(results)))

    async def close(self) -> None:
        if self._source is not None:
            await self._source.close()
        self._db.close()
