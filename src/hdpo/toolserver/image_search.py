"""The `image_search` tool and its embedded index: a folder of images with `labels.json` {file name: title}.

Two images are compared by structure, ImageHash's DCT hash of each colour channel (3 x 64 bits), and by colour layout,
the picture averaged to 8 x 8. Both survive re-encoding and scaling; together they tell apart what one would confuse.
"""
from __future__ import annotations

import asyncio
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import imagehash
import numpy as np
from PIL import Image

from hdpo.errors import DataError
from hdpo.toolserver import layout
from hdpo.toolserver.providers import SearchError
from hdpo.toolserver.wire import Reply

MAX_DISTANCE = 0.45
"""Distance up to which two images count as the same: re-encoded copies stay below 0.35, unrelated images above 0.6."""
LAYOUT_WEIGHT = 2.0
MAX_RESULTS = 3
MAX_SIDE = 768
"""Longest side of a returned image, pixels."""


@dataclass(frozen=True, slots=True)
class Match:
    title: str
    image: bytes               # encoded, at most MAX_SIDE on its longest side
    distance: float            # 0 = the same, see MAX_DISTANCE


class ImageProvider(Protocol):
    async def search(self, image: bytes) -> list[Match]:
        """Matches, best first; empty when nothing is similar. Raises SearchError."""
        ...


def features(image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """([192] bool DCT hashes of the red, green and blue channel, [192] float32 colours of the 8 x 8 average, 0 to 1)."""
    rgb = image.convert("RGB")
    hashes = np.concatenate([imagehash.phash(channel).hash.ravel() for channel in rgb.split()])
    return hashes, np.asarray(rgb.resize((8, 8), Image.Resampling.BOX), dtype=np.float32).ravel() / 255


class ImageIndex:
    """Reads and hashes the whole folder at start. Raises DataError naming the file that can't be used."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        try:
            labels = json.loads((self.folder / "labels.json").read_text())
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
                with Image.open(file) as image:
                    self._hashes[row], self._layouts[row] = features(image)
            except (OSError, ValueError) as exc:
                raise DataError(f"{file}: can't be read as an image: {exc}") from None

    def lookup(self, image: bytes) -> list[Match]:
        """The nearest images within MAX_DISTANCE. Raises SearchError when the query can't be decoded."""
        if not self.files:
            return []
        try:
            with Image.open(io.BytesIO(image)) as query:
                hashes, colours = features(query)
        except (OSError, ValueError, Image.DecompressionBombError) as exc:
            raise SearchError(f"the query image can't be decoded: {exc}") from exc
        differing = (self._hashes != hashes).mean(axis=1)
        distances = differing + LAYOUT_WEIGHT * np.sqrt(((self._layouts - colours) ** 2).mean(axis=1))
        nearest = np.argsort(distances, kind="stable")[:MAX_RESULTS]
        return [Match(self.titles[i], bounded(self.files[i]), float(distances[i]))
                for i in nearest if distances[i] <= MAX_DISTANCE]

    async def search(self, image: bytes) -> list[Match]:
        return await asyncio.to_thread(self.lookup, image)


def bounded(file: Path) -> bytes:
    """The image as PNG, scaled down to MAX_SIDE. Raises SearchError when the file has gone."""
    try:
        with Image.open(file) as original:
            image = original.convert("RGB")
    except OSError as exc:
        raise SearchError(f"{file.name}: {exc}") from exc
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


async def run_image_search(provider: ImageProvider, images: tuple[bytes, ...]) -> Reply:
    """Search with the row's first image. Raises SearchError when the provider fails."""
    if not images:
        return Reply(layout.NO_IMAGE_RESULT, metrics={"search_success": True, "num_results": 0})
    matches = await provider.search(images[0])
    return Reply(layout.image_results([match.title for match in matches]), tuple(match.image for match in matches),
                 metrics={"search_success": True, "num_results": len(matches)})
