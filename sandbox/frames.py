"""Frames between the tool server and a session: two lengths, a JSON object, then the raw bytes of its blobs.

    >II  JSON bytes, blob bytes | JSON with "blobs": [length, ...] | blob | blob ...

Both lengths are checked before anything is read, so a peer can neither exhaust memory nor desynchronise the other end
by more than its own connection. Standard library only.
"""
from __future__ import annotations

import json
import socket
import struct
from collections.abc import Sequence
from typing import Any

HEADER = struct.Struct(">II")
MAX_JSON = 4 << 20
MAX_BLOBS = 256 << 20
AT_ONCE = 1 << 16
"""Bytes asked for before a frame's lengths are known: all of most frames."""


class FrameError(Exception):
    """A frame that is too large or not well-formed."""


def pack(message: dict[str, Any], blobs: Sequence[bytes] = ()) -> bytes:
    """Bytes of one frame."""
    text = json.dumps({**message, "blobs": [len(blob) for blob in blobs]}).encode()
    return b"".join((HEADER.pack(len(text), sum(map(len, blobs))), text, *blobs))


def sizes(header: bytes, max_json: int = MAX_JSON, max_blobs: int = MAX_BLOBS) -> tuple[int, int]:
    """(JSON bytes, blob bytes) a header announces. Raises FrameError beyond the bounds."""
    json_size, blob_size = HEADER.unpack(header)
    if json_size > max_json or blob_size > max_blobs:
        raise FrameError(f"frame of {json_size} + {blob_size} bytes is over the limit of {max_json} + {max_blobs}")
    return json_size, blob_size


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
    """Read one frame from a blocking socket, where nothing follows it unasked. Raises EOFError or FrameError."""
    data = conn.recv(AT_ONCE)
    if len(data) < HEADER.size:
        data += read_exactly(conn, HEADER.size - len(data))
    json_size, blob_size = sizes(data[:HEADER.size])
    end = HEADER.size + json_size
    if (missing := end + blob_size - len(data)) > 0:
        data += read_exactly(conn, missing)
    return unpack(data[HEADER.size:end], data[end:])


def send(conn: socket.socket, message: dict[str, Any], blobs: Sequence[bytes] = ()) -> None:
    conn.sendall(pack(message, blobs))
