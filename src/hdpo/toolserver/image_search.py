"""The `image_search` tool and its embedded index: a folder of images with `labels.json` {file name: title}.

Two images are compared by their perceptual hashes, one per colour channel (ImageHash's DCT hash, 3 x 64 bits): robust
to re-encoding and scaling, blind to nothing but small detail, and unlike a grey hash aware of colour.
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

MAX_DISTANCE = 0.22
"""Share of differing bits up to which two images count as the same; unrelated images differ in about half."""
MAX_RESULTS = 3
MAX_SIDE = 768
"""Longest side of a returned image, pixels."""


@dataclass(frozen=True, slots=True)
class Match:
    title: str
    image: bytes               # encoded, at most MAX_SIDE on its longest side
    distance: float            # share of differing bits, 0 = the same


class ImageProvider(Protocol):
    async def search(self, image: bytes) -> list[Match]:
        """Matches, best first; empty when nothing is similar. Raises SearchError."""
        ...


def features(image: Image.Image) -> np.ndarray:
    """[192] bool: DCT hashes of the red, green and blue channel."""
    channels = image.convert("RGB").split()
    return np.concatenate([imagehash.phash(channel).hash.ravel() for channel in channels])


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
        self._features = np.zeros((len(self.files), 192), dtype=bool)
        for row, file in enumerate(self.files):
            try:
                with Image.open(file) as image:
                    self._features[row] = features(image)
            except (OSError, ValueError) as exc:
                raise DataError(f"{file}: can't be read as an image: {exc}") from None

    def lookup(self, image: bytes) -> list[Match]:
        """The nearest images within MAX_DISTANCE. Raises SearchError when the query can't be decoded."""
        if not self.files:
            return []
        try:
            with Image.open(io.BytesIO(image)) as query:
                distances = (self._features != features(query)).mean(axis=1)
        except (OSError, ValueError, Image.DecompressionBombError) as exc:
            raise SearchError(f"the query image can't be decoded: {exc}") from exc
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
