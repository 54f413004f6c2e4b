"""Where a picture that the model saw came from, if that says every pixel of it: a picture of the row, a box of one, or a file.

What can be made again from what is there already need not be kept. Everything said here was verified pixel by pixel when it was
written, with the decoders of DECODERS.
"""
from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, features

from hdpo.agent.images import decode_image, resized
from hdpo.config import DataConfig
from hdpo.data.pictures import encoded_images
from hdpo.data.store import RowStore, open_rows
from hdpo.errors import DataError
from hdpo.types import Task

DECODERS = " ".join(f"{name} {features.version(name)}" for name in ("pil", "jpg", "jpg_2000", "webp", "avif", "zlib", "libtiff"))
"""Another version may decode the same file to other pixels."""
HELD_BYTES = 128 << 20
"""Decoded pictures that are kept because others of the same prompt are likely to need them."""
_PROBES, _FEW, _TRIED = 16, 32, 64
_OWN_FILE = -1

Box = tuple[int, int, int, int]


class Origin(NamedTuple):
    """The task's picture of this number (-1: a file of its own), cut to `box` (left, top, right, bottom), at the size seen."""

    picture: int
    box: Box | None = None


class RowPictures:
    """Encoded pictures of the rows of data.train by their number; the data is opened when the first is asked for."""

    def __init__(self, config: DataConfig) -> None:
        self._config = config
        self._rows: RowStore | None = None

    def __call__(self, row: int) -> tuple[bytes, ...]:
        """Raises DataError where there is no such row, or a picture of it is gone."""
        if self._rows is None:
            self._rows = open_rows(self._config.train, cache=self._config.cache, image_root=self._config.image_root)
        if not 0 <= row < len(self._rows):
            raise DataError(f"the data has no row {row}")
        return encoded_images(self._rows.row(row, ["images"]).get("images"), self._rows.folders(row))


def print_of(images: Sequence[bytes]) -> str:
    """Equal for the same encoded pictures in the same order."""
    digest = hashlib.blake2b(digest_size=16)
    for image in images:
        digest.update(len(image).to_bytes(8, "little") + image)
    return digest.hexdigest()


class Originals:
    """Decoded pictures, the last few of them; for one thread."""

    def __init__(self) -> None:
        self._held: OrderedDict[tuple[object, int], Image.Image] = OrderedDict()

    def picture(self, of: object, number: int, data: Callable[[], bytes]) -> Image.Image:
        """Raises DataError for what is no picture."""
        name = of, number
        if name not in self._held:
            self._held[name] = decode_image(data(), f"image {number}")
            while len(self._held) > 1 and 3 * sum(one.width * one.height for one in self._held.values()) > HELD_BYTES:
                self._held.popitem(last=False)
        self._held.move_to_end(name)
        return self._held[name]


def origin_of(seen: Image.Image, file: bytes, task: Task, index: int, originals: Originals) -> Origin | None:
    """Where `seen`, which came as `file`, can be had again; None where only its own pixels will do.

    A file of its own that has more than a byte for each pixel that was seen is none of those: encoding them takes less.
    """
    try:
        if file in task.images:
            number = task.images.index(file)
            whole = originals.picture(index, number, lambda: file)
            return Origin(number) if _same(resized(whole, seen.size), seen) else None
        came = decode_image(file, "image")
        if not _same(resized(came, seen.size), seen):
            return None
        for number, data in enumerate(task.images):
            box = box_of(came, originals.picture(index, number, lambda data=data: data))   # type: ignore[misc]
            if box is not None:
                return Origin(number, box)
    except DataError:
        return None
    return Origin(_OWN_FILE) if len(file) <= seen.width * seen.height else None


def made_again(origin: Origin, size: tuple[int, int], whole: Image.Image) -> Image.Image:
    """The picture that was seen at `size`; `whole` is the decoded picture that `origin` names."""
    return resized(whole if origin.box is None else whole.crop(origin.box), size)


def box_of(part: Image.Image, whole: Image.Image) -> Box | None:
    """The first place at which `whole` has exactly the pixels of `part` (both RGB)."""
    if part.width > whole.width or part.height > whole.height or part.mode != "RGB" or whole.mode != "RGB":
        return None
    inner, outer = np.asarray(part), np.asarray(whole)
    high, wide = outer.shape[0] - inner.shape[0] + 1, outer.shape[1] - inner.shape[1] + 1
    ys, xs = _telling(inner)
    colours, counts = np.unique(inner[ys, xs], axis=0, return_counts=True)
    rarest = colours[counts.argmin()]      # leaves fewer places than a background's would
    first = int(np.flatnonzero((inner[ys, xs] == rarest).all(-1))[0])
    window = outer[ys[first]:ys[first] + high, xs[first]:xs[first] + wide]
    tops, lefts = np.nonzero((window[..., 0] == rarest[0]) & (window[..., 1] == rarest[1]) & (window[..., 2] == rarest[2]))
    for y, x in zip(ys, xs):
        if len(tops) > _FEW:
            tops, lefts = _fitting(inner, outer, tops, lefts, y, x)
    for _ in range(_TRIED):
        if not len(tops):
            break
        top, left = int(tops[0]), int(lefts[0])
        differs = (outer[top:top + part.height, left:left + part.width] != inner).any(-1)
        if not differs.any():
            return left, top, left + part.width, top + part.height
        tops, lefts = _fitting(inner, outer, tops, lefts, *divmod(int(differs.argmax()), part.width))
    return None


def _fitting(inner: np.ndarray, outer: np.ndarray, tops: np.ndarray, lefts: np.ndarray, y: int, x: int,
             ) -> tuple[np.ndarray, np.ndarray]:
    """Those places at which pixel (y, x) is right."""
    fits = (outer[tops + y, lefts + x] == inner[y, x]).all(-1)
    return tops[fits], lefts[fits]


def _telling(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(rows, columns) of pixels that tell a place from others: at edges of what is shown, if anything is."""
    edges = np.flatnonzero((pixels[:, 1:] != pixels[:, :-1]).any(-1))
    if not len(edges):
        return np.zeros(1, int), np.zeros(1, int)
    some = np.random.default_rng(0).choice(edges, _PROBES)
    return some // (pixels.shape[1] - 1), some % (pixels.shape[1] - 1) + 1


def _same(one: Image.Image, other: Image.Image) -> bool:
    return one.mode == other.mode and one.size == other.size and one.tobytes() == other.tobytes()
