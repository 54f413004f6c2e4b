"""Hosted web search behind one interface. Keys come from the server's environment and stay in this process.

What a search engine shows above its results (a direct answer, a box about a person or a place) comes first here too.
"""
from __future__ import annotations

import os
import re
import unicodedata
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from hdpo import text
from hdpo.errors import ConfigError
from hdpo.toolserver.http_service import HttpService, SearchError

Result = tuple[str, str, str]
"""(title, link, snippet)"""
MAX_QUERY_CHARS = 1000
_CHINESE = re.compile(r"[\u4e00-\u9fff]")


class TextProvider(Protocol):
    async def search(self, query: str) -> list[Result]:
        """Ranked results, best first; an empty list when nothing was found. Raises SearchError."""
        ...

    async def close(self) -> None: ...


def asked(query: str) -> str:
    """The query as an answer names it."""
    return query.strip().replace('"', "")


def searchable(query: str) -> str:
    """The query as a provider is asked; empty when there is nothing to search for: no letter, digit or symbol in it."""
    plain = " ".join(query.replace('"', " ").split())[:MAX_QUERY_CHARS]
    return plain if any(c.isalnum() or ord(c) > 127 and unicodedata.category(c)[0] == "S" for c in plain) else ""


def _locale(query: str) -> tuple[str, str]:
    """(language, country) in which a query is asked."""
    return ("zh-cn", "cn") if _CHINESE.search(query) else ("en", "us")


class HttpProvider(HttpService):
    """A `TextProvider`; a subclass says how to ask and how to read."""

    def __init__(self, key: str, url: str, results: int) -> None:
        super().__init__(key, url)
        self.results = results

    def read(self, body: dict[str, Any]) -> list[Result]:
        raise NotImplementedError

    async def search(self, query: str) -> list[Result]:
        if not (plain := searchable(query)):
            return []
        return self.read(await self.fetch(plain))[:self.results]

    def rows(self, body: dict[str, Any], key: str, snippet: str, boxes: Sequence[Result | None] = ()) -> list[Result]:
        """`boxes`, then the rows of a list. Raises SearchError for an answer that says it failed instead of listing any."""
        rows, said = body.get(key), body.get("message") or body.get("error")
        if rows is None and said:
            raise SearchError(f"{self.name}: {self._without_key(text.one_line(said))}")
        found = [(_text(row.get("title")), _text(row.get("link")), _text(row.get(snippet)))
                 for row in (rows if isinstance(rows, list) else []) if isinstance(row, dict)]
        return [box for box in boxes if box is not None] + found


def _text(value: Any) -> str:
    return value if isinstance(value, str) else str(value) if isinstance(value, (int, float)) else ""


def _answer_box(value: Any) -> Result | None:
    """The direct answer: what it answers, then the page's words around it."""
    if isinstance(value, list):
        value = value[0] if value else None
    if not isinstance(value, dict):
        return None
    parts = [_text(value.get(key)) for key in ("answer", "result", "snippet")]
    parts += [_text(item) for item in value["list"]] if isinstance(value.get("list"), list) else []
    words = ". ".join(dict.fromkeys(part.strip().rstrip(".") for part in parts if part.strip()))
    return (_text(value.get("title")), _text(value.get("link")), words) if words else None


def _knowledge(value: Any) -> Result | None:
    """The box about a thing: its kind, its description, its attributes."""
    if not isinstance(value, dict):
        return None
    source = value.get("source")
    link = value.get("descriptionLink") or value.get("website") or (source.get("link") if isinstance(source, dict) else "")
    attributes = value.get("attributes")
    facts = [f"{key}: {_text(fact)}" for key, fact in attributes.items() if _text(fact)] if isinstance(attributes, dict) else []
    parts = [_text(value.get("type")), _text(value.get("description")), *facts]
    words = ". ".join(part.strip().rstrip(".") for part in parts if part.strip())
    title = _text(value.get("title"))
    return (title, _text(link), words) if title and words else None


