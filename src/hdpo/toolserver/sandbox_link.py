"""The server's end of sandbox sessions: a connection each, a clock, and the templates that fork them."""
from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

from hdpo import oddities, text
from hdpo.toolserver.blame import ENDED_ITSELF, NO_PROCESS
from hdpo.toolserver.cgroups import SessionGroups
from hdpo.toolserver.sandbox_frames import Conversation, FrameError, is_bounded_png, read_frame
from hdpo.toolserver.sessions import CellResult, SandboxError

MAX_TEXT_CHARS = 70_000
MAX_IMAGES = 16
OPEN_TIMEOUT_S = 60.0
INTERRUPT_GRACE_S = 0.45
"""Time for an interrupted cell to answer before its session is killed, seconds; subprocess.run alone takes 0.25 of it."""
ACKNOWLEDGE_S = 5.0
"""Time for a supervisor to confirm that it has interrupted, seconds."""
TOGETHER_S = 0.1
"""A template that died with its session is known to have done so within this time, seconds."""
EVIDENCE_S = 10.0
"""Time for a supervisor to say how its session ended, seconds. One that is there and silent has a session that hung up."""
REST_S = 0.1
"""Time after a cell at which its session is stopped until the next one, seconds."""
INTERRUPT, PAUSE, RESUME = b"i", b"p", b"c"


