"""Frames between the tool server and a session: two lengths, a text of that many bytes, then the raw bytes of its blobs.

    >II  text bytes, blob bytes | text | blob | blob ...

The text of most frames is a JSON object with "blobs": [length, ...]. A cell and its answer, which are what a session's speed
is made of, are plainer: the cell is its code in UTF-8, the answer as ANSWER says.

Both lengths are checked before anything is read, so a peer can neither exhaust memory nor desynchronise the other end
by more than its own connection. Standard library only.
"""
from __future__ import annotations

import json
import socket
import struct
from collections.abc import Sequence
from typing import Any

HEADER, LENGTH = struct.Struct(">II"), struct.Struct(">I")
ANSWER = struct.Struct(">BIII")
"""Begins an answer: OK | ENDS_WITH_VALUE, a bit for each image that was opened, bytes of stdout, number of images; then each
image's length (>I), stdout, stderr."""
OK, ENDS_WITH_VALUE = 1, 2
PROTOCOL = 2
"""Said by a template, so that an image of another version is noticed at its start: of these frames and the supervisor's bytes."""
MAX_TEXT = 4 << 20
MAX_BLOBS = 256 << 20
AT_ONCE = 1 << 16
"""Bytes asked for before a frame's lengths are known: all of most frames."""


class FrameError(Exception):
    """A frame that is too large or not well-formed."""


def pack(message: dict[str, Any], blobs: Sequence[bytes] = ()) -> bytes:
    """Bytes of one frame."""
    text = json.dumps({**message, "blobs": [len(blob) for blob in blobs]}).encode()
    return b"".join((HEADER.pack(len(text), sum(map(len, blobs))), text, *blobs))


def sizes(header: bytes, max_text: int = MAX_TEXT, max_blobs: int = MAX_BLOBS) -> tuple[int, int]:
    """(text bytes, blob bytes) a header announces. Raises FrameError beyond the bounds."""
    text_size, blob_size = HEADER.unpack(header)
    if text_size > max_text or blob_size > max_blobs:
        raise FrameError(f"frame of {text_size} + {blob_size} bytes is over the limit of {max_text} + {max_blobs}")
    return text_size, blob_size


def unpack(text: bytes, payload: bytes) -> tuple[dict[str, Any], list[bytes]]:
    """Message and blobs of a frame's body. Raises FrameError."""
    try:
        message = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise FrameError(f"frame is not JSON: {exc}") from None
    lengths = message.get("blobs") if isinstance(message, dict) else None
    if not isinstance(lengths, list) or not all(type(n) is int and n >= 0 for n in lengths) or sum(lengths) != len(payload):
        raise FrameError("frame's blob lengths do not add up")
    blobs, start = [], 0
    for length in lengths:
        blobs.append(payload[start:start + length])
        start += length
    return message, blobs


def read_exactly(conn: socket.socket, size: int) -> bytes:
    """Raises EOFError when the peer is gone."""
    data = bytearray(size)
    view = memoryview(data)
    got = 0
    while got < size:
        count = conn.recv_into(view[got:])
        if not count:
            raise EOFError
        got += count
    return bytes(data)


def receive(conn: socket.socket) -> tuple[dict[str, Any], list[bytes]]:
    """Read one frame with a JSON object from a blocking socket. Raises EOFError or FrameError."""
    return unpack(*_receive(conn))


def receive_code(conn: socket.socket) -> str:
    """Read one cell. Raises EOFError or FrameError."""
    return _receive(conn)[0].decode("utf-8", "surrogatepass")


def _receive(conn: socket.socket) -> tuple[bytes, bytes]:
    """(text, payload) of one frame, which nothing follows unasked."""
    data = conn.recv(AT_ONCE)
    if len(data) < HEADER.size:
        data += read_exactly(conn, HEADER.size - len(data))
    text_size, blob_size = sizes(data[:HEADER.size])
    end = HEADER.size + text_size
    if (missing := end + blob_size - len(data)) > 0:
        data += read_exactly(conn, missing)
    return data[HEADER.size:end], data[end:]


def send(conn: socket.socket, message: dict[str, Any], blobs: Sequence[bytes] = ()) -> None:
    conn.sendall(pack(message, blobs))


def pack_answer(result: dict[str, Any], images: Sequence[bytes]) -> bytes:
    """Bytes of the frame that answers a cell; `result` as cell.Interpreter.run gives it."""
    stdout, stderr = (result[name].encode("utf-8", "replace") for name in ("stdout", "stderr"))
    flags = result["ok"] * OK | result["ends_with_value"] * ENDS_WITH_VALUE
    opened = sum(1 << place for place in result["opened"] if place < 32)
    text = b"".join((
        ANSWER.pack(flags, opened, len(stdout), len(images)), *(LENGTH.pack(len(image)) for image in images), stdout, stderr))
    return b"".join((HEADER.pack(len(text), sum(map(len, images))), text, *images))
