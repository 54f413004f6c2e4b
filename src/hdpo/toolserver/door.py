"""What every tool server does before a tool is asked: who may come in, how many at once, and pictures by their content."""
from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from aiohttp import web

from hdpo.toolserver.gate import objection, own_hosts, unpacked
from hdpo.toolserver.lens import ROUTE as QUERY_IMAGES
from hdpo.toolserver.picture_store import KEY, PictureStore
from hdpo.toolserver.settings import Settings

log = logging.getLogger(__name__)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Door:
    """HTTP handlers that all servers share, and the numbers they keep. A subclass has the tools, or knows who has."""

    pictures: PictureStore

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.token = settings.token      # a server that is given none makes one as soon as it knows its port
        self.hosts = own_hosts(settings.host, settings.public_url, settings.allowed_hosts)
        self.port = settings.port
        self.tools: list[str] = []
        self.open_calls = 0
        self.draining = False
        self.started = time.monotonic()

    def lifetime(self, app: web.Application) -> AsyncIterator[None]:
        """Build what answers calls in the running loop; end it when the application ends."""
        raise NotImplementedError

    async def get_observation(self, request: web.Request) -> web.StreamResponse:
        """POST /get_observation: a batch of calls of the reference's format."""
        raise NotImplementedError

    async def metrics(self, request: web.Request) -> web.Response:
        """GET /metrics: Prometheus text."""
        raise NotImplementedError

    async def query_image(self, request: web.Request) -> web.Response:
        """GET /query-image/NAME: an image a hosted search is looking at just now."""
        raise NotImplementedError

    async def live(self) -> int:
        """Trajectories that are live."""
        raise NotImplementedError

    def journal(self) -> AbstractContextManager[Any]:
        """To be open while calls are answered."""
        return nullcontext()

    def check_room(self) -> None:
        """Raises HTTPException for a call that can't be taken now."""
        if self.draining:
            raise refusal(web.HTTPServiceUnavailable, "the server is shutting down")
        if self.open_calls >= self.settings.max_queue:
            raise refusal(web.HTTPTooManyRequests, f"{self.open_calls} calls are waiting")

    async def put_image(self, request: web.Request) -> web.Response:
        """PUT /images/KEY: a picture for all trajectories that have it."""
        key, data = request.match_info["key"], unpacked(request, await request.read())
        if not KEY.fullmatch(key):
            return invalid("key", "expected a SHA-256 in lower-case hexadecimal")
        try:
            if not await asyncio.to_thread(self.pictures.put, key, data):
                return invalid("body", "its SHA-256 is not the key")
        except OSError as exc:
            log.warning("pictures can't be kept: %s", exc)
            raise refusal(web.HTTPInsufficientStorage, f"pictures can't be kept: {exc.strerror}") from None
        return web.json_response({})

    async def health(self, request: web.Request) -> web.Response:
        """GET /health, with the reference's fields."""
        return web.json_response({
            "status": "draining" if self.draining else "healthy", "concurrent_requests": self.open_calls,
            "thread_pool_size": self.settings.running_cells, "active_tasks": self.open_calls,
            "max_concurrent": self.settings.max_queue, "tools": self.tools, "uploads": True,
            "layout": self.settings.layout,
            "uptime_seconds": round(time.monotonic() - self.started, 3), "trajectories": await self.live()})

    @web.middleware
    async def guarded(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Everything but /health and query images, whose names are secrets themselves, needs the token."""
        open_to_all = request.path == "/health" or request.path.startswith(QUERY_IMAGES)
        refused = objection(request, self.hosts, self.token, open_to_all)
        return await handler(request) if refused is None else refused

    async def drained(self) -> None:
        """Refuse new calls and wait until the open ones are answered, at most `drain_s`."""
        self.draining = True
        deadline = time.monotonic() + self.settings.drain_s
        while self.open_calls and time.monotonic() < deadline:
            await asyncio.sleep(0.02)


async def answered(request: web.Request, body: bytes, headers: dict[str, str]) -> web.StreamResponse:
    """The body as the answer. A Response would hold it until the connection's next request."""
    response = web.StreamResponse(headers=headers)
    response.content_length = len(body)
    await response.prepare(request)
    await response.write(body)
    await response.write_eof()
    return response


def refusal(kind: type[web.HTTPError], reason: str) -> web.HTTPError:
    return kind(text=json.dumps({"detail": reason}), content_type="application/json", headers={"Retry-After": "1"})


def invalid(field: str, message: str) -> web.Response:
    detail = [{"loc": ["body", field], "msg": message, "type": "value_error"}]
    return web.json_response({"detail": detail}, status=422)
