"""The `text_search` tool and its embedded index: one SQLite FTS5 file, ranked by BM25, no service and no key."""
from __future__ import annotations

import asyncio
import os
import re
import sqlite3
import threading
from collections.abc import Iterable
from pathlib import Path

from hdpo.errors import DataError
from hdpo.toolserver import layout
from hdpo.toolserver.http_service import SearchError
from hdpo.toolserver.providers import MAX_QUERY_CHARS, Result, TextProvider, asked, searchable
from hdpo.toolserver.wire import Reply

MAX_TERMS = 32
_TERM = re.compile(r"\w+")


class TextIndex:
    """A `TextProvider` over `pages(title, link UNINDEXED, snippet)`. Raises DataError for a file that is no index."""

    def __init__(self, path: str | os.PathLike[str], results: int = 10) -> None:
        self.path, self.results = Path(path), results
        self._local = threading.local()
        if not self.path.is_file():
            raise DataError(f"{path}: no such text index")
        try:
            self._connection().execute("SELECT title, link, snippet FROM pages LIMIT 1")
        except sqlite3.DatabaseError as exc:
            raise DataError(f"{path}: not a text index (an SQLite FTS5 table pages(title, link, snippet)): {exc}") from None

    def _connection(self) -> sqlite3.Connection:
        connection = getattr(self._local, "connection", None)
        if connection is None:
            uri = self.path.resolve().as_uri() + "?mode=ro"
            connection = self._local.connection = sqlite3.connect(uri, uri=True)
            connection.text_factory = lambda data: data.decode("utf-8", "replace")      # a file of anyone's making
        return connection

    def lookup(self, query: str) -> list[Result]:
        """Pages that hold any term of the query, best first. Query syntax of FTS5 has no effect: terms are quoted."""
        terms = list(dict.fromkeys(_TERM.findall(query[:MAX_QUERY_CHARS].lower())))[:MAX_TERMS]
        if not terms:
            return []
        match = " OR ".join(f'"{term}"' for term in terms)
        try:
            found = self._connection().execute(
                "SELECT title, link, snippet FROM pages WHERE pages MATCH ? ORDER BY bm25(pages), rowid LIMIT ?",
                (match, self.results)).fetchall()
            return [(str(title or ""), str(link or ""), str(snippet or "")) for title, link, snippet in found]
        except sqlite3.DatabaseError as exc:
            raise SearchError(f"{self.path}: {exc}") from exc

    async def search(self, query: str) -> list[Result]:
        return await asyncio.to_thread(self.lookup, query)

    async def close(self) -> None:
        """Connections are read-only and end with their threads."""


def build_text_index(path: str | os.PathLike[str], pages: Iterable[Result]) -> int:
    """Write a new index of (title, link, snippet) rows and return their number. An existing file is replaced whole."""
    target = Path(path)
    scratch = target.with_name(target.name + ".tmp")
    scratch.unlink(missing_ok=True)
    connection = sqlite3.connect(scratch)
    with connection:
        connection.execute("CREATE VIRTUAL TABLE pages USING fts5(title, link UNINDEXED, snippet)")
        count = connection.executemany("INSERT INTO pages VALUES (?, ?, ?)", pages).rowcount
    connection.close()
    scratch.replace(target)
    return max(0, count)


async def run_text_search(provider: TextProvider, query: str, words: layout.Reference = layout.REFERENCE) -> Reply:
    """A reply that is not valid names a mistake in the call. Raises SearchError when the provider fails: that is no result."""
    if not searchable(query):
        return Reply(layout.nothing_to_search(query), valid=False)      # the policy's mistake: it must not end as an outage
    results = await provider.search(query)
    return Reply(words.search_results(asked(query), results), metrics={"search_success": True, "num_results": len(results)})
