"""Hosted web search behind one interface. Keys come from the server's environment and stay in this process.

A provider that fails raises SearchError: that is infrastructure, never an empty result.
"""
from __future__ import annotations

import asyncio
import os
import random
import re
import urllib.parse
from collections.abc import Mapping
from typing import Any, Protocol

import aiohttp

from hdpo.errors import ConfigError, InfrastructureError

Result = tuple[str, str, str]
"""(title, link, snippet)"""
TIMEOUT_S = 20.0
ATTEMPTS = 3
MAX_QUERY_CHARS = 1000
_RETRIED = (408, 429, 500, 502, 503, 504)
_CHINESE = re.compile(r"[\u4e00-\u9fff]")


class SearchError(InfrastructureError):
    """The search provider could not be reached or answered with an error."""


class TextProvider(Protocol):
    async def search(self, query: str) -> list[Result]:
        """Ranked results, best first; an empty list when nothing was found. Raises SearchError."""
        ...

    async def close(self) -> None: ...


class HttpService:
    """Retries, deadline, rate and connection of a hosted service that answers with JSON; a subclass says how to ask."""

    name = ""

    def __init__(self, key: str, url: str) -> None:
        self._key, self._url = key, url
        self._session: aiohttp.ClientSession | None = None
        self._interval, self._next = 0.0, 0.0

    def limit_rate(self, per_second: float) -> None:
        """Start at most so many requests a second."""
        self._interval = 1.0 / per_second

    async def _turn(self) -> None:
        now = asyncio.get_running_loop().time()
        start = self._next = max(now, self._next + self._interval)
        await asyncio.sleep(start - now)

    def request(self, query: str) -> tuple[str, dict[str, Any]]:
        """(method, keyword arguments of aiohttp's request)"""
        raise NotImplementedError

    async def fetch(self, query: str) -> dict[str, Any]:
        """The JSON object of a 200 answer, after retries if need be. Raises SearchError."""
        problem = ""
        for attempt in range(ATTEMPTS):
            if attempt:
                await asyncio.sleep(0.25 * 2 ** attempt * random.uniform(0.5, 1.0))
            status, problem, body = await self._attempt(query)
            if status == 200:
                if not isinstance(body, dict):
                    raise SearchError(f"{self.name}: the answer is not a JSON object")
                return body
            if status is not None and status not in _RETRIED:
                break
        raise SearchError(f"{self.name}: {problem}")

    def session(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(total=TIMEOUT_S), trust_env=True, connector=aiohttp.TCPConnector(limit=64))
        return self._session

    async def _attempt(self, query: str) -> tuple[int | None, str, Any]:
        method, arguments = self.request(query)
        await self._turn()
        try:
            async with self.session().request(method, self._url, **arguments) as response:
                if response.status == 200:
                    return 200, "", await response.json(content_type=None)
                return response.status, f"HTTP {response.status}: {(await response.text())[:300]}", None
        except (aiohttp.ClientError, OSError, ValueError) as exc:
            return None, type(exc).__name__, None      # the message may hold the URL, and the URL the key

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()


class HttpProvider(HttpService):
    """A `TextProvider`; a subclass says how to ask and how to read."""

    def __init__(self, key: str, url: str, results: int) -> None:
        super().__init__(key, url)
        self.results = results

    def read(self, body: Any) -> list[Result]:
        raise NotImplementedError

    async def search(self, query: str) -> list[Result]:
        body = await self.fetch(query.replace('"', "").strip()[:MAX_QUERY_CHARS])
        return self.read(body)[:self.results]


def _rows(body: dict[str, Any], key: str, snippet: str) -> list[Result]:
    rows = body.get(key) or []
    return [(str(row.get("title") or ""), str(row.get("link") or ""), str(row.get(snippet) or ""))
            for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


class Serper(HttpProvider):
    """https://serper.dev: POST /search, header X-API-KEY, `organic` rows with `snippet`."""

    name = "serper"

    def request(self, query: str) -> tuple[str, dict[str, Any]]:
        return "POST", {"headers": {"X-API-KEY": self._key}, "json": {"q": query, "num": self.results}}

    def read(self, body: Any) -> list[Result]:
        return _rows(body, "organic", "snippet")


class SerpApi(HttpProvider):
    """https://serpapi.com: GET /search, `organic_results` rows with `snippet`; errors come as {"error": text}."""

    name = "serpapi"

    def request(self, query: str) -> tuple[str, dict[str, Any]]:
        language, country = ("zh-cn", "cn") if _CHINESE.search(query) else ("en", "us")
        return "GET", {"params": {"engine": "google", "q": query, "num": str(self.results), "api_key": self._key,
                                  "hl": language, "gl": country}}

    def read(self, body: Any) -> list[Result]:
        error = body.get("error")
        if error and "hasn't returned any results" not in str(error):
            raise SearchError(f"{self.name}: {str(error)[:300]}")
        return _rows(body, "organic_results", "snippet")


class BrightData(HttpProvider):
    """https://api.brightdata.com/request: a Google page through a zone, parsed there; `organic` with `description`."""

    name = "brightdata"

    def __init__(self, key: str, url: str, results: int, zone: str) -> None:
        super().__init__(key, url, results)
        self._zone = zone

    def request(self, query: str) -> tuple[str, dict[str, Any]]:
        page = f"https://www.google.com/search?q={urllib.parse.quote_plus(query)}&brd_json=1&num={self.results}"
        return "POST", {"headers": {"Authorization": f"Bearer {self._key}"},
                        "json": {"zone": self._zone, "url": page, "format": "raw"}}

    def read(self, body: Any) -> list[Result]:
        return _rows(body, "organic", "description")


def hosted_provider(name: str, results: int, environment: Mapping[str, str] = os.environ) -> HttpProvider | None:
    """The provider `name`, or for "auto" the first whose key is set; None for "embedded" or without a key.

    Keys: SERPER_API_KEY, SERPAPI_API_KEY, BRIGHTDATA_API_TOKEN with BRIGHTDATA_ZONE. Raises ConfigError when a provider
    is named whose key is missing.
    """
    def need(variable: str) -> str:
        value = environment.get(variable, "")
        if not value and name != "auto":
            raise ConfigError(f"search provider {name}: set {variable} in the tool server's environment")
        return value

    if name in ("auto", "serper") and (key := need("SERPER_API_KEY")):
        return Serper(key, "https://google.serper.dev/search", results)
    if name in ("auto", "serpapi") and (key := need("SERPAPI_API_KEY")):
        return SerpApi(key, "https://serpapi.com/search", results)
    if name in ("auto", "brightdata") and (key := need("BRIGHTDATA_API_TOKEN")) and (zone := need("BRIGHTDATA_ZONE")):
        return BrightData(key, "https://api.brightdata.com/request", results, zone)
    if name not in ("auto", "embedded"):
        raise ConfigError(f"search provider {name}: unknown; use serper, serpapi, brightdata or embedded")
    return None
