"""The `image_search` tool: what is searched for, where, and how much of what was found comes back.

The query is one of the row's images or the part of it that the call names. Sources are asked in order, the first that
knows something answers: a recorded cache (image_cache.py), the embedded index (image_index.py), a hosted reverse image
search (lens.py).
"""
from __future__ import annotations

import asyncio
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from hdpo import oddities, pictures, text
from hdpo.toolserver import layout
from hdpo.toolserver.http_service import SearchError
from hdpo.toolserver.wire import Reply

MAX_TITLES, MAX_RETURNED = 10, 3
"""Titles and images of one answer."""
MAX_SIDE = 768
"""Longest side of a returned image, pixels."""
MAX_PIXELS = pictures.MAX_PIXELS
"""Largest image that is decoded, pixels: what the trainer shows the model can be searched for."""


@dataclass(frozen=True, slots=True)
class ImageQuery:
    """An encoded image to search for. `index` is the row's key in a recorded cache, empty when this is only a part."""

    image: bytes
    index: str = ""


@dataclass(frozen=True, slots=True)
class Match:
    """A page or picture that shows it. `image` is encoded, MAX_SIDE at most, None when there is none to show."""

    title: str
    image: bytes | None


class ImageProvider(Protocol):
    async def search(self, query: ImageQuery) -> list[Match]:
        """Matches, best first; empty when nothing is similar. Raises SearchError."""
        ...

    async def close(self) -> None: ...


class InTurn:
    """`ImageProvider` that asks several, and answers with what the first of them finds."""

    def __init__(self, sources: Sequence[ImageProvider]) -> None:
        self.sources = sources

    async def search(self, query: ImageQuery) -> list[Match]:
        for source in self.sources:
            if matches := await source.search(query):
                return matches
        return []

    async def close(self) -> None:
        for source in self.sources:
            await source.close()


def open_image(source: bytes | Path) -> Image.Image:
    """A decoded RGB image, upright. Raises SearchError for what can't or should not be decoded."""
    name = source.name if isinstance(source, Path) else "the image"
    try:
        return pictures.decode(source.read_bytes() if isinstance(source, Path) else source, MAX_PIXELS)
    except (pictures.PictureError, OSError) as exc:
        oddities.count("image/search")
        raise SearchError(f"{name} can't be decoded: {text.one_line(exc)}") from exc


def encoded(image: Image.Image, side: int = MAX_SIDE) -> bytes:
    """PNG of at most `side` pixels each way, without metadata."""
    image = image.copy()
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def bounded(source: bytes | Path) -> bytes:
    """An image as it may be returned. Raises SearchError."""
    return encoded(open_image(source))


def make_query(images: Sequence[bytes], index: str, arguments: Mapping[str, Any]) -> ImageQuery | str:
    """The image that checked `arguments` ({"image": number, "box": pixels}) choose, or why there is none, for the model."""
    number = arguments.get("image", 1)
    if number > len(images):
        return f"Tool call error: there is no image {number}; the images are numbered 1 to {len(images)}."
    data = images[number - 1]
    if "box" not in arguments:
        return ImageQuery(data, index if number == 1 else "")
    image = open_image(data)
    left, top, right, bottom = (round(side) for side in arguments["box"])
    box = max(0, left), max(0, top), min(image.width, right), min(image.height, bottom)
    if box[0] >= box[2] or box[1] >= box[3]:
        return f"Tool call error: the box lies outside of image {number}, which has {image.width} x {image.height} pixels."
    buffer = io.BytesIO()
    image.crop(box).save(buffer, format="PNG")
    return ImageQuery(buffer.getvalue())


async def run_image_search(provider: ImageProvider, images: Sequence[bytes], index: str = "",
                           arguments: Mapping[str, Any] | None = None, words: layout.Reference = layout.REFERENCE) -> Reply:
    """One call. A reply that is not valid names a mistake in the call. Raises SearchError when the provider fails."""
    if not images:
        return Reply(layout.NO_IMAGE_RESULT, metrics={"search_success": True, "num_results": 0})
    query = await asyncio.to_thread(make_query, images, index, arguments or {})
    if isinstance(query, str):
        return Reply(query, valid=False)
    matches = (await provider.search(query))[:MAX_TITLES]
    shown = tuple(match.image for match in matches if match.image is not None)
    return Reply(words.image_results([match.title for match in matches], [match.image is not None for match in matches]), shown,
                 metrics={"search_success": True, "num_results": len(matches)})