class Serper(HttpProvider):
    """https://serper.dev: POST /search, header X-API-KEY; answerBox, knowledgeGraph, `organic` rows with `snippet`."""

    name = "serper"

    def request(self, query: str) -> tuple[str, dict[str, Any]]:
        return "POST", {"headers": {"X-API-KEY": self._key}, "json": {"q": query, "num": self.results}}

    def read(self, body: dict[str, Any]) -> list[Result]:
        boxes = _answer_box(body.get("answerBox")), _knowledge(body.get("knowledgeGraph"))
        return self.rows(body, "organic", "snippet", boxes)


class SerpApi(HttpProvider):
    """https://serpapi.com: GET /search; answer_box, knowledge_graph, `organic_results` rows with `snippet`; {"error": text}."""

    name = "serpapi"

    def request(self, query: str) -> tuple[str, dict[str, Any]]:
        language, country = _locale(query)
        return "GET", {"params": {"engine": "google", "q": query, "num": str(self.results), "api_key": self._key,
                                  "hl": language, "gl": country}}

    def read(self, body: dict[str, Any]) -> list[Result]:
        error = body.get("error")
        if error and "hasn't returned any results" in str(error):
            body = body | {"organic_results": body.get("organic_results") or []}
        elif error:
            raise SearchError(f"{self.name}: {self._without_key(text.one_line(error))}")
        boxes = _answer_box(body.get("answer_box")), _knowledge(body.get("knowledge_graph"))
        return self.rows(body, "organic_results", "snippet", boxes)


class BrightData(HttpProvider):
    """https://api.brightdata.com/request: a Google page through a zone, parsed there; `organic` with `description`."""

    name = "brightdata"

    def __init__(self, key: str, url: str, results: int, zone: str) -> None:
        super().__init__(key, url, results)
        self._zone = zone

    def request(self, query: str) -> tuple[str, dict[str, Any]]:
        language, country = _locale(query)
        page = (f"https://www.google.com/search?q={urllib.parse.quote_plus(query)}&hl={language}&gl={country}"
                f"&num={self.results}&brd_json=1")
        return "POST", {"headers": {"Authorization": f"Bearer {self._key}"},
                        "json": {"zone": self._zone, "url": page, "format": "raw"}}

    def read(self, body: dict[str, Any]) -> list[Result]:
        return self.rows(body, "organic", "description")


def hosted_provider(name: str, results: int, environment: Mapping[str, str] = os.environ) -> HttpProvider | None:
    """The provider `name`, or for "auto" the first whose key is set; None for "embedded" or without a key.

    Keys: SERPER_API_KEY, SERPAPI_API_KEY, BRIGHTDATA_API_TOKEN with BRIGHTDATA_ZONE; as in the reference, SERPER_API_KEY may
    hold the key of SerpApi too where that is named. Raises ConfigError when a provider is named whose key is missing.
    """
    def need(variable: str) -> str:
        value = environment.get(variable, "")
        if not value and name != "auto":
            raise ConfigError(f"search provider {name}: set {variable} in the tool server's environment")
        return value

    if name in ("auto", "serper") and (key := need("SERPER_API_KEY")):
        return Serper(key, "https://google.serper.dev/search", results)
    named = name == "serpapi" and environment.get("SERPER_API_KEY", "")
    if name in ("auto", "serpapi") and (key := environment.get("SERPAPI_API_KEY") or named or need("SERPAPI_API_KEY")):
        return SerpApi(key, "https://serpapi.com/search", results)
    if name in ("auto", "brightdata") and (key := need("BRIGHTDATA_API_TOKEN")) and (zone := need("BRIGHTDATA_ZONE")):
        return BrightData(key, "https://api.brightdata.com/request", results, zone)
    if name not in ("auto", "embedded"):
        raise ConfigError(f"search provider {name}: unknown; use serper, serpapi, brightdata or embedded")
    return None
