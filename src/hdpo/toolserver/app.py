"""The tool server: HTTP around a `Toolbox`, and the process that runs it (`hdpo tool-server`)."""
from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

from aiohttp import web

from hdpo.descriptors import check_limit, raise_limit
from hdpo.errors import HdpoError, UserError
from hdpo.keys import hide
from hdpo.toolserver.door import Door, answered, invalid
from hdpo.toolserver.front import Front
from hdpo.toolserver.gate import unpacked
from hdpo.toolserver.journal import open_journal
from hdpo.toolserver.lens import ROUTE as QUERY_IMAGES
from hdpo.toolserver.owner import OwnedFolder, reap_folders
from hdpo.toolserver.picture_store import PictureStore
from hdpo.toolserver.process import NotStarted
from hdpo.toolserver.repeats import Counting
from hdpo.toolserver.settings import Settings, parse_arguments
from hdpo.toolserver.token import VARIABLE, forget_token, leave_token, token_file
from hdpo.toolserver.tools import Toolbox, make_toolbox
from hdpo.toolserver.wire import JSON, RAW, WireError, parse_request, response_body

log = logging.getLogger(__name__)
MAX_BODY = 512 << 20
MAPPED_BYTES = 1 << 18
"""Size from which memory that is freed goes back to the system at once."""


class Server(Door):
    """Has the tools, and the sessions."""

    toolbox: Toolbox

    async def lifetime(self, app: web.Application) -> AsyncIterator[None]:
        folder = None
        if not self.settings.pictures:
            reap_folders("pictures")
            folder = OwnedFolder("pictures")
        place = Path(self.settings.pictures) if folder is None else folder.path
        self.pictures = PictureStore(place, self.settings.picture_store_mib << 20)
        self.toolbox = make_toolbox(self.settings, self.pictures)
        self.tools = self.toolbox.tools
        start = getattr(self.toolbox.sandbox, "start", None)
        reaper = asyncio.create_task(self.toolbox.sessions.reap_idle())
        try:
            if start is not None:
                await start()
            yield
        finally:
            reaper.cancel()
            await self.toolbox.close()
            self.pictures.close()
            if folder is not None:
                folder.remove()

    @contextlib.contextmanager
    def journal(self) -> Iterator[None]:
        with open_journal(self.settings.behind or str(self.port)) as self.toolbox.sessions.journal:
            yield

    async def get_observation(self, request: web.Request) -> web.StreamResponse:
        self.check_room()
        started = time.monotonic()
        try:
            calls = parse_request(json.loads(unpacked(request, await request.read())))
        except WireError as exc:
            return invalid(exc.field, exc.message)
        except (ValueError, RecursionError) as exc:
            return invalid("body", f"not valid JSON: {exc}")
        self.open_calls += len(calls)
        try:
            answers = await asyncio.gather(*(self.toolbox.answer(call) for call in calls))
        finally:
            self.open_calls -= len(calls)
        seconds = time.monotonic() - started
        queued, replies = max(waited for _, waited in answers), [reply for reply, _ in answers]
        raw = RAW in request.headers.get("Accept", "")
        if any(reply.images for reply in replies):      # to be read and encoded
            body = await asyncio.to_thread(response_body, replies, 1000 * seconds, 1000 * queued, raw)
        else:
            body = response_body(replies, 1000 * seconds, 1000 * queued, raw)
        return await answered(request, body, {"X-Process-Time": f"{seconds:.6f}", "Content-Type": RAW if raw else JSON})

    async def live(self) -> int:
        return len(self.toolbox.sessions.trajectories)

    async def metrics(self, request: web.Request) -> web.Response:
        return web.Response(text=self.toolbox.counters.text({
            "open_calls": self.open_calls, "trajectories": await self.live(),
            "python_sessions": sum(t.session_open for t in self.toolbox.sessions.trajectories.values()),
            "uptime_seconds": time.monotonic() - self.started}), content_type="text/plain")

    async def query_image(self, request: web.Request) -> web.Response:
        showcase = self.toolbox.showcase
        data = showcase.get(request.match_info["name"]) if showcase is not None else None
        if data is None:
            raise web.HTTPNotFound
        return web.Response(body=data, content_type="image/png", headers={"Cache-Control": "no-store"})