class SessionLink:
    """One session. Closing it, or losing this object, hangs up on the session's supervisor, which then kills it."""

    def __init__(self, control: socket.socket, talk: Conversation) -> None:
        self._control, self._talk = control, talk
        self._interrupted = False
        self._paused = False
        self._used = 0.0
        self._evidence: bytes | None = None
        self.abandoned = False         # ended because nobody waited for its cell any more
        self._timer: asyncio.TimerHandle
        self._pause_timer: asyncio.TimerHandle | None = None
        self._leave: Callable[[], None] | None = None

    @classmethod
    async def open(cls, template: Template, images: Sequence[bytes]) -> SessionLink:
        """Have a template fork a session and load the images. Raises SandboxError."""
        loop = asyncio.get_running_loop()
        (control, their_control), (ours, theirs) = socket.socketpair(), socket.socketpair()
        control.setblocking(False)
        talk = Conversation()
        link = cls(control, talk)
        try:
            async with asyncio.timeout(OPEN_TIMEOUT_S):
                with their_control, theirs:
                    link._leave = await template.fork(their_control, theirs)
                await loop.create_connection(lambda: talk, sock=ours)
                message, _ = await talk.ask({"op": "open"}, images)
            if message.get("status") != "ready":
                raise FrameError("no ready message")
            link._rest()
            return link
        except BaseException as exc:
            if not talk.alive:
                ours.close()
            why = "no process is left for it" if isinstance(exc, EOFError) and await link.evidence() == NO_PROCESS else str(exc)
            link.close()
            if isinstance(exc, (OSError, EOFError, FrameError)):
                raise SandboxError(f"no sandbox session: {why or type(exc).__name__}") from exc
            raise

    @property
    def alive(self) -> bool:
        return self._talk.alive

    async def run(self, code: str, timeout_s: float) -> tuple[str, CellResult]:
        """(status, result); after any status but "ok" and "interrupted" the session is gone and the link closed."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        self._interrupted = False
        if self._paused:
            self._order(RESUME)
            self._paused = False
        self._timer = loop.call_at(deadline, self._interrupt)
        try:
            message, blobs = await self._talk.ask({"op": "run", "code": code})
            result = _result(message, blobs, self._interrupted)
            if self._interrupted:       # the signal must be behind us before another cell can begin
                async with asyncio.timeout(ACKNOWLEDGE_S):
                    await loop.sock_recv(self._control, 1)
            return "interrupted" if self._interrupted else "ok", result
        except (OSError, EOFError, FrameError) as exc:
            late = loop.time() >= deadline
            if isinstance(exc, FrameError):      # nobody but the session's code can have said that
                self._evidence = ENDED_ITSELF
            elif not late:
                await self.evidence()
            self.close()
            return "killed" if late else "died", CellResult("", "", (), ok=False, restarted=True, timed_out=late)
        except asyncio.CancelledError:   # nobody waits for this cell any more, and no later cell may get its answer
            self.abandoned = True
            self.close()
            raise
        finally:
            self._timer.cancel()
            self._rest()

    async def evidence(self) -> bytes:
        """What the supervisor of an ended session said of its end; empty when it said nothing."""
        if self._evidence is None:
            self._evidence = b""
            try:
                async with asyncio.timeout(EVIDENCE_S):
                    while said := await asyncio.get_running_loop().sock_recv(self._control, 64):
                        self._evidence = said.replace(INTERRUPT, b"")[-1:] or self._evidence
            except TimeoutError:
                self._evidence = ENDED_ITSELF
            except OSError:      # its end was closed before it had read everything
                pass
        return self._evidence

    def _rest(self) -> None:
        """Some time after the last cell, the session is paused. One timer serves many cells."""
        loop = asyncio.get_running_loop()
        self._used = loop.time()
        if self._pause_timer is None and self._talk.alive:
            self._pause_timer = loop.call_at(self._used + REST_S, self._pause)

    def _pause(self) -> None:
        self._pause_timer = None
        due = self._used + REST_S
        if not self._talk.alive or self._talk.asking:
            return                               # the end of its cell starts the timer again
        if due > asyncio.get_running_loop().time():
            self._pause_timer = asyncio.get_running_loop().call_at(due, self._pause)
            return
        self._paused = True
        self._order(PAUSE)

    def _order(self, order: bytes) -> None:
        with contextlib.suppress(OSError):       # a supervisor that is gone has taken the session with it
            self._control.send(order)

    def _interrupt(self) -> None:
        if self._talk.asking:      # a loop that is late finds the answer and the deadline at the same time
            self._interrupted = True
            self._timer = asyncio.get_running_loop().call_later(INTERRUPT_GRACE_S, self._kill)
            self._order(INTERRUPT)

    def _kill(self) -> None:
        if self._talk.asking:
            self.close()

    def close(self) -> None:
        if self._pause_timer is not None:
            self._pause_timer.cancel()
            self._pause_timer = None
        self._control.close()
        self._talk.close()
        if self._leave is not None:
            self._leave()
            self._leave = None


def _result(message: dict[str, Any], blobs: list[bytes], interrupted: bool) -> CellResult:
    stdout, stderr = (_text(message.get(name)) for name in ("stdout", "stderr"))
    shown = blobs[:MAX_IMAGES]
    good = [place for place, blob in enumerate(shown) if is_bounded_png(blob)]
    if len(good) < len(shown):
        oddities.count("image/cell", len(shown) - len(good))
    said = message.get("opened")
    opened = frozenset(good.index(place) for place in good if isinstance(said, list) and place in said)
    ok = message.get("ok") is True and not interrupted
    return CellResult(stdout, stderr, tuple(shown[place] for place in good), ok=ok, restarted=False, timed_out=interrupted,
                      ends_with_value=message.get("ends_with_value") is True, opened=opened)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise FrameError("output is not a string")
    return text.valid(value[:MAX_TEXT_CHARS], "cell")


@dataclass(slots=True)
class Template:
    """A warm process that forks sessions. It ends with the connection that is its lifeline, and that with it."""

    reader: asyncio.StreamReader
    lifeline: asyncio.StreamWriter
    door: socket.socket                  # the lifeline again, as sockets travel by
    controls: list[str]
    alone: bool                          # nobody's code but one session's runs where the template does
    groups: SessionGroups | None         # one for each session's memory; None: its supervisor counts

    @classmethod
    async def greet(cls, conn: socket.socket, groups: SessionGroups | None = None, alone: bool = False, **more: Any) -> Self:
        """The template at the other end of a connection. Raises SandboxError when it refuses, EOFError when it ended."""
        door = conn.dup()
        reader, writer = await asyncio.open_unix_connection(sock=conn)
        try:
            message, _ = await read_frame(reader)
            if message.get("status") != "ready":
                raise SandboxError(f"{message.get('why')}")
        except BaseException:
            writer.close()
            door.close()
            raise
        return cls(reader, writer, door, [str(name) for name in message.get("controls", [])], alone, groups, **more)

    async def fork(self, control: socket.socket, data: socket.socket) -> Callable[[], None] | None:
        """Have it start a session at the other ends of these sockets; what to call when that has ended. Raises OSError when
        the template is gone."""
        if self.groups is None:
            await self._send([control.fileno(), data.fileno()])
            return None
        path, procs = self.groups.make()
        try:
            await self._send([control.fileno(), data.fileno(), procs])
        finally:
            os.close(procs)
        return functools.partial(self.groups.leave, path)

    async def _send(self, fds: list[int]) -> None:
        while True:
            try:
                socket.send_fds(self.door, [b"o"], fds)
                return
            except BlockingIOError:
                pass
            except OSError as exc:
                if exc.errno != errno.ETOOMANYREFS:      # so many are on their way already
                    raise
            await asyncio.sleep(0.01)

    def close(self) -> None:
        self.lifeline.close()
        self.door.close()

    async def forget_groups(self) -> None:
        """When it has ended."""
        if self.groups is not None:
            await asyncio.to_thread(self.groups.close)

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
