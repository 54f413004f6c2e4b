"""The tool server: HTTP around a `Toolbox`, and the process that runs it (`hdpo tool-server`)."""
from __future__ import annotations

import asyncio
import contextlib
import ctypes
import hmac
import json
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence

from aiohttp import web

from hdpo.errors import HdpoError, UserError
from hdpo.toolserver.lens import ROUTE as QUERY_IMAGES
from hdpo.toolserver.settings import Settings, parse_arguments
from hdpo.toolserver.tools import Toolbox, make_toolbox
from hdpo.toolserver.wire import WireError, parse_request, response_json

log = logging.getLogger(__name__)
MAX_BODY = 512 << 20
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Server:
    """HTTP handlers and the numbers they keep."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.toolbox: Toolbox
        self.open_calls = 0
        self.draining = False
        self.started = time.monotonic()

    async def lifetime(self, app: web.Application) -> AsyncIterator[None]:
        """Build the tools in the running loop; end every session when the application ends."""
        self.toolbox = make_toolbox(self.settings)
        start = getattr(self.toolbox.sandbox, "start", None)
        reaper = asyncio.create_task(self.toolbox.sessions.reap_idle())
        try:
            if start is not None:
                await start()
            yield
        finally:
            reaper.cancel()
            await self.toolbox.close()

    async def get_observation(self, request: web.Request) -> web.Response:
        """POST /get_observation: a batch of calls of the reference's format."""
        if self.draining:
            raise _refusal(web.HTTPServiceUnavailable, "the server is shutting down")
        if self.open_calls >= self.settings.max_queue:
            raise _refusal(web.HTTPTooManyRequests, f"{self.open_calls} calls are waiting")
        started = time.monotonic()
        try:
            calls = parse_request(json.loads(await request.read()))
        except WireError as exc:
            return _invalid(exc.field, exc.message)
        except (ValueError, RecursionError) as exc:
            return _invalid("body", f"not valid JSON: {exc}")
        self.open_calls += len(calls)
        try:
            answers = await asyncio.gather(*(self.toolbox.answer(call) for call in calls))
        finally:
            self.open_calls -= len(calls)
        seconds = time.monotonic() - started
        queued = max(waited for _, waited in answers)
        body = response_json([reply for reply, _ in answers], 1000 * seconds, 1000 * queued)
        return web.json_response(body, headers={"X-Process-Time": f"{seconds:.6f}"})

    async def health(self, request: web.Request) -> web.Response:
        """GET /health, with the reference's fields."""
        return web.json_response({
            "status": "draining" if self.draining else "healthy", "concurrent_requests": self.open_calls,
            "thread_pool_size": self.settings.running_cells, "active_tasks": self.open_calls,
            "max_concurrent": self.settings.max_queue, "tools": self.toolbox.tools,
            "uptime_seconds": round(time.monotonic() - self.started, 3),
            "trajectories": len(self.toolbox.sessions.trajectories)})

    async def metrics(self, request: web.Request) -> web.Response:
        """GET /metrics: Prometheus text."""
        return web.Response(text=self.toolbox.counters.text({
            "open_calls": self.open_calls, "trajectories": len(self.toolbox.sessions.trajectories),
            "python_sessions": sum(t.session_open for t in self.toolbox.sessions.trajectories.values()),
            "uptime_seconds": time.monotonic() - self.started}), content_type="text/plain")

    async def query_image(self, request: web.Request) -> web.Response:
        """GET /query-image/NAME: an image a hosted search is looking at just now."""
        showcase = self.toolbox.showcase
        data = showcase.get(request.match_info["name"]) if showcase is not None else None
        if data is None:
            raise web.HTTPNotFound
        return web.Response(body=data, content_type="image/png", headers={"Cache-Control": "no-store"})

    @web.middleware
    async def authorised(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """With a token set, everything but /health and query images, whose names are secrets themselves, needs it."""
        if self.settings.token and request.path != "/health" and not request.path.startswith(QUERY_IMAGES):
            given = request.headers.get("Authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(), self.settings.token.encode()):
                return web.json_response({"detail": "missing or wrong bearer token"}, status=401)
        return await handler(request)

    async def drained(self) -> None:
        """Refuse new calls and wait until the open ones are answered, at most `drain_s`."""
        self.draining = True
        deadline = time.monotonic() + self.settings.drain_s
        while self.open_calls and time.monotonic() < deadline:
            await asyncio.sleep(0.02)


def _refusal(kind: type[web.HTTPError], reason: str) -> web.HTTPError:
    return kind(text=json.dumps({"detail": reason}), content_type="application/json", headers={"Retry-After": "1"})


def _invalid(field: str, message: str) -> web.Response:
    detail = [{"loc": ["body", field], "msg": message, "type": "value_error"}]
    return web.json_response({"detail": detail}, status=422)


SERVER: web.AppKey[Server] = web.AppKey("server", Server)


def make_app(settings: Settings) -> web.Application:
    """The application; its tools are built when it starts and closed when it ends."""
    server = Server(settings)
    app = web.Application(client_max_size=MAX_BODY, middlewares=[server.authorised])
    app[SERVER] = server
    app.router.add_post("/get_observation", server.get_observation)
    app.router.add_get("/health", server.health)
    app.router.add_get("/metrics", server.metrics)
    app.router.add_get(QUERY_IMAGES + "{name}", server.query_image)
    app.cleanup_ctx.append(server.lifetime)
    return app


async def serve(settings: Settings) -> None:
    """Run until SIGTERM, SIGINT or the end of the parent process; then drain and clean up."""
    app = make_app(settings)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    try:
        with _watched(settings.parent_pid, loop, stop):
            await web.TCPSite(runner, settings.host, settings.port, backlog=1024).start()
            host = f"[{settings.host}]" if ":" in settings.host else settings.host
            url = f"http://{host}:{runner.addresses[0][1]}"
            log.info("%s on %s", ", ".join(app[SERVER].toolbox.tools), url)
            print(url, flush=True)
            await stop.wait()
            await app[SERVER].drained()
    finally:
        await runner.cleanup()


@contextlib.contextmanager
def _watched(pid: int, loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> Iterator[None]:
    """Set `stop` when process `pid` ends (0: nobody is watched)."""
    if not pid:
        yield
        return
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        raise UserError(f"--parent-pid {pid}: no such process") from None
    loop.add_reader(fd, stop.set)
    try:
        yield
    finally:
        loop.remove_reader(fd)
        os.close(fd)


def _hide_environment() -> None:
    """Make this process undumpable, so that others of the same user can't read its environment and memory (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the server. Returns the exit status: 2 for bad input, 1 when it could not start."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    try:
        settings = parse_arguments(argv)
        _hide_environment()
        asyncio.run(serve(settings))
    except HdpoError as exc:
        print(f"hdpo tool-server: {exc}", file=sys.stderr)
        return 2 if isinstance(exc, UserError) else 1
    except (OSError, OverflowError) as exc:      # OverflowError: no such port
        print(f"hdpo tool-server: {exc}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
