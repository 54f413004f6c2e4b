"""The server's end of sandbox sessions: a connection each, a clock, and what the two backends share."""
from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hdpo.toolserver.sandbox_frames import Conversation, FrameError, is_bounded_png
from hdpo.toolserver.sessions import CellResult, SandboxError, SessionLostError

log = logging.getLogger(__name__)
MAX_TEXT_CHARS = 70_000
MAX_IMAGES = 16
OPEN_TIMEOUT_S = 60.0
RETRY_S = 0.2
"""Pause before a second attempt at a session, long enough for the loop to learn that a template has died, seconds."""
INTERRUPT_GRACE_S = 0.45
"""Time for an interrupted cell to answer before its session is killed, seconds; subprocess.run alone takes 0.25 of it."""
ACKNOWLEDGE_S = 5.0
"""Time for a supervisor to confirm that it has interrupted, seconds."""
TOGETHER_S = 0.1
"""A template that died with its session is known to have done so within this time, seconds."""
INTERRUPT = b"i"


class SessionLink:
    """One session. Closing it, or losing this object, hangs up on the session's supervisor, which then kills it."""

    def __init__(self, control: socket.socket, talk: Conversation) -> None:
        self._control, self._talk = control, talk
        self._interrupted = False
        self.abandoned = False         # ended because nobody waited for its cell any more
        self._timer: asyncio.TimerHandle

    @classmethod
    async def open(cls, path: str, images: Sequence[bytes]) -> SessionLink:
        """Connect to a template's socket and load the images. Raises SandboxError."""
        loop = asyncio.get_running_loop()
        control, (ours, theirs) = socket.socket(socket.AF_UNIX), socket.socketpair()
        control.setblocking(False)
        talk = Conversation()
        link = cls(control, talk)
        try:
            async with asyncio.timeout(OPEN_TIMEOUT_S):
                with theirs:
                    await loop.sock_connect(control, path)
                    socket.send_fds(control, [b"o"], [theirs.fileno()])
                await loop.create_connection(lambda: talk, sock=ours)
                message, _ = await talk.ask({"op": "open"}, images)
            if message.get("status") != "ready":
                raise FrameError("no ready message")
            return link
        except BaseException as exc:
            if not talk.alive:
                ours.close()
            link.close()
            if isinstance(exc, (OSError, EOFError, FrameError)):
                raise SandboxError(f"no sandbox session: {str(exc) or type(exc).__name__}") from exc
            raise

    @property
    def alive(self) -> bool:
        return self._talk.alive

    async def run(self, code: str, timeout_s: float) -> tuple[str, CellResult]:
        """(status, result); after any status but "ok" and "interrupted" the session is gone and the link closed."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        self._interrupted = False
        self._timer = loop.call_at(deadline, self._interrupt)
        try:
            message, blobs = await self._talk.ask({"op": "run", "code": code})
            result = _result(message, blobs, self._interrupted)
            if self._interrupted:       # the signal must be behind us before another cell can begin
                async with asyncio.timeout(ACKNOWLEDGE_S):
                    await loop.sock_recv(self._control, 1)
            return "interrupted" if self._interrupted else "ok", result
        except (OSError, EOFError, FrameError):
            late = loop.time() >= deadline
            self.close()
            return "killed" if late else "died", CellResult("", "", (), ok=False, restarted=True, timed_out=late)
        except asyncio.CancelledError:   # nobody waits for this cell any more, and no later cell may get its answer
            self.abandoned = True
            self.close()
            raise
        finally:
            self._timer.cancel()

    def _interrupt(self) -> None:
        if self._talk.asking:      # a loop that is late finds the answer and the deadline at the same time
            self._interrupted = True
            self._timer = asyncio.get_running_loop().call_later(INTERRUPT_GRACE_S, self._kill)
            with contextlib.suppress(OSError):    # a supervisor that is gone has taken the session with it
                self._control.send(INTERRUPT)

    def _kill(self) -> None:
        if self._talk.asking:
            self.close()

    def close(self) -> None:
        self._control.close()
        self._talk.close()


def _result(message: dict[str, Any], blobs: list[bytes], interrupted: bool) -> CellResult:
    stdout, stderr = (_text(message.get(name)) for name in ("stdout", "stderr"))
    images = tuple(blob for blob in blobs[:MAX_IMAGES] if is_bounded_png(blob))
    ok = message.get("ok") is True and not interrupted
    return CellResult(stdout, stderr, images, ok=ok, restarted=False, timed_out=interrupted)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise FrameError("output is not a string")
    return value[:MAX_TEXT_CHARS].encode("utf-8", "replace").decode("utf-8")   # lone surrogates can't travel as JSON


def socket_folder() -> Path:
    """A new folder for a template's socket. Folders that killed servers left behind are removed on the way."""
    prefix = "hdpo-sandbox-"
    for old in Path(tempfile.gettempdir()).glob(f"{prefix}*-*"):
        pid = old.name.removeprefix(prefix).split("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(old, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-"))


