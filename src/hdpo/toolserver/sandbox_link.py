"""The server's end of sandbox sessions: framed messages over a unix socket (format: sandbox/frames.py).

Whatever answers at the other end may be the model's code, so every length, every JSON value and every image header is
checked here before it is used.
"""
from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import struct
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hdpo.toolserver.sessions import CellResult, SandboxError

log = logging.getLogger(__name__)
HEADER = struct.Struct(">II")
MAX_JSON, MAX_BLOBS = 4 << 20, 64 << 20
MAX_TEXT_CHARS = 70_000
MAX_IMAGES = 16
MAX_IMAGE_PIXELS = 4096 * 4096
OPEN_TIMEOUT_S = 60.0
RETRY_S = 0.2
"""Pause before a second attempt at a session, long enough for the loop to learn that a template has died, seconds."""
KILL_MARGIN_S = 5.0
"""Time beyond a cell's limit after which the supervisor itself is considered lost, seconds."""
_PNG = b"\x89PNG\r\n\x1a\n"


class FrameError(Exception):
    """The other end broke the protocol."""


def pack(message: dict[str, Any], blobs: Sequence[bytes] = ()) -> list[bytes]:
    text = json.dumps({**message, "blobs": [len(blob) for blob in blobs]}).encode()
    return [HEADER.pack(len(text), sum(map(len, blobs))) + text, *blobs]


async def read_frame(reader: asyncio.StreamReader) -> tuple[dict[str, Any], list[bytes]]:
    """One frame of an untrusted peer. Raises FrameError, or IncompleteReadError when it hung up."""
    json_size, blob_size = HEADER.unpack(await reader.readexactly(HEADER.size))
    if json_size > MAX_JSON or blob_size > MAX_BLOBS:
        raise FrameError(f"frame of {json_size} + {blob_size} bytes")
    text = await reader.readexactly(json_size)
    payload = await reader.readexactly(blob_size)
    try:
        message = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise FrameError(f"not JSON: {exc}") from None
    lengths = message.get("blobs") if isinstance(message, dict) else None
    if not isinstance(lengths, list) or not all(type(n) is int and n >= 0 for n in lengths) or sum(lengths) != blob_size:
        raise FrameError("blob lengths do not add up")
    blobs, start = [], 0
    for length in lengths:
        blobs.append(payload[start:start + length])
        start += length
    return message, blobs


def is_bounded_png(data: bytes) -> bool:
    """Whether it starts as a PNG whose header announces an acceptable size."""
    if len(data) < 33 or data[:8] != _PNG or data[12:16] != b"IHDR":
        return False
    width, height = struct.unpack(">II", data[16:24])
    return 0 < width * height <= MAX_IMAGE_PIXELS


class SessionLink:
    """One session. Closing the connection kills it, so losing this object can't leak processes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def open(cls, path: str, images: Sequence[bytes]) -> SessionLink:
        """Connect to a template's socket and load the images. Raises SandboxError."""
        writer = None
        try:
            async with asyncio.timeout(OPEN_TIMEOUT_S):
                reader, writer = await asyncio.open_unix_connection(path, limit=1 << 20)
                link = cls(reader, writer)
                await link._send({"op": "open"}, images)
                message, _ = await read_frame(reader)
            if message.get("status") != "ready":
                raise FrameError("no ready message")
            return link
        except (OSError, EOFError, FrameError) as exc:
            if writer is not None:
                writer.close()
            raise SandboxError(f"no sandbox session: {str(exc) or type(exc).__name__}") from exc

    @property
    def alive(self) -> bool:
        return not (self._reader.at_eof() or self._writer.is_closing())

    async def run(self, code: str, timeout_s: float) -> tuple[str, CellResult]:
        """(status, result); after any status but "ok" and "interrupted" the session is gone and the link closed."""
        try:
            async with asyncio.timeout(timeout_s + KILL_MARGIN_S):
                await self._send({"op": "run", "code": code, "timeout": timeout_s})
                verdict, _ = await read_frame(self._reader)
                status = str(verdict.get("status"))
                if status in ("ok", "interrupted"):
                    message, blobs = await read_frame(self._reader)
                    return status, _result(message, blobs, status == "interrupted")
        except TimeoutError:
            status = "killed"
        except (OSError, EOFError, FrameError):
            status = "died"
        self.close()
        return status, CellResult("", "", (), ok=False, restarted=True, timed_out=status == "killed")

    def close(self) -> None:
        self._writer.close()

    async def _send(self, message: dict[str, Any], blobs: Sequence[bytes] = ()) -> None:
        self._writer.writelines(pack(message, blobs))
        await self._writer.drain()


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
class Session:
    """A trajectory's images and its present connection; None after its session was lost."""

    images: list[bytes]
    link: SessionLink | None


class SessionPool:
    """Sessions over templates that listen on unix sockets: what the backends share.

    Implements `hdpo.toolserver.sessions.Sandbox`; a backend says where live templates listen.
    """

    def __init__(self) -> None:
        self._sessions: dict[str, Session] = {}

    async def _socket_for(self, session_id: str) -> str:
        """Path of a live template's socket, started if necessary. Raises SandboxError."""
        raise NotImplementedError

    def _open_failed(self, session_id: str) -> None:
        """The template of this session's socket did not give a session."""

    async def open(self, session_id: str, images: list[bytes]) -> None:
        """Start a session. Raises SandboxError when a second attempt fails too."""
        self._sessions[session_id] = Session(images, None)
        await self._linked(session_id)

    async def _linked(self, session_id: str) -> SessionLink:
        session = self._sessions[session_id]
        if session.link is None:
            session.link = await self._connect(session_id, session.images)
            if self._sessions.get(session_id) is not session:   # closed while it was being opened
                session.link.close()
        return session.link

    async def _connect(self, session_id: str, images: Sequence[bytes]) -> SessionLink:
        try:
            return await SessionLink.open(await self._socket_for(session_id), images)
        except SandboxError as exc:   # the template may just have died: `_socket_for` replaces it
            self._open_failed(session_id)
            log.warning("%s; trying once more", exc)
            await asyncio.sleep(RETRY_S)
            return await SessionLink.open(await self._socket_for(session_id), images)

    async def run(self, session_id: str, code: str, timeout_s: float) -> CellResult:
        """Execute one cell; see the protocol."""
        session = self._sessions.get(session_id)
        if session is None:
            raise SandboxError("the session was closed")
        lost_before = session.link is not None and not session.link.alive
        if lost_before:
            session.link = None
        status, result = await (await self._linked(session_id)).run(code, timeout_s)
        if status not in ("ok", "interrupted"):
            session.link = None
        if lost_before:
            return CellResult(result.stdout, result.stderr, result.images, result.ok, True, result.timed_out)
        return result

    async def close(self, session_id: str) -> None:
        session = self._sessions.pop(session_id, None)
        if session is not None and session.link is not None:
            session.link.close()

    async def shutdown(self) -> None:
        for session_id in list(self._sessions):
            await self.close(session_id)
