"""Several server processes behind one address: a trajectory's calls go to the process that its id chooses, always the same.

    client -> front -> process 0 .. N-1, each with its own sessions
                   \\-> pictures, in a folder that all of them share

The front asks for the token, keeps pictures, and passes calls on as they are. A process that dies is started again at its own
address; what it held is lost as with a server that is restarted (sessions.py), the trajectories of the others don't notice.
"""
from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import math
import os
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any

import aiohttp
from aiohttp import web

from hdpo.toolserver.door import Door, answered, invalid, refusal
from hdpo.toolserver.gate import unpacked
from hdpo.toolserver.owner import OwnedFolder, reap_folders
from hdpo.toolserver.picture_store import PictureStore
from hdpo.toolserver.process import KeptToolServer
from hdpo.toolserver.settings import Settings
from hdpo.toolserver.wire import JSON, MAX_BATCH, RAW, Reply, parse_response, response_body

log = logging.getLogger(__name__)
UNEVEN = 1.3
"""How many more trajectories than the mean a process may come to have."""
ASK_S = 5.0
"""For a process to say how it is."""
Body = dict[str, Any]


def place_of(trajectory_id: str, processes: int) -> int:
    """The process of a trajectory (rendezvous hashing): with one process more, only those move that move to it."""
    return max(range(processes), key=lambda number: hashlib.blake2b(
        f"{number} {trajectory_id}".encode("utf-8", "surrogatepass"), digest_size=8).digest())


class Front(Door):
    """See the module's docstring."""

    folder: OwnedFolder
    processes: list[KeptToolServer]
    session: aiohttp.ClientSession

    async def lifetime(self, app: web.Application) -> AsyncIterator[None]:
        """Raises ToolServerError where a process does not start; it has said why itself."""
        reap_folders("pictures")
        self.folder = OwnedFolder("pictures")
        self.pictures = PictureStore(self.folder.path, self.settings.picture_store_mib << 20)
        self.processes = []
        self.session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(None),
                                             auto_decompress=False)
        try:
            for numbers in ([0], range(1, self.settings.processes)):      # what keeps one from starting keeps all
                self.processes += await asyncio.gather(*(asyncio.to_thread(self._start, number) for number in numbers))
            async with self.session.get(self.processes[0].url + "/health") as response:
                self.tools = (await response.json())["tools"]
            yield
        finally:
            await self.session.close()
            await asyncio.gather(*(asyncio.to_thread(process.stop) for process in self.processes))
            self.folder.remove()

    def _start(self, number: int) -> KeptToolServer:
        return KeptToolServer([*self.settings.given, *own_options(self.settings), "--behind", f"{self.port}.{number}",
                               "--pictures", str(self.folder.path), "--parent-pid", str(os.getpid())], None)

    async def get_observation(self, request: web.Request) -> web.StreamResponse:
        self.check_room()
        started = time.monotonic()
        raw = unpacked(request, await request.read())
        try:
            body = json.loads(raw)
        except (ValueError, RecursionError) as exc:
            return invalid("body", f"not valid JSON: {exc}")
        parts, calls = parts_of(body, len(self.processes)), len(rows_of(body) or [0])
        self.open_calls += calls
        try:
            if len(parts) == 1:
                return await self._passed_on(request, next(iter(parts)), raw)
            accept_raw = RAW in request.headers.get("Accept", "")
            found = await asyncio.gather(*(self._replies(place, part) for place, (part, _) in parts.items()))
        finally:
            self.open_calls -= calls
        replies: list[Reply] = [Reply("")] * calls
        for (_, rows), some in zip(parts.values(), found, strict=True):
            for row, reply in zip(rows, some, strict=True):
                replies[row] = reply
        seconds = time.monotonic() - started
        answer = await asyncio.to_thread(response_body, replies, 1000 * seconds, 0.0, accept_raw)
        return await answered(request, answer, {"X-Process-Time": f"{seconds:.6f}", "Content-Type": RAW if accept_raw else JSON})

    async def _passed_on(self, request: web.Request, place: int, body: bytes) -> web.StreamResponse:
        """One process's own answer, whatever it is."""
        try:
            status, headers, answer = await self._ask(place, body, request.headers.get("Accept", JSON))
        except aiohttp.ClientConnectorError as exc:      # it is being started again, and has executed nothing
            raise refusal(web.HTTPServiceUnavailable, f"process {place} is starting: {exc}") from None
        except (aiohttp.ClientError, OSError) as exc:
            raise refusal(web.HTTPBadGateway, f"process {place} broke off: {exc or type(exc).__name__}") from None
        kept = {name: headers[name] for name in ("Content-Type", "X-Process-Time", "Retry-After") if name in headers}
        return await answered(request, answer, kept) if status == 200 else web.Response(status=status, body=answer, headers=kept)

    async def _replies(self, place: int, part: Body) -> list[Reply]:
        """A part of a batch: where its process fails, its own calls do, and not the batch."""
        count = len(part["trajectory_ids"])
        try:
            status, _, answer = await self._ask(place, json.dumps(part).encode(), f"{RAW}, {JSON}")
            if status == 200:
                return parse_response(answer)
            problem = f"HTTP {status}: {answer[:500].decode('utf-8', 'replace')}"
        except (aiohttp.ClientError, OSError, ValueError) as exc:
            problem = str(exc) or type(exc).__name__
        log.warning("process %d failed a part of a batch: %s", place, problem)
        return [Reply(f"Tool unavailable: {problem}", valid=False, infrastructure=True)] * count

    async def _ask(self, place: int, body: bytes, accept: str) -> tuple[int, Mapping[str, str], bytes]:
        process = self.processes[place]
        headers = {"Authorization": f"Bearer {process.token}", "Content-Type": JSON, "Accept": accept}
        async with self.session.post(process.url + "/get_observation", data=body, headers=headers) as response:
            return response.status, response.headers, await response.read()

    async def metrics(self, request: web.Request) -> web.Response:
        texts = [body.decode() for body in await self._all("/metrics")]
        own = {"hdpo_tool_open_calls": float(self.open_calls), "hdpo_tool_uptime_seconds": time.monotonic() - self.started}
        return web.Response(text=summed(texts, own), content_type="text/plain")

    async def query_image(self, request: web.Request) -> web.Response:
        found = await self._all(request.path)
        if not found:
            raise web.HTTPNotFound
        return web.Response(body=found[0], content_type="image/png", headers={"Cache-Control": "no-store"})

    async def live(self) -> int:
        return sum(json.loads(body)["trajectories"] for body in await self._all("/health"))

    async def _all(self, path: str) -> list[bytes]:
        """What those processes answer that do, with 200."""
        async def ask(process: KeptToolServer) -> bytes | None:
            try:
                async with asyncio.timeout(ASK_S), self.session.get(
                        process.url + path, headers={"Authorization": f"Bearer {process.token}"}) as response:
                    return await response.read() if response.status == 200 else None
            except (aiohttp.ClientError, OSError):      # TimeoutError is one
                return None
        return [body for body in await asyncio.gather(*map(ask, self.processes)) if body is not None]


