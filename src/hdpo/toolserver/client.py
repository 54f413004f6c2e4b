"""The trainer's end of the tool server: `ToolClient`, a `hdpo.protocols.ToolBackend` over HTTP.

A call keeps its request id through all its attempts, so the server executes it once however often it is sent. Our own
server is told the pictures' SHA-256 and sent, as raw bytes, those that it lacks: once for all trajectories. Any other gets
them as data URLs with the first call of a trajectory. Ground truth is never sent. A python call that relies on a session
which the server has lost fails as the server's fault: executed in a fresh one, it would charge the policy for variables it
did set.
"""
from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
import urllib.request
import uuid
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import aiohttp

from hdpo import gauges, oddities, text
from hdpo.errors import ToolServerError
from hdpo.protocols import ToolResult
from hdpo.toolserver.picture_store import key_of
from hdpo.toolserver.token import token_for
from hdpo.toolserver.wire import JSON, RAW, Call, Reply, WireError, parse_response, request_json
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
UPLOADS = 5
"""Times that a server may ask for the pictures of one call: others may push them out of its store."""


@dataclass(eq=False)
class _Live:
    """What is known of a live trajectory."""

    task: Task
    keys: asyncio.Future[tuple[str, ...]]      # of its pictures; shared, so that no call may cancel it
    session: bool = False                      # the server holds a Python session for it
    python_calls: int = 0                      # executed there, as far as their answers have come
    sent: bool = False                         # a server that takes data URLs has its pictures


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
        self._live: dict[str, _Live] = {}
        self._expected: set[str] = set()      # trajectories that a former client of this run had begun
        self._of_task: WeakValueDictionary[int, _Live] = WeakValueDictionary()      # one of those that share a Task
        self._uploads: dict[str, asyncio.Future[int]] = {}                          # on their way
        self._takes_uploads: bool | None = None                                     # unknown before the first call
        self._closed = False
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="hdpo-wire")   # JSON holds the interpreter: two are no faster

    async def call(self, trajectory_id: str, action: str, task: Task) -> ToolResult:
        """Execute one action. Raises ToolServerError when no answer could be had or the server blames itself."""
        live = self._live_of(trajectory_id, task)
        call = Call(trajectory_id, action, uuid.uuid4().hex, expects_session=live.session,
                    python_calls=live.python_calls, index=task.row_index)
        started = time.monotonic()
        try:
            async with asyncio.timeout(self.timeout):
                if await self._server_takes_uploads():
                    reply = await self._with_uploads(replace(call, image_keys=await asyncio.shield(live.keys)), task)
                else:
                    reply = await self._with_images(call, live)
        except TimeoutError:
            raise ToolServerError(f"{self.url}: no answer within {self.timeout:g} s") from None
        oddities.count_reported(reply.metrics.get("oddities"))
        if reply.metrics.get("need_images"):
            raise ToolServerError(f"{self.url}: keeps asking for the images of {trajectory_id}")
        live.python_calls += "code_success" in reply.metrics
        live.session, live.sent = live.session or live.python_calls > 0, True
        gauges.note("tool/queue_wait_seconds", reply.queued_s)
        gauges.note("tool/python_sessions", sum(one.session for one in self._live.values()))
        if reply.infrastructure:
            raise ToolServerError(f"{self.url}: {reply.text}")
        metrics = {**reply.metrics, "seconds": time.monotonic() - started, "timed_out": reply.timed_out}
        ran = all(reply.metrics.get(name, True) for name in ("code_success", "search_success"))
        return ToolResult(reply.text, tuple(reply.images), ok=reply.valid and ran, done=reply.done, metrics=metrics)

    def expect(self, trajectory_id: str) -> None:
        """See `ToolBackend.expect`. The server asks for the images of a trajectory that it does not know."""
        self._expected.add(trajectory_id)

    async def finish(self, trajectory_id: str) -> None:
        """Release the trajectory's session on the server. Never raises: the server reaps idle sessions anyway."""
        self._live.pop(trajectory_id, None)
        self._expected.discard(trajectory_id)
        with contextlib.suppress(ToolServerError, TimeoutError):
            async with asyncio.timeout(FINISH_TIMEOUT_S):
                await self._post(Call(trajectory_id, "", uuid.uuid4().hex, finish=True), patient=False)

    async def close(self) -> None:
        self._closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._session is not None:
            await self._session.close()
            self._session = None

    # -- pictures ------------------------------------------------------------------------------------------------------
    def _live_of(self, trajectory_id: str, task: Task) -> _Live:
        live = self._live.get(trajectory_id)
        if live is None:
            expected = trajectory_id in self._expected
            like = self._of_task.get(id(task))
            keys = like.keys if like else asyncio.ensure_future(self._off_loop(sum(map(len, task.images)), _keys, task.images))
            live = self._live[trajectory_id] = _Live(task, keys, session=expected, sent=expected)
            self._of_task[id(task)] = live
        return live

    async def _server_takes_uploads(self) -> bool:
        if self._takes_uploads is None:
            async def health() -> tuple[int | None, str, bytes]:
                status, problem, payload = await self._attempt("GET", "/health")
                return (status, problem, payload) if status in (UNREACHED, None, *BUSY) else (200, "", payload)
            self._takes_uploads = await self._persist(health, _offers_uploads)
        return self._takes_uploads

    async def _with_images(self, call: Call, live: _Live) -> Reply:
        reply = await self._post(replace(call, images=None if live.sent else live.task.images, images_sent=live.sent))
        return await self._post(replace(call, images=live.task.images)) if reply.metrics.get("need_images") else reply

    async def _with_uploads(self, call: Call, task: Task) -> Reply:
        reply = await self._post(call)
        for _ in range(UPLOADS):
            wanted = reply.metrics.get("need_images")
            if not wanted:
                break
            by_key = dict(zip(call.image_keys or (), task.images))
            for key in wanted if isinstance(wanted, list) else by_key:
                if key not in by_key:
                    raise ToolServerError(f"{self.url}: asks for a picture that {call.trajectory_id} doesn't have")
                await self._upload(key, by_key[key])
            reply = await self._post(call)
        return reply

    async def _upload(self, key: str, data: bytes) -> None:
        """Send a picture, unless it is on its way already."""
        coming = self._uploads.get(key)
        if coming is None:
            put = self._persist(lambda: self._attempt("PUT", f"/images/{key}", data, "application/octet-stream"), len)
            coming = self._uploads[key] = asyncio.ensure_future(put)
            coming.add_done_callback(lambda done: (self._uploads.pop(key, None), done.cancelled() or done.exception()))
        await asyncio.shield(coming)

    # -- requests ------------------------------------------------------------------------------------------------------
    async def _post(self, call: Call, patient: bool = True) -> Reply:
        body = await self._off_loop(sum(map(len, call.images or ())), _request_body, call)
        return await self._persist(lambda: self._attempt("POST", "/get_observation", body, JSON), _reply, patient)

    async def _persist(self, attempt: Callable[[], Awaitable[tuple[int | None, str, bytes]]], read: Callable[[bytes], T],
                       patient: bool = True) -> T:
        """What `read` makes of the first 200 answer. Raises ToolServerError when the attempts are used up."""
        failures, waits = 0, 0
        while True:
            status, problem, payload = await attempt()
            problem = text.one_line(problem)
            if status == 200:
                try:
                    return await self._off_loop(len(payload), read, payload)
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

    async def _attempt(self, method: str, path: str, body: bytes | None = None, kind: str = JSON,
                       ) -> tuple[int | None, str, bytes]:
        """(status, UNREACHED, or None for a broken connection; what went wrong; body of a 200)."""
        if self._closed:
            raise ToolServerError(f"{self.url}: the client is closed")
        if self._session is None:
            self._session = aiohttp.ClientSession(
                headers=self._headers, connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(None))
        try:
            headers = {"Content-Type": kind, "Accept": f"{RAW}, {JSON}"}
            async with self._session.request(method, self.url + path, data=body, headers=headers) as response:
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


def _keys(images: tuple[bytes, ...]) -> tuple[str, ...]:
    return tuple(map(key_of, images))


def _offers_uploads(payload: bytes) -> bool:
    """Whether a server whose /health says this, empty for an error, is one of ours."""
    with contextlib.suppress(ValueError, RecursionError):
        said = json.loads(payload)
        return isinstance(said, dict) and said.get("uploads") is True
    return False


def _reply(payload: bytes) -> Reply:
    (reply,) = parse_response(payload)
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
