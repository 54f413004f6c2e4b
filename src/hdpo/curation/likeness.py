"""Whether two pictures or two questions are the same one, up to what copying does to them.

Pictures: a difference hash of 64 bits finds candidates, resized, recompressed or slightly cropped ones among them, because the
known picture is hashed with each of its edges cut a little. Charts and scans share large white areas and so most bits; each
candidate is therefore compared closely, as grey thumbnails at the slight crop that fits best, by their correlation.

Questions: runs of words. Another wording keeps most of them; another problem of the same form has other numbers, which must
all be there. Runs that many of a benchmark's problems have are its form, and count for nothing.
"""
from __future__ import annotations

import itertools
import math
import re
import unicodedata
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hdpo.agent.chat import IMAGE_MARKER

Array = NDArray[np.float32]
SIDE = 64              # of the thumbnail that is kept of a picture
CLOSE = 24             # of the view that two are compared in
CUT = 0.08             # of an edge, in the hashed variants
CUTS = (0.0, 0.04, 0.08, 0.12)     # of an edge, in the close comparison, which then goes on in STEPS
STEPS = (0.02, 0.01, 0.005)
WHOLE = (0.0, 0.0, 0.0, 0.0)
FLAT = 2.0             # standard deviation of grey levels below which a picture says nothing
ASPECT = 0.35          # largest difference of two pictures' log(width / height)
VARIANTS = tuple(itertools.product((0.0, CUT), repeat=4))


def thumbnail(image: Image.Image) -> NDArray[np.uint8]:
    """[SIDE, SIDE] grey levels."""
    return np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX))


def says_something(thumb: NDArray[np.uint8]) -> bool:
    return float(thumb.std()) >= FLAT


def _view(thumb: NDArray[np.uint8], cut: tuple[float, ...], size: tuple[int, int]) -> Image.Image:
    """The thumbnail without these shares of its left, top, right and bottom, at another size."""
    left, top, right, bottom = (SIDE * share for share in cut)
    return Image.fromarray(thumb).resize(size, Image.Resampling.BOX, box=(left, top, SIDE - right, SIDE - bottom))


def _difference_hash(view: Image.Image) -> int:
    levels = np.asarray(view, dtype=np.int16)
    return int.from_bytes(np.packbits(levels[:, :-1] < levels[:, 1:]).tobytes(), "big")


def looks(thumb: NDArray[np.uint8]) -> int:
    """The 64-bit difference hash: near pictures differ in few bits."""
    return _difference_hash(_view(thumb, WHOLE, (9, 8)))


def looks_cropped(thumb: NDArray[np.uint8]) -> list[int]:
    """The hash of every variant, the whole picture first."""
    return [_difference_hash(_view(thumb, cut, (9, 8))) for cut in VARIANTS]


def _centred(view: Image.Image) -> Array:
    values = np.asarray(view, dtype=np.float32).ravel()
    values = values - values.mean()
    return values / max(1e-6, float(np.linalg.norm(values)))


def likeness(known: NDArray[np.uint8], seen: NDArray[np.uint8]) -> float:
    """Correlation of the seen picture with the known one at the slight crop that fits it best: 1 for the same."""
    target = _centred(_view(seen, WHOLE, (CLOSE, CLOSE)))
    tried: dict[tuple[float, ...], float] = {}

    def fits(cut: tuple[float, ...]) -> float:
        if cut not in tried:
            tried[cut] = float(target @ _centred(_view(known, cut, (CLOSE, CLOSE))))
        return tried[cut]

    cut: tuple[float, ...] = max(((left, 0.0, right, 0.0) for left, right in itertools.product(CUTS, repeat=2)), key=fits)
    cut = max(((cut[0], top, cut[2], bottom) for top, bottom in itertools.product(CUTS, repeat=2)), key=fits)
    for step in STEPS:
        for edge in (0, 2, 1, 3, 0, 2, 1, 3):
            near = ((*cut[:edge], max(0.0, cut[edge] + shift), *cut[edge + 1:]) for shift in (-step, 0.0, step))
            cut = max(near, key=fits)
    return max(tried.values())


def same_shape(a: tuple[int, int], b: tuple[int, int]) -> bool:
    """Of two (width, height)."""
    return abs(math.log(a[0] / a[1]) - math.log(b[0] / b[1])) <= ASPECT


_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|\d+(?:[.,]\d+)*|[^\W\d_]+")
_NUMERALS = {name: str(number) for number, name in enumerate(
    "zero one two three four five six seven eight nine ten eleven twelve".split())}


def words_of(text: str) -> list[str]:
    """Lower case, without marks and accents; numerals as digits; each Chinese or Japanese character is a word."""
    text = unicodedata.normalize("NFKD", text.replace(IMAGE_MARKER, " ")).casefold()
    found = _WORD.findall("".join(c for c in text if not unicodedata.combining(c)))
    return [_NUMERALS.get(word, word.replace(",", "")) for word in found]


def numbers_of(words: list[str]) -> frozenset[str]:
    return frozenset(word for word in words if word[0].isdigit())


def runs_of(words: list[str], length: int) -> Iterator[tuple[str, ...]]:
    return zip(*(words[place:] for place in range(length)), strict=False)
