"""The pictures of a row as encoded files, in whichever way the row holds them.

A cell is null, one picture or a list of them (also as JSON text); a picture is bytes, {bytes, path} (the `Image` feature of
`datasets` among them), {url}, base64 with or without a data: address in front, or a path: absolute, or below one of `folders`.
"""
from __future__ import annotations

import base64
import contextlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hdpo.errors import DataError
from hdpo.text import one_line

_LONGEST_PATH = 1024
_DATA_URL = re.compile(r"data:[^,]{0,200};base64,", re.ASCII | re.IGNORECASE)
_BEGINNINGS = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")
"""Of picture files."""


def encoded_images(value: Any, folders: Sequence[Path] = ()) -> tuple[bytes, ...]:
    """The encoded files of a cell. Raises DataError naming the picture by its number."""
    return tuple(_encoded(cell, f"image {i}", folders) for i, cell in enumerate(picture_cells(value)))


def picture_cells(value: Any) -> list[Any]:
    """The pictures of a cell as they stand there."""
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise DataError("images: the text is neither a path nor JSON") from None
    return value if isinstance(value, list) else [] if value is None else [value]


def outside_file(cell: Any, folders: Sequence[Path]) -> Path | None:
    """The file that a picture's cell refers to; None where the row holds the picture itself, or the file is not there."""
    if isinstance(cell, dict):
        cell = None if cell.get("bytes") else cell.get("path")
    if not isinstance(cell, str) or len(cell) > _LONGEST_PATH or cell.startswith(("data:", "http:", "https:")):
        return None
    name = cell.removeprefix("file://")
    places = [Path(name)] if name.startswith("/") else [folder / name for folder in folders]
    return next((place for place in places if _is_file(place)), None)


def _encoded(cell: Any, what: str, folders: Sequence[Path]) -> bytes:
    if isinstance(cell, dict):
        if cell.get("bytes") is not None:
            cell = cell["bytes"]          # base64 where the row was JSON
        elif isinstance(named := cell.get("path") or cell.get("url"), str):
            cell = named
    if isinstance(cell, (bytes, bytearray, memoryview)) and len(cell):
        return bytes(cell)
    if not isinstance(cell, str) or not cell:
        raise DataError(f"{what} has no bytes in the file, and no path")
    if (file := outside_file(cell, folders)) is not None:
        try:
            return file.read_bytes()
        except OSError as exc:
            raise DataError(f"{what}: {file}: {exc.strerror}") from exc
    if cell.startswith(("http:", "https:")):
        raise DataError(f"{what} is an address ({cell[:80]}): download the pictures first")
    found = _DATA_URL.match(cell)
    if data := _base64(cell[found.end():] if found else cell, sure=found is not None):
        return data
    where = f"looked in {', '.join(map(str, folders))}" if folders else "looked nowhere"
    raise DataError(f"{what}: no such file: {one_line(cell, 200)} ({where}; data.image_root names another folder), and no base64")


def _base64(text: str, sure: bool) -> bytes:
    """The bytes, also of text in the alphabet for addresses or without its padding; b"" where it is none. `sure`: it says so."""
    text = "".join(text.split())
    with contextlib.suppress(ValueError):
        data = base64.b64decode(text, validate=True)
        return data if sure or len(data) > 16 else b""
    with contextlib.suppress(ValueError):
        text = text.translate({ord("-"): "+", ord("_"): "/"}).rstrip("=")
        data = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
        return data if data.startswith(_BEGINNINGS) else b""
    return b""


def _is_file(place: Path) -> bool:
    try:
        return place.is_file()
    except (OSError, ValueError):      # no path at all
        return False
