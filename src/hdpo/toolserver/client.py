"""The trainer's end of the tool server: `ToolClient`, a `hdpo.protocols.ToolBackend` over HTTP.

A call keeps its request id through all its attempts, so the server executes it once however often it is sent. Images
travel once per trajectory. Ground truth is never sent. A python call that relies on a session which the server has lost
fails as the server's fault: executed in a fresh one, it would charge the policy for variables it did set.
"""
from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
import urllib.request
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

import aiohttp

from hdpo import oddities, text
from hdpo.errors import ToolServerError
from hdpo.protocols import ToolResult
from hdpo.toolserver.token import token_for
from hdpo.toolserver.wire import Call, Reply, WireError, parse_response, request_json
from hdpo.types import Task

T = TypeVar("T")

BUSY = (429, 503)
"""Statuses by which a healthy server asks to come back later; waited out until the deadline."""
UNREACHED = 0
"""No connection: the server is down or restarting and can't have executed anything; waited out until the deadline too."""
BROKEN = (500, 502, 504)
"""Statuses that count as failed attempts."""
MAX_BACKOFF_S = 5.0
FINISH_TIMEOUT_S = 15.0
OFF_LOOP_BYTES = 1 << 16
"""Requests and replies from this size on are encoded and decoded in a thread."""


class ToolClient:
    """One per process. Its methods run in one event loop; the HTTP session is created by the first of them.

    `timeout` is the deadline of one call with all its attempts, seconds, which an outage of the server may last; `retries`
    are further attempts after a connection broke or the server failed; `token` is sent as a bearer token, by default that of
    the environment or of this user's server on this machine.
    """

    def __init__(self, url: str, timeout: float = 400.0, retries: int = 2, token: str | None = None) -> None:
        url = url.rstrip("/")
        self.url = url.removesuffix("/get_observation")   # REMOTE_TOOL_SERVER_URL may name the route, as the reference's
        self.timeout = timeout
        self.retries = retries
        token = token or token_for(self.url)
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._session: aiohttp.ClientSession | None = None
        self._known: dict[str, bool] = {}    # trajectories whose images the server has: whether it holds a session, too
        self._closed = False
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="hdpo-wire")   # JSON holds the interpreter: two are no faster

    async def call(self, trajectory_id: str, action: str, task: Task) -> ToolResult:
        """Execute one action. Raises ToolServerError when no answer could be had or the server blames itself."""
        request_id = uuid.uuid4().hex
        sent, session = trajectory_id in self._known, self._known.get(trajectory_id, False)
        call = Call(trajectory_id, action, request_id, images=None if sent else task.images, images_sent=sent,
                    expects_session=session, index=task.row_index)
        started = time.monotonic()
        try:
            async with asyncio.timeout(self.timeout):
                reply = await self._post(call)
                if reply.metrics.get("need_images"):
                    reply = await self._post(replace(call, images=task.images))
        except TimeoutError:
            raise ToolServerError(f"{self.url}: no answer within {self.timeout:g} s") from None
        oddities.count_reported(reply.metrics.get("oddities"))
        if reply.metrics.get("need_images"):
            raise ToolServerError(f"{self.url}: keeps asking for the images of {trajectory_id}")
        self._known[trajectory_id] = session or "code_success" in reply.metrics
        if reply.infrastructure:
            raise ToolServerError(f"{self.url}: {reply.text}")
        metrics = {**reply.metrics, "seconds": time.monotonic() - started, "timed_out": reply.timed_out}
        ran = all(reply.metrics.get(name, True) for name in ("code_success", "search_success"))
        return ToolResult(reply.text, reply.images, ok=reply.valid and ran, done=reply.done, metrics=metrics)

    def expect(self, trajectory_id: str) -> None:
        """See `ToolBackend.expect`. The server asks for the images of a trajectory that it does not know."""
        self._known.setdefault(trajectory_id, True)

    async def finish(self, trajectory_id: str) -> None:
        """Release the trajectory's session on the server. Never raises: the server reaps idle sessions anyway."""
        self._known.pop(trajectory_id, None)
        with contextlib.suppress(ToolServerError, TimeoutError):
            async with asyncio.timeout(FINISH_TIMEOUT_S):
                await self._post(Call(trajectory_id, "", uuid.uuid4().hex, finish=True), patient=False)

    async def close(self) -> None:
        self._closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _post(self, call: Call, patient: bool = True) -> Reply:
        if self._closed:
            raise ToolServerError(f"{self.url}: the client is closed")
        body = await self._off_loop(sum(map(len, call.images or ())), _request_body, call)
        failures, waits = 0, 0
        while True:
            status, problem, payload = await self._attempt(body)
            problem = text.one_line(problem)
            if status == 200:
                try:
                    return await self._off_loop(len(payload), _reply, payload)
                except (WireError, ValueError, RecursionError) as exc:     # asked again: the server remembers its answer
                    oddities.count("tool/unreadable_answer")
                    status, problem = None, f"not a tool server's answer: {text.one_line(exc)}"
            if status in BUSY or (status == UNREACHED and patient):
                waits += 1
            elif status in (None, UNREACHED) or status in BROKEN:
                failures += 1
                oddities.count("tool/failed_attempt")
                if failures > self.retries:
                    raise ToolServerError(f"{self.url}: {problem} ({failures} attempts)")
            else:
                raise ToolServerError(f"{self.url}: {problem}")
            delay = min(MAX_BACKOFF_S, 0.1 * 2 ** min(failures + waits, 10))
            await asyncio.sleep(delay * random.uniform(0.5, 1.0))

    async def _off_loop(self, size: int, function: Callable[[Any], T], argument: Any) -> T:
        """Pictures are made into JSON and back in a thread: a hundred of them at once would hold up the event loop."""
        if size < OFF_LOOP_BYTES:
            return function(argument)
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, argument)

    async def _attempt(self, body: bytes) -> tuple[int | None, str, bytes]:
        """(status, UNREACHED, or None for a broken connection; what went wrong; body of a 200)."""
        if self._closed:
            raise ToolServerError(f"{self.url}: the client is closed")
        if self._session is None:
            self._session = aiohttp.ClientSession(
                headers=self._headers, connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(None))
        try:
            async with self._session.post(
                    f"{self.url}/get_observation", data=body, headers={"Content-Type": "application/json"}) as response:
                if response.status == 200:
                    return 200, "", await response.read()
                said = (await response.content.read(2000)).decode("utf-8", "replace")
                return response.status, f"HTTP {response.status}: {said}", b""
        except aiohttp.ClientConnectorError as exc:
            return UNREACHED, str(exc), b""
        except (aiohttp.ClientError, OSError, ValueError) as exc:
            return None, str(exc) or type(exc).__name__, b""


def _request_body(call: Call) -> bytes:
    return json.dumps(request_json(call)).encode()


def _reply(payload: bytes) -> Reply:
    (reply,) = parse_response(json.loads(payload))
    return reply


def wait_until_healthy(url: str, timeout: float = 60.0, interval: float = 0.1) -> dict[str, Any]:
    """Block until GET /health answers and return its body. Raises ToolServerError after `timeout` seconds."""
    address = url.rstrip("/").removesuffix("/get_observation") + "/health"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + timeout
    while True:
        try:
            with opener.open(address, timeout=max(0.5, min(5.0, deadline - time.monotonic()))) as response:
                return json.load(response)
        except (OSError, ValueError) as exc:   # URLError and HTTPError are OSErrors
            if time.monotonic() >= deadline:
                raise ToolServerError(f"{url}: not healthy within {timeout:g} s: {exc}") from exc
        time.sleep(interval)
