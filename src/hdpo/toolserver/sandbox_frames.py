"""Frames between the server and a session (format: sandbox/frames.py), read as what they are: a stranger's.

Whatever answers at the other end may be the model's code, so every length, every JSON value and every image header is
checked here before it is used.
"""
from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

HEADER, ANSWER = struct.Struct(">II"), struct.Struct(">BIII")
PROTOCOL = 2
OK, ENDS_WITH_VALUE = 1, 2
MAX_TEXT, MAX_BLOBS = 4 << 20, 64 << 20
MAX_IMAGES = 64
"""In an answer, kept or not."""
MAX_IMAGE_PIXELS = 4096 * 4096
_PNG = b"\x89PNG\r\n\x1a\n"


class FrameError(Exception):
    """The other end broke the protocol."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a session says of a cell. `opened` has a bit for each image that was opened."""

    stdout: str
    stderr: str
    images: list[bytes]
    ok: bool
    ends_with_value: bool
    opened: int


def pack(message: dict[str, Any], blobs: Sequence[bytes] = ()) -> bytes:
    """The text of a frame with a JSON object."""
    return json.dumps({**message, "blobs": [len(blob) for blob in blobs]}).encode()


def read_answer(text: bytes, payload: bytes) -> Answer:
    """Raises FrameError."""
    if len(text) < ANSWER.size:
        raise FrameError("no answer")
    flags, opened, stdout, images = ANSWER.unpack_from(text)
    middle = ANSWER.size + 4 * images
    if images > MAX_IMAGES or middle + stdout > len(text):
        raise FrameError("an answer's lengths do not add up")
    lengths = struct.unpack_from(f">{images}I", text, ANSWER.size)
    if flags & ~(OK | ENDS_WITH_VALUE) or sum(lengths) != len(payload):
        raise FrameError("an answer's images do not add up")
    stderr = text[middle + stdout:].decode("utf-8", "replace")
    return Answer(text[middle:middle + stdout].decode("utf-8", "replace"), stderr, _cut(payload, lengths), bool(flags & OK),
                  bool(flags & ENDS_WITH_VALUE), opened)


async def read_frame(reader: asyncio.StreamReader) -> tuple[dict[str, Any], list[bytes]]:
    """One frame of an untrusted peer. Raises FrameError, or IncompleteReadError when it hung up."""
    header = await reader.readexactly(HEADER.size)
    text_size, blob_size = _sizes(header)
    return unpack(await reader.readexactly(text_size), await reader.readexactly(blob_size))


def _complete(data: bytes | bytearray) -> tuple[bytes, bytes] | None:
    """(text, payload) of the frame that `data` is, None while some of it is missing. Raises FrameError also for what
    lies beyond it."""
    if len(data) < HEADER.size:
        return None
    text_size, blob_size = _sizes(data[:HEADER.size])
    end = HEADER.size + text_size
    if len(data) < end + blob_size:
        return None
    if len(data) > end + blob_size:
        raise FrameError("more than one answer")
    return bytes(data[HEADER.size:end]), bytes(data[end:])


def _sizes(header: bytes | bytearray) -> tuple[int, int]:
    text_size, blob_size = HEADER.unpack(header)
    if text_size > MAX_TEXT or blob_size > MAX_BLOBS:
        raise FrameError(f"frame of {text_size} + {blob_size} bytes")
    return text_size, blob_size


def unpack(text: bytes, payload: bytes) -> tuple[dict[str, Any], list[bytes]]:
    try:
        message = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise FrameError(f"not JSON: {exc}") from None
    lengths = message.get("blobs") if isinstance(message, dict) else None
    if not isinstance(lengths, list) or not all(type(n) is int and n >= 0 for n in lengths) or sum(lengths) != len(payload):
        raise FrameError("blob lengths do not add up")
    return message, _cut(payload, lengths)


def _cut(payload: bytes, lengths: Sequence[int]) -> list[bytes]:
    blobs, start = [], 0
    for length in lengths:
        blobs.append(payload[start:start + length])
        start += length
    return blobs


def is_bounded_png(data: bytes) -> bool:
    """Whether it is a PNG up to its pixels, with one header, which announces an acceptable size. Decoders obey the last one."""
    if data[:8] != _PNG or data[12:16] != b"IHDR" or len(data) < 33:
        return False
    width, height = struct.unpack(">II", data[16:24])
    place, kind = 33, b""
    while place + 8 <= len(data) and kind != b"IDAT":
        size, kind = struct.unpack(">I4s", data[place:place + 8])
        if kind == b"IHDR":
            return False
        place += 12 + size
    return kind == b"IDAT" and 0 < width * height <= MAX_IMAGE_PIXELS


class Conversation(asyncio.Protocol):
    """Frames to and from an untrusted peer: one answer to each question, bounded, and nothing out of turn."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[tuple[bytes, bytes]] | None = None
        self._data = bytearray()

    @property
    def alive(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    @property
    def asking(self) -> bool:
        """Whether an answer is still to come."""
        return self._answer is not None

    async def ask(self, text: bytes, blobs: Sequence[bytes] = ()) -> tuple[bytes, bytes]:
        """(text, payload) of the answer to one frame. Raises EOFError or FrameError; the conversation is over then."""
        if self._transport is None or self._transport.is_closing():
            raise EOFError("the session is gone")
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(HEADER.pack(len(text), sum(map(len, blobs))) + text)
        for blob in blobs:
            self._transport.write(blob)
        return await self._answer

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()
        self._end(EOFError("closed"))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport   # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        try:
            if self._answer is None:
                raise FrameError("spoke out of turn")
            self._data += data
            if (frame := _complete(self._data)) is None:
                return
        except FrameError as exc:
            self._end(exc)
            self.close()
            return
        self._data.clear()
        answer, self._answer = self._answer, None
        if not answer.done():
            answer.set_result(frame)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(EOFError("the session hung up"))

    def _end(self, why: Exception) -> None:
        answer, self._answer = self._answer, None
        if answer is not None and not answer.done():
            answer.set_exception(why)