def own_options(settings: Settings) -> list[str]:
    """What one of the processes is told differently: its share of what is counted per server."""
    count = settings.processes
    return ["--host", "127.0.0.1", "--port", "0", "--processes", "1",
            "--workers", str(max(1, settings.running_cells // count)), "--search-rate", str(settings.search_rate / count),
            "--trajectories", str(math.ceil(UNEVEN * settings.trajectories / count))]


def rows_of(body: Any) -> list[str] | None:
    """The trajectory ids of a request, None where they are none that could be told apart."""
    ids = body.get("trajectory_ids") if isinstance(body, dict) else None
    good = isinstance(ids, list) and 0 < len(ids) <= MAX_BATCH and all(isinstance(one, str) for one in ids)
    return ids if good else None


def parts_of(body: Any, processes: int) -> dict[int, tuple[Body, list[int]]]:
    """By process, its rows of a request and their numbers. A request that is none goes whole to the first, which says why."""
    ids = rows_of(body)
    columns = [value for value in body.values() if isinstance(value, list)] if isinstance(body, dict) else []
    if ids is None or any(len(column) != len(ids) for column in columns):
        return {0: (body, list(range(len(ids or []))))}
    rows: dict[int, list[int]] = {}
    for number, one in enumerate(ids):
        rows.setdefault(place_of(one, processes), []).append(number)
    return {place: ({name: [value[row] for row in mine] if isinstance(value, list) else value for name, value in body.items()},
                    mine) for place, mine in rows.items()}


def summed(texts: Iterable[str], own: Mapping[str, float]) -> str:
    """Prometheus texts of all processes as one; `own` are the front's values."""
    families: dict[str, dict[str, float]] = {}
    for text in texts:
        family = ""
        for line in text.splitlines():
            if line.startswith("#"):
                family = line
                families.setdefault(family, {})
            elif line:
                name, _, value = line.rpartition(" ")
                families[family][name] = families[family].get(name, 0.0) + float(value)
    lines = []
    for family, series in families.items():
        lines += [family, *(f"{name} {own.get(name, value):g}" for name, value in series.items())]
    return "\n".join(lines) + "\n"
