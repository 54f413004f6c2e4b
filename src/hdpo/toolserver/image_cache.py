"""Image search answers recorded in the reference's offline format, one JSON file beside its images:

    {row's extra_info.index: {"tool_returned_web_title": [title, ...], "cached_images_path": [file, ...]}}
"""
from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

from hdpo import oddities, pictures, text
from hdpo.errors import DataError
from hdpo.toolserver.http_service import SearchError
from hdpo.toolserver.image_search import MAX_TITLES, ImageQuery, Match, encoded, open_image

MAX_RECORDED_SIDE = 4096
"""Longest side of an image that is returned as it was recorded, pixels; the agent shows the model a bounded copy anyway."""


class ImageCache:
    """`ImageProvider` for the first image of rows whose index was recorded.

    Titles and images are pairs, as the reference reads them: where a row has images, further titles are left out. Images are
    returned as they are recorded. Their paths are relative to the file's folder and may not leave it. Raises DataError naming
    the row that is wrong.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            rows = text.valid_tree(json.loads(self.path.read_text()), "search")
        except (OSError, ValueError) as exc:
            raise DataError(f"{path}: not an image search cache: {exc}") from None
        if not isinstance(rows, dict):
            raise DataError(f"{path}: expected an object {{row index: results}}")
        self._rows = {index: self._read(index, row) for index, row in rows.items()}

    def _read(self, index: str, row: Any) -> list[tuple[str, Path | None]]:
        where = f"{self.path}: row {index}"
        titles, images = ((row.get(key) or []) if isinstance(row, dict) else None
                          for key in ("tool_returned_web_title", "cached_images_path"))
        for values in (titles, images):
            if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
                raise DataError(f"{where}: expected lists of strings, tool_returned_web_title and cached_images_path")
        assert titles is not None and images is not None
        files = [self._inside(where, image) if image else None for image in images[:MAX_TITLES]]
        return list(zip(titles[:MAX_TITLES], files or [None] * MAX_TITLES))

    def _inside(self, where: str, name: str) -> Path:
        folder = self.path.parent.resolve()
        file = (folder / name).resolve()
        if not file.is_relative_to(folder):
            raise DataError(f"{where}: {name} is outside of {folder}")
        if not file.is_file():
            raise DataError(f"{where}: no such image: {name}")
        return file

    def lookup(self, index: str) -> list[Match]:
        return [Match(title, _shown(file)) for title, file in self._rows.get(index, ())]

    async def search(self, query: ImageQuery) -> list[Match]:
        return await asyncio.to_thread(self.lookup, query.index) if query.index in self._rows else []

    async def close(self) -> None:
        """Nothing is open."""


def _shown(file: Path | None) -> bytes | None:
    """A picture that can't be read is left out: the title says what was found."""
    try:
        if file is None:
            return None
        width, height = pictures.size_of(data := file.read_bytes())
        return data if max(width, height) <= MAX_RECORDED_SIDE else encoded(open_image(data), MAX_RECORDED_SIDE)
    except (pictures.PictureError, SearchError, OSError):
        oddities.count("image/search")
        return None
