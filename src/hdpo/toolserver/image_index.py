"""Embedded image search: a folder of images with `labels.json` {file name: title}.

Two images are compared by structure, ImageHash's DCT hash of each colour channel (3 x 64 bits), and by colour layout,
the picture averaged to 8 x 8. Both survive re-encoding and scaling; together they tell apart what one would confuse.
"""
from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import imagehash
import numpy as np
from PIL import Image

from hdpo import text
from hdpo.errors import DataError
from hdpo.toolserver.http_service import SearchError
from hdpo.toolserver.image_search import MAX_RETURNED, ImageQuery, Match, bounded, open_image

MAX_DISTANCE = 0.45
"""Distance up to which two images count as the same: re-encoded copies stay below 0.35, unrelated images above 0.6."""
LAYOUT_WEIGHT = 2.0


def features(image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """([192] bool DCT hashes of the red, green and blue channel, [192] float32 colours of the 8 x 8 average, 0 to 1)."""
    hashes = np.concatenate([imagehash.phash(channel).hash.ravel() for channel in image.split()])
    return hashes, np.asarray(image.resize((8, 8), Image.Resampling.BOX), dtype=np.float32).ravel() / 255


class ImageIndex:
    """`ImageProvider` that reads and hashes the whole folder at start. Raises DataError naming a file it can't use."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        try:
            labels = text.valid_tree(json.loads((self.folder / "labels.json").read_text()), "search")
        except (OSError, ValueError) as exc:
            raise DataError(f"{self.folder}/labels.json: {exc}") from None
        if not isinstance(labels, dict) or not all(isinstance(title, str) for title in labels.values()):
            raise DataError(f"{self.folder}/labels.json: expected an object {{file name: title}}")
        self.files = [self.folder / name for name in labels]
        self.titles = list(labels.values())
        self._hashes = np.zeros((len(self.files), 192), dtype=bool)
        self._layouts = np.zeros((len(self.files), 192), dtype=np.float32)
        for row, file in enumerate(self.files):
            try:
                self._hashes[row], self._layouts[row] = features(open_image(file))
            except SearchError as exc:
                raise DataError(f"{file}: {exc}") from None

    def lookup(self, image: bytes) -> list[Match]:
        """The nearest images within MAX_DISTANCE. Raises SearchError when the query can't be decoded."""
        if not self.files:
            return []
        hashes, colours = features(open_image(image))
        differing = (self._hashes != hashes).mean(axis=1)
        distances = differing + LAYOUT_WEIGHT * np.sqrt(((self._layouts - colours) ** 2).mean(axis=1))
        nearest = np.argsort(distances, kind="stable")[:MAX_RETURNED]
        return [Match(self.titles[i], bounded(self.files[i])) for i in nearest if distances[i] <= MAX_DISTANCE]

    async def search(self, query: ImageQuery) -> list[Match]:
        return await asyncio.to_thread(self.lookup, query.image)

    async def close(self) -> None:
        """Nothing is open."""
