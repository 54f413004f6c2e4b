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

from hdpo import oddities
from hdpo.toolserver.blame import ENDED_ITSELF, who_ended
from hdpo.toolserver.cgroups import SessionGroups
from hdpo.toolserver.sandbox_frames import (
    PROTOCOL,
    Answer,
    Conversation,
    FrameError,
    is_bounded_png,
    pack,
    read_answer,
    read_frame,
    unpack,
)
from hdpo.toolserver.sessions import CellResult, SandboxError

MAX_TEXT_CHARS = 70_000
MAX_IMAGES = 16
OPEN_TIMEOUT_S = 60.0
INTERRUPT_GRACE_S = 0.45
"""Time for an interrupted cell to answer before its session is killed, seconds; subprocess.run alone takes 0.25 of it."""
ACKNOWLEDGE_S, ASK_AGAIN_S = 5.0, 0.05
"""Time for a supervisor to confirm that it has interrupted, and between two looks whether it has, seconds."""
LONG_S = 1.0
"""A cell that runs for longer is watched by its supervisor, which then knows at the limit whether it was starved, seconds."""
TOGETHER_S = 0.1
"""A template that died with its session is known to have done so within this time, seconds."""
EVIDENCE_S = 10.0
"""Time for a supervisor to say how its session ended, seconds. One that is there and silent has a session that hung up."""
REST_S = 0.1
"""Time after a cell at which its session is stopped until the next one, seconds."""
INTERRUPT, PAUSE, RESUME, WATCH = b"i", b"p", b"c", b"w"
ORDERS = b"is"
"""What a supervisor says while its session lives: acknowledgements."""