SERVER: web.AppKey[Door] = web.AppKey("server", Door)


def make_app(settings: Settings) -> web.Application:
    """The application; its tools are built when it starts and closed when it ends."""
    server: Door = Front(settings) if settings.processes > 1 else Server(settings)
    app = web.Application(client_max_size=MAX_BODY, middlewares=[server.guarded])
    app[SERVER] = server
    app.router.add_post("/get_observation", server.get_observation)
    app.router.add_put("/images/{key}", server.put_image)
    app.router.add_get("/health", server.health)
    app.router.add_get("/metrics", server.metrics)
    app.router.add_get(QUERY_IMAGES + "{name}", server.query_image)
    app.cleanup_ctx.append(server.lifetime)
    return app


async def serve(settings: Settings) -> None:
    """Run until SIGTERM, SIGINT or the end of the parent process; then drain and clean up."""
    app = make_app(settings)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0, auto_decompress=False)      # see gate.unpacked
    listener = _bound(settings)
    app[SERVER].port = listener.getsockname()[1]
    await runner.setup()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    try:
        with _watched(settings.parent_pid, loop, stop):
            port = app[SERVER].port
            with _token(app[SERVER], port), app[SERVER].journal():
                await _accept(runner, listener)
                host = f"[{settings.host}]" if ":" in settings.host else settings.host
                url = f"http://{host}:{port}"
                log.info("%s on %s", ", ".join(app[SERVER].tools), url)
                print(url, flush=True)
                await stop.wait()
                await app[SERVER].drained()
    finally:
        await runner.cleanup()


def _bound(settings: Settings) -> socket.socket:
    """The address, at which nobody is answered yet."""
    listener = socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((settings.host, settings.port))
    return listener


async def _accept(runner: web.AppRunner, listener: socket.socket) -> None:
    """Connections one at a time: where files have run out, asyncio tries each of `backlog` again a second later, and for each
    of those tries again `backlog` times."""
    await web.SockSite(runner, listener, backlog=1).start()
    listener.listen(1024)


@contextlib.contextmanager
def _token(server: Door, port: int) -> Iterator[None]:
    """A server that was given no token has one of its own while it runs. Raises UserError where it can't be left."""
    if server.token or server.settings.no_token:
        yield
        return
    try:
        server.token = leave_token(port)
    except OSError as exc:
        raise UserError(f"no place for this server's token ({exc}): set {VARIABLE}, or --no-token") from None
    log.info("clients of this user find the token in %s; others need it in %s", token_file(port), VARIABLE)
    try:
        yield
    finally:
        forget_token(port)


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


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the server. Returns the exit status: 2 for bad input, 1 when it could not start."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", handlers=[Counting(sys.stderr)])
    try:
        settings = parse_arguments(argv)
        raise_limit()
        log.info("open files: %s", check_limit(settings.trajectories))
        hide()
        give_memory_back()
        asyncio.run(serve(settings))
    except NotStarted as exc:      # one of its own processes, which has said why
        return exc.status
    except HdpoError as exc:
        print(f"hdpo tool-server: {exc}", file=sys.stderr)
        return 2 if isinstance(exc, UserError) else 1
    except (OSError, OverflowError) as exc:      # OverflowError: no such port
        print(f"hdpo tool-server: {exc}", file=sys.stderr)
        return 1
    return 0


def give_memory_back() -> None:
    """Bytes of pictures are mapped one by one, so that they go back to the system when they are freed (glibc)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(-3, MAPPED_BYTES)      # M_MMAP_THRESHOLD, which would grow with what is freed else


if __name__ == "__main__":
    sys.exit(main())
