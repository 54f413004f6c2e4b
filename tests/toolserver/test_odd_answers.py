"""Hosted search on a bad day: busy, wrong, half an emoji, boxes, nothing. Never the policy's fault, never the other way round."""
from __future__ import annotations

import asyncio
import email.utils
import json
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from hdpo import oddities
from hdpo.toolserver import layout
from hdpo.toolserver.http_service import SearchError
from hdpo.toolserver.providers import HttpProvider, Result, SerpApi, Serper, searchable
from hdpo.toolserver.search_cache import EMPTY_KEPT_S, CachedSearch
from hdpo.toolserver.text_search import TextIndex, build_text_index, run_text_search

Answer = tuple[int, Any] | tuple[int, Any, dict[str, str]]
ROW = {"title": "T", "link": "https://l", "snippet": "S"}


def ask(*answers: Answer, make: Callable[[str], HttpProvider] = lambda url: Serper("s3cret", url, 10), deadline_s: float = 20.0,
        queries: int = 1) -> tuple[list[Any], list[float]]:
    """(results or SearchError of each query, all at once; when requests came, seconds); `answers` in turn, the last one kept."""
    came: list[float] = []

    async def handler(request: web.Request) -> web.Response:
        status, body, *headers = answers[min(len(came), len(answers) - 1)]
        came.append(time.monotonic())
        data = body if isinstance(body, bytes) else body.encode() if isinstance(body, str) else json.dumps(body).encode()
        return web.Response(status=status, body=data, headers=headers[0] if headers else {})

    async def go() -> list[Any]:
        app = web.Application()
        app.router.add_route("*", "/", handler)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        provider = make(f"http://127.0.0.1:{runner.addresses[0][1]}/")
        provider.limit(1000.0, deadline_s)
        try:
            return await asyncio.gather(*(provider.search(f"query {n}") for n in range(queries)), return_exceptions=True)
        finally:
            await provider.close()
            await runner.cleanup()
    found = asyncio.run(go())
    return found, [moment - came[0] for moment in came]


GOOD: Answer = (200, {"organic": [ROW]})


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("as_date", [False, True])
def test_a_busy_provider_is_asked_again_when_it_says(status: int, as_date: bool) -> None:
    wanted = email.utils.formatdate(time.time() + 3, usegmt=True) if as_date else "1"
    oddities.take()
    (found,), came = ask((status, "slow down", {"Retry-After": wanted}), GOOD)
    assert found == [("T", "https://l", "S")] and came[1] >= 0.95
    assert oddities.take() == {"odd/search/busy": 1.0}


def test_all_who_ask_with_a_key_wait_when_one_is_told_to_and_more_than_three_times_if_need_be() -> None:
    found, came = ask(*[(429, "", {"Retry-After": "0.4"})] * 5, GOOD, queries=3)
    assert all(result == [("T", "https://l", "S")] for result in found) and len(came) == 8


def test_a_wait_beyond_the_deadline_is_not_begun_and_the_reason_says_what_was_asked_for() -> None:
    started = time.monotonic()
    (found,), came = ask((429, "quota", {"Retry-After": "60"}), deadline_s=2.0)
    assert isinstance(found, SearchError) and time.monotonic() - started < 2.0 and len(came) == 1
    assert "HTTP 429: quota" in str(found) and "60 s" in str(found)


def test_what_stays_broken_is_given_up_after_three_requests() -> None:
    (found,), came = ask((502, "bad gateway"))
    assert isinstance(found, SearchError) and len(came) == 3


@pytest.mark.parametrize("words", [
    "\x1b[2J\x1b]0;gotcha\x07 no\n2026 ERROR forged line\r\n", "key s3cret is wrong", "\u202egnorw", "\x9b2J", b"\xff\xfe wrong"])
@pytest.mark.parametrize("status", [200, 403])
def test_a_providers_words_reach_a_log_as_one_harmless_line_without_the_key(words: Any, status: int) -> None:
    body = words if status == 403 or isinstance(words, bytes) else {"message": words}
    (found,), _ = ask((status, body))
    text = str(found)
    assert isinstance(found, SearchError) and text.isprintable() and "s3cret" not in text and "\u202e" not in text


@pytest.mark.parametrize("body", [
    {"message": "Not enough credits"}, {"error": "invalid key"}, "[" * 100_000, b"{\"organic\": \xff}", "null",
    {"organic": None, "message": "x"}])
def test_a_failure_with_status_200_is_a_failure_and_not_an_empty_result(body: Any) -> None:
    (found,), _ = ask((200, body), deadline_s=5.0)
    assert isinstance(found, SearchError)


def test_halves_of_emojis_are_made_valid_and_counted() -> None:
    oddities.take()
    body = '{"organic": [{"title": "cut \\ud83d", "link": "l", "snippet": "whole \\ud83d\\ude00 half \\ude00"}]}'
    (found,), _ = ask((200, body))
    assert found == [("cut \ufffd", "l", "whole \U0001f600 half \ufffd")]
    assert oddities.take() == {"odd/text/search": 2.0}


def test_fields_of_other_types_are_no_text() -> None:
    (found,), _ = ask((200, {"organic": [{"title": ["a"], "link": None, "snippet": 5}, "row", None, {"title": {}}]}))
    assert found == [("", "", "5"), ("", "", "")]


