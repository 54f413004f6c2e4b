"""Hosted reverse image search: Google Lens by way of Serper (https://serper.dev).

Such a service takes the address of an image, not the image. So that nothing is ever uploaded to a third party's host,
the tool server itself shows the query, under an unguessable address below its public URL, for as long as the search
lasts. Without a public URL there is no hosted image search, and no image leaves the server.
"""
from __future__ import annotations

import asyncio
import base64
import contextlib
import secrets
import urllib.parse
from collections.abc import Iterator
from typing import Any

import aiohttp

from hdpo import text
from hdpo.toolserver.http_service import HttpService, SearchError
from hdpo.toolserver.image_search import MAX_RETURNED, MAX_TITLES, ImageQuery, Match, bounded, encoded, open_image

ROUTE = "/query-image/"
QUERY_SIDE = 1024
"""Longest side of the query as it is shown, pixels."""
MAX_THUMBNAIL_BYTES = 2 << 20
THUMBNAIL_HOSTS = (".gstatic.com", ".googleusercontent.com")
"""Hosts from which thumbnails are fetched. Result pages are never opened: their addresses are anyone's to choose."""


class Showcase:
    """Query images that the outside may fetch at the moment. Re-encoded: no metadata, at most QUERY_SIDE pixels."""

    def __init__(self, public_url: str) -> None:
        self._base = public_url.rstrip("/") + ROUTE
        self._shown: dict[str, bytes] = {}

    @contextlib.contextmanager
    def show(self, png: bytes) -> Iterator[str]:
        """Address of `png` for the duration of the block."""
        name = secrets.token_urlsafe(24)
        self._shown[name] = png
        try:
            yield self._base + name
        finally:
            del self._shown[name]

    def get(self, name: str) -> bytes | None:
        return self._shown.get(name)


class SerperLens(HttpService):
    """POST /lens, header X-API-KEY, {"url": ...}; `organic` rows with `title` and `thumbnailUrl`. An `ImageProvider`."""

    name = "serper lens"

    def __init__(self, key: str, url: str, showcase: Showcase, thumbnail_hosts: tuple[str, ...] = THUMBNAIL_HOSTS) -> None:
        super().__init__(key, url)
        self.showcase = showcase
        self._hosts = thumbnail_hosts

    def request(self, query: str) -> tuple[str, dict[str, Any]]:
        return "POST", {"headers": {"X-API-KEY": self._key}, "json": {"url": query}}

    async def search(self, query: ImageQuery) -> list[Match]:
        """Titles of the pages Lens finds, and the first thumbnails. Raises SearchError."""
        png = await asyncio.to_thread(lambda: encoded(open_image(query.image), QUERY_SIDE))
        with self.showcase.show(png) as address:
            body = await self.fetch(address)
        rows, said = body.get("organic") or [], body.get("message") or body.get("error")
        if not isinstance(rows, list) or said and "organic" not in body:
            raise SearchError(f"{self.name}: {self._without_key(text.one_line(said or 'the answer holds no list of results'))}")
        found = [row for row in rows if isinstance(row, dict) and isinstance(row.get("title"), str) and row["title"]][:MAX_TITLES]
        images = await asyncio.gather(*(self._thumbnail(str(row.get("thumbnailUrl") or "")) for row in found[:MAX_RETURNED]))
        rest = [None] * (len(found) - len(images))
        return [Match(row["title"][:300], image) for row, image in zip(found, [*images, *rest])]

    async def _thumbnail(self, url: str) -> bytes | None:
        """A missing thumbnail is no failure: the title says what was found."""
        try:
            head, comma, data = url.partition(",")
            if head.startswith("data:image/") and head.endswith(";base64") and comma:
                return await asyncio.to_thread(lambda: bounded(base64.b64decode(data, validate=True)))
            host = urllib.parse.urlsplit(url).hostname or ""
            if not host.endswith(self._hosts):
                return None
            async with self.session().get(url, allow_redirects=False) as response:
                content = bytearray()
                async for chunk in response.content.iter_chunked(1 << 16):
                    content += chunk
                    if response.status != 200 or len(content) > MAX_THUMBNAIL_BYTES:
                        return None
            return await asyncio.to_thread(bounded, bytes(content))
        except (aiohttp.ClientError, OSError, ValueError, SearchError):
            return None