@dataclass(slots=True)
class Template:
    """A warm process that forks sessions. It ends with the connection that is its lifeline, and that with it."""

    folder: Path
    reader: asyncio.StreamReader
    lifeline: asyncio.StreamWriter
    controls: list[str]

    @property
    def socket(self) -> str:
        """Path at which it listens."""
        return str(self.folder / "socket")

    @property
    def ended(self) -> bool:
        return self.reader.at_eof() or self.lifeline.is_closing()

    async def ended_too(self) -> bool:
        """Whether it has ended together with one of its sessions, whose end was noticed just now."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + TOGETHER_S
        while not self.ended and loop.time() < deadline:
            await asyncio.sleep(0.005)
        return self.ended


@dataclass(slots=True)
class Session:
    """A trajectory's images and its present connection, None before the first and after it was given up."""

    images: list[bytes]
    link: SessionLink | None = None
    template: Template | None = None     # of the connection

    async def give_up(self) -> None:
        """Forget a connection that ended. Raises SessionLostError unless the session's own code can have ended it."""
        link, template = self.link, self.template
        assert link is not None and template is not None
        self.link = None
        link.close()
        if link.abandoned:
            raise SessionLostError("its last cell took longer than the server waits")
        if await template.ended_too():
            raise SessionLostError("its sandbox died")


class SessionPool:
    """Sessions over templates that listen on unix sockets: what the backends share.

    Implements `hdpo.toolserver.sessions.Sandbox`; a backend provides live templates.
    """

    def __init__(self) -> None:
        self._sessions: dict[str, Session] = {}

    async def _template_for(self, session_id: str) -> Template:
        """A live template, started if necessary. Raises SandboxError."""
        raise NotImplementedError

    def _open_failed(self, session_id: str) -> None:
        """The template for this session did not give one."""

    async def open(self, session_id: str, images: list[bytes]) -> None:
        """Start a session. Raises SandboxError when a second attempt fails too."""
        self._sessions[session_id] = Session(images)
        await self._linked(session_id)

    async def _linked(self, session_id: str) -> SessionLink:
        session = self._sessions[session_id]
        if session.link is None:
            session.template, session.link = await self._connect(session_id, session.images)
            if self._sessions.get(session_id) is not session:   # closed while it was being opened
                session.link.close()
        return session.link

    async def _connect(self, session_id: str, images: Sequence[bytes]) -> tuple[Template, SessionLink]:
        try:
            template = await self._template_for(session_id)
            return template, await SessionLink.open(template.socket, images)
        except SandboxError as exc:   # the template may just have died: `_template_for` replaces it
            self._open_failed(session_id)
            log.warning("%s; trying once more", exc)
            await asyncio.sleep(RETRY_S)
            template = await self._template_for(session_id)
            return template, await SessionLink.open(template.socket, images)

    async def run(self, session_id: str, code: str, timeout_s: float) -> CellResult:
        """Execute one cell; see the protocol."""
        session = self._sessions.get(session_id)
        if session is None:
            raise SandboxError("the session was closed")
        ended_before = session.link is not None and not session.link.alive
        if ended_before:
            await session.give_up()
        status, result = await (await self._linked(session_id)).run(code, timeout_s)
        if status == "died" and session_id in self._sessions:     # not closed in the meantime
            await session.give_up()
        elif status in ("died", "killed"):
            session.link = None
        return replace(result, restarted=result.restarted or ended_before)

    async def close(self, session_id: str) -> None:
        session = self._sessions.pop(session_id, None)
        if session is not None and session.link is not None:
            session.link.close()

    async def shutdown(self) -> None:
        for session_id in list(self._sessions):
            await self.close(session_id)
