"""A hosted service that answers with JSON: retries, deadline, rate, and a stranger's bytes made harmless.

Keys come from the server's environment and stay in this process. A service that fails raises SearchError: that is
infrastructure, never an empty result.
"""
from __future__ import annotations

import asyncio
import email.utils
import json
import random
import time
from typing import Any

import aiohttp

from hdpo import oddities, text
from hdpo.errors import InfrastructureError

TIMEOUT_S = 20.0
"""One request."""
DEADLINE_S = 100.0
"""One answer with all its attempts, unless `limit` says otherwise."""
ATTEMPTS = 3
"""Requests that may fail. One that the service asks to repeat later (429, 503, Retry-After) is not counted."""
MAX_ANSWER_BYTES = 16 << 20
_BUSY, _RETRIED = (429, 503), (408, 425, 500, 502, 504)


class SearchError(InfrastructureError):
    """The service could not be reached or answered with an error."""


class HttpService:
    """A subclass says how to ask."""

    name = ""
    counted = "search"       # kind of the oddities

    def __init__(self, key: str, url: str) -> None:
        self._key, self._url = key, url
        self._session: aiohttp.ClientSession | None = None
        self._interval, self._next, self._deadline_s = 0.0, 0.0, DEADLINE_S

    def limit(self, per_second: float, deadline_s: float = DEADLINE_S) -> None:
        """Start at most so many requests a second; give up on an answer after `deadline_s`."""
        self._interval, self._deadline_s = 1.0 / per_second, deadline_s

    def request(self, query: str) -> tuple[str, dict[str, Any]]:
        """(method, keyword arguments of aiohttp's request)"""
        raise NotImplementedError

    async def fetch(self, query: str) -> dict[str, Any]:
        """The JSON object of a 200 answer, its texts valid, after retries if need be. Raises SearchError at the deadline, or
        when a retry would not help."""
        clock = asyncio.get_running_loop().time
        deadline, failures, waits = clock() + self._deadline_s, 0, 0
        while True:
            status, problem, body, asked = await self._attempt(query, deadline)
            if status == 200:
                if not isinstance(body, dict):
                    raise SearchError(f"{self.name}: the answer is not a JSON object{problem and f' ({problem})'}")
                return body
            busy = status in _BUSY
            oddities.count(f"{self.counted}/{'busy' if busy else 'failed'}")
            waits, failures = waits + busy, failures + (not busy)
            if failures == ATTEMPTS or status is not None and status not in _BUSY + _RETRIED:
                raise SearchError(f"{self.name}: {problem}")
            pause = max(asked, min(8.0, 0.25 * 2 ** (failures + waits)) * random.uniform(0.5, 1.0))
            if clock() + pause >= deadline:
                wants = f", asks to wait {asked:g} s" if asked else ""
                raise SearchError(f"{self.name}: {problem}{wants}; given up after {failures + waits} attempts")
            if asked:     # it means everybody who asks with this key
                self._next = max(self._next, clock() + asked)
            await asyncio.sleep(pause)

    def session(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(total=TIMEOUT_S), trust_env=True, connector=aiohttp.TCPConnector(limit=64))
        return self._session

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def _turn(self, deadline: float) -> None:
        now = asyncio.get_running_loop().time()
        start = max(now, self._next + self._interval)
        if start >= deadline:
            raise SearchError(f"{self.name}: too busy: the next request could start in {start - now:.0f} s")
        self._next = start
        await asyncio.sleep(start - now)

    async def _attempt(self, query: str, deadline: float) -> tuple[int | None, str, Any, float]:
        """(status, or None for a broken answer; the problem in one harmless line; JSON of a 200; seconds it asks to wait)"""
        method, arguments = self.request(query)
        await self._turn(deadline)
        try:
            async with self.session().request(method, self._url, **arguments) as response:
                content = await _read(response)
                hint = text.one_line(response.headers.get("x-brd-err-msg", ""))      # BrightData's own words
                if response.status == 200:
                    return 200, hint, text.valid_tree(json.loads(content) if content.strip() else None, self.counted), 0.0
                said = hint or text.one_line(content.decode("utf-8", "replace"))
                return response.status, self._without_key(f"HTTP {response.status}: {said}"), None, retry_after(response.headers)
        except (aiohttp.ClientError, OSError, ValueError, RecursionError) as exc:
            return None, type(exc).__name__, None, 0.0      # the message may hold the URL, and the URL the key

    def _without_key(self, said: str) -> str:
        return said.replace(self._key, "***") if self._key else said


async def _read(response: aiohttp.ClientResponse) -> bytes:
    content = bytearray()
    async for chunk in response.content.iter_chunked(1 << 16):
        content += chunk
        if len(content) > MAX_ANSWER_BYTES:
            raise ValueError("the answer is too long")
    return bytes(content)


def retry_after(headers: Any) -> float:
    """Seconds that a Retry-After header asks for, given as such or as a date; 0 without one that can be read."""
    value = headers.get("Retry-After", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return seconds if 0 < seconds < 1e6 else 0.0
