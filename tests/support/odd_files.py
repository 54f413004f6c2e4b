"""Pictures as strangers send them: whole, broken, and what is none."""
from __future__ import annotations

import io
import struct
import zlib
from typing import Any

from PIL import Image


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(*chunks: bytes) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + chunk(b"IEND", b"")


def header(width: int, height: int, bits: int = 8, colour: int = 2) -> bytes:
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))


def corners() -> Image.Image:
    """40 x 24, another colour in each quarter."""
    image = Image.new("RGB", (40, 24), (200, 30, 30))
    for box, colour in (((20, 0, 40, 12), (30, 200, 30)), ((0, 12, 20, 24), (30, 30, 200)), ((20, 12, 40, 24), (220, 220, 40))):
        image.paste(colour, box)
    return image


BROKEN = {
    "an empty profile behind the pixels": png(header(1, 1), chunk(b"IDAT", zlib.compress(bytes(4))), chunk(b"iCCP", b"")),
    "DDS": b"DDS |" + bytes(200), "a page": b"%PDF-1.4\n1 0 obj", "a film": b"\0\0\0\x18ftypmp42" + bytes(100),
    "an icon with a picture inside": encoded(corners(), "ICO"), "git lfs": b"version https://git-lfs.github.com/spec/v1\n",
    "HTML": b"<!doctype html><title>404</title>", "nothing": b"", "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
}