class SessionLink:
    """One session. Closing it, or losing this object, hangs up on the session's supervisor, which then kills it."""

    def __init__(self, control: socket.socket, talk: Conversation) -> None:
        self._control, self._talk = control, talk
        self._paused = self._running = self._long = self._interrupted = False
        self._used = 0.0                       # when the last cell ended; of the present one:
        self._long_from = self._deadline = self._patience = 0.0
        self.said: bytes | None = None         # the supervisor's word at the interrupt; empty when it hung up instead
        self._evidence: bytes | None = None
        self.abandoned = False         # ended because nobody waited for its cell any more
        self._timer: asyncio.TimerHandle | None = None
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
                message, _ = unpack(*await talk.ask(pack({"op": "open"}, images), images))
            if message.get("status") != "ready":
                raise FrameError("no ready message")
            link._rest()
            return link
        except BaseException as exc:
            if not talk.alive:
                ours.close()
            why = who_ended(await link.evidence())[1] if isinstance(exc, EOFError) else str(exc) or type(exc).__name__
            link.close()
            if isinstance(exc, (OSError, EOFError, FrameError)):
                raise SandboxError(f"no sandbox session: {why or 'its set-up failed'}") from exc
            raise

    @property
    def alive(self) -> bool:
        return self._talk.alive

    async def run(self, code: str, timeout_s: float) -> tuple[str, CellResult]:
        """(status, result); after any status but "ok" and "interrupted" the session is gone and the link closed."""
        now = asyncio.get_running_loop().time()
        self._long_from, self._deadline = now + LONG_S, now + timeout_s
        self._running, self._long, self._interrupted, self.said = True, False, False, None
        if self._paused:
            self._order(RESUME)
            self._paused = False
        self._wake_at(min(self._long_from, self._deadline))
        try:
            result = _result(read_answer(*await self._talk.ask(code.encode("utf-8", "surrogatepass"))), self._interrupted)
            if self._interrupted:       # the signal must be behind us before another cell can begin
                await self._acknowledged()
            return "interrupted" if self._interrupted else "ok", result
        except (OSError, EOFError, FrameError) as exc:
            late = asyncio.get_running_loop().time() >= self._deadline
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
            self._running = False
            self._rest()

    async def _acknowledged(self) -> None:
        """Raises OSError when the supervisor doesn't say that it has interrupted."""
        if self.said is None:
            async with asyncio.timeout(ACKNOWLEDGE_S):
                self.said = await asyncio.get_running_loop().sock_recv(self._control, 1)

    async def evidence(self) -> bytes:
        """What the supervisor of an ended session said of its end; empty when it said nothing."""
        if self._evidence is None:
            self._evidence = b""
            try:
                async with asyncio.timeout(EVIDENCE_S):
                    while said := await asyncio.get_running_loop().sock_recv(self._control, 64):
                        self._evidence = said.strip(ORDERS)[-1:] or self._evidence
            except TimeoutError:
                self._evidence = ENDED_ITSELF
            except OSError:      # its end was closed before it had read everything
                pass
        return self._evidence

    # -- the clock: one timer serves many cells, and comes late rather than being set anew ----------------------------
    def _rest(self) -> None:
        """Some time after the last cell, the session is paused."""
        self._used = asyncio.get_running_loop().time()
        self._wake_at(self._used + REST_S)

    def _wake_at(self, when: float) -> None:
        """Look at the time then, or before."""
        if self._timer is not None:
            if self._timer.when() <= when:
                return
            self._timer.cancel()
        if self._talk.alive:
            self._timer = asyncio.get_running_loop().call_at(when, self._look)

    def _look(self) -> None:
        """Do what is due; a loop that is late finds an answer and its deadline at the same time."""
        self._timer = None
        now = asyncio.get_running_loop().time()
        if self._talk.asking:
            self._wake_at(self._hurry(now))
        elif self._running or self._paused:      # the end of its cell will wake this again
            pass
        elif now < self._used + REST_S:
            self._wake_at(self._used + REST_S)
        else:
            self._paused = True
            self._order(PAUSE)

    def _hurry(self, now: float) -> float:
        """With a running cell; when to look again. It is killed when it doesn't answer to an interrupt that it was sent."""
        if now < min(self._long_from, self._deadline):
            return min(self._long_from, self._deadline)
        if now < self._deadline:
            if not self._long:
                self._long = True
                self._order(WATCH)
            return self._deadline
        if not self._interrupted:
            self._interrupted, self._patience = True, now + INTERRUPT_GRACE_S
            self._order(INTERRUPT)
            return self._patience
        if self.said is None and (said := self._heard()) is not None:
            self.said = said
        if self.said is None and now < self._deadline + ACKNOWLEDGE_S:
            self._patience = now + ASK_AGAIN_S + INTERRUPT_GRACE_S
            return now + ASK_AGAIN_S
        if now >= self._patience:
            self.close()
        return self._patience

    def _heard(self) -> bytes | None:
        """What the supervisor has said; None for nothing yet, empty when it is gone."""
        try:
            return self._control.recv(1)
        except BlockingIOError:
            return None
        except OSError:
            return b""

    def _order(self, order: bytes) -> None:
        with contextlib.suppress(OSError):       # a supervisor that is gone has taken the session with it
            self._control.send(order)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._control.close()
        self._talk.close()
        if self._leave is not None:
            self._leave()
            self._leave = None


def _result(answer: Answer, interrupted: bool) -> CellResult:
    shown = answer.images[:MAX_IMAGES]
    good = [place for place, blob in enumerate(shown) if is_bounded_png(blob)]
    if len(good) < len(shown):
        oddities.count("image/cell", len(shown) - len(good))
    opened = frozenset(number for number, place in enumerate(good) if answer.opened >> place & 1)
    stdout, stderr = answer.stdout[:MAX_TEXT_CHARS], answer.stderr[:MAX_TEXT_CHARS]
    return CellResult(stdout, stderr, tuple(shown[place] for place in good), ok=answer.ok and not interrupted, restarted=False,
                      timed_out=interrupted, ends_with_value=answer.ends_with_value, opened=opened)


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
            if message.get("protocol") != PROTOCOL:
                raise SandboxError("its sandbox/ is of another version of hdpo; build the image again with `make sandbox`")
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