SERPER = {"answerBox": {"title": "Fuji", "answer": "3,776 m", "snippet": "Mount Fuji is 3,776 m high.", "link": "a"},
          "knowledgeGraph": {"title": "Mount Fuji", "type": "Volcano", "description": "A volcano.", "descriptionLink": "k",
                             "attributes": {"Elevation": "3,776 m", "Odd": None}}, "organic": [ROW]}
SERPAPI = {"answer_box": {"type": "organic_result", "title": "Fuji", "answer": "3,776 m", "link": "a",
                          "snippet": "Mount Fuji is 3,776 m high."},
           "knowledge_graph": {"title": "Mount Fuji", "type": "Volcano", "description": "A volcano.", "source": {"link": "k"}},
           "organic_results": [ROW]}


@pytest.mark.parametrize(("make", "body"), [(Serper, SERPER), (SerpApi, SERPAPI)])
def test_the_direct_answer_and_the_box_about_the_thing_come_first(make: Any, body: dict[str, Any]) -> None:
    (found,), _ = ask((200, body), make=lambda url: make("key", url, 10))
    assert found[0] == ("Fuji", "a", "3,776 m. Mount Fuji is 3,776 m high")
    assert found[1][:2] == ("Mount Fuji", "k") and found[1][2].startswith("Volcano. A volcano")
    assert found[2] == ("T", "https://l", "S")
    alone = {key: value for key, value in body.items() if not key.startswith("organic")}
    (found,), _ = ask((200, alone), make=lambda url: make("key", url, 1))
    assert [title for title, _, _ in found] == ["Fuji"]


@pytest.mark.parametrize("box", [None, [], {}, "text", 5, {"title": "only a title"}, [None], {"answer": {"deep": 1}}])
def test_an_odd_box_is_left_out(box: Any) -> None:
    (found,), _ = ask((200, {"answerBox": box, "knowledgeGraph": box, "organic": [ROW]}))
    assert found == [("T", "https://l", "S")]


@pytest.mark.parametrize("query", [
    '"', '""', ' " " ', "“”", "''", "«»", "...", "?!", "- - -", "\u200b\u200b", "\u3000", "\x00", "*", "()"])
def test_a_query_of_nothing_is_the_policys_mistake_and_never_asked(query: str) -> None:
    class Never:
        async def search(self, query: str) -> list[Result]:
            raise SearchError("HTTP 400: Missing query parameter")

        async def close(self) -> None: ...

    reply = asyncio.run(run_text_search(Never(), query))
    assert not reply.valid and not reply.infrastructure and "nothing to search for" in reply.text


@pytest.mark.parametrize("query", ["富士山", "C++", "5", "∑", "🗻", "नमस्ते", 'who "is" it', "a\nb"])
def test_any_word_number_or_symbol_is_a_query(query: str) -> None:
    assert searchable(query) and "\n" not in searchable(query) and '"' not in searchable(query)


def test_rows_without_a_snippet_are_not_each_others_duplicates() -> None:
    rows = [("a", "1", ""), ("b", "2", ""), ("a", "1", ""), ("", "", ""), ("c", "3", "same"), ("d", "4", "same")]
    text = layout.COMPACT.search_results("q", rows)
    assert "found 3 results" in text and all(f"[Title: {title}]" in text for title in "abc")


class Counting:
    """A provider whose answers are given."""

    def __init__(self, *answers: list[Result]) -> None:
        self.answers, self.asked = list(answers), 0

    async def search(self, query: str) -> list[Result]:
        self.asked += 1
        return self.answers[min(self.asked, len(self.answers)) - 1]

    async def close(self) -> None: ...


def test_an_empty_answer_is_believed_for_a_while_only_and_replayed_as_recorded(tmp_path: Path) -> None:
    file, source = tmp_path / "cache.db", Counting([], [("T", "l", "S")])

    def search(source: Counting | None) -> list[Result]:
        cache = CachedSearch(file, source)
        found = asyncio.run(cache.search("q"))
        cache._db.close()
        return found

    assert search(source) == search(source) == search(None) == [] and source.asked == 1
    with sqlite3.connect(file) as database:
        database.execute("UPDATE searches SET time = datetime('now', ?)", (f"-{EMPTY_KEPT_S + 5} seconds",))
    assert search(None) == []
    assert search(source) == search(source) == search(None) == [("T", "l", "S")] and source.asked == 2
    with sqlite3.connect(file) as database:
        database.execute("UPDATE searches SET time = datetime('now', '-1 year')")
    assert search(source) == [("T", "l", "S")] and source.asked == 2


def test_an_index_of_anyones_making_is_read_as_text(tmp_path: Path) -> None:
    build_text_index(tmp_path / "t.db", [("Fuji", "l", "high")])
    with sqlite3.connect(tmp_path / "t.db") as database:
        database.execute("INSERT INTO pages VALUES (CAST(x'46756a69edA0bd' AS TEXT), NULL, 'odd fuji')")
    found = TextIndex(tmp_path / "t.db").lookup("fuji")
    assert len(found) == 2 and all(isinstance(part, str) for row in found for part in row)
    json.dumps(found).encode()
    "".join(part for row in found for part in row).encode()
