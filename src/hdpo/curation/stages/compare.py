"""Recorded and real observation of a cell, compared: text with spaces, addresses and paths normalised and numbers within a
tolerance, pictures by how they look."""
from __future__ import annotations

import math
import re
from collections.abc import Sequence

from PIL import Image, ImageChops, ImageStat

from hdpo.agent.images import decode_image
from hdpo.errors import DataError
from hdpo.toolserver.layout import NO_OUTPUT

_STREAM = re.compile(r"(stdout|stderr):\s*\n```[^\n]*\n(.*?)\n?```", re.DOTALL)
_HEADER = re.compile(r"\A\s*Code execution result:\s*", re.IGNORECASE)
_COUNT = re.compile(r"^\d+ images?\s*$", re.MULTILINE)
_ADDRESS = re.compile(r"\b0x[0-9a-fA-F]+\b")
_PATH = re.compile(r"(?<![\w.])(?:~|\.{0,2}|[A-Za-z]:)?[\\/](?:[\w.+-]+[\\/])*([\w.+-]+)")
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
_PICTURE_FILE = re.compile(r"\S+\.(?:png|jpe?g|bmp|webp|tiff?|gif)", re.IGNORECASE)
_SIDE = 32


def streams(observation: str) -> tuple[str, str]:
    """(stdout, stderr) of an observation in the reference's layout or hdpo's; other text is all stdout."""
    found = dict(_STREAM.findall(observation))
    if found:
        return _said(found.get("stdout", "")), _said(found.get("stderr", ""))
    text = _HEADER.sub("", observation)
    return _said(_COUNT.sub("", text) if text != observation else text.removesuffix("Images:")), ""


def _said(text: str) -> str:
    text = text.strip().removesuffix("Images:").strip()
    return "" if text == NO_OUTPUT else text


def same_text(recorded: str, real: str, tolerance: float, names_pictures: bool = False) -> bool:
    """Whether two outputs say the same. `tolerance`: of numbers, relative; `names_pictures`: lines that are only the name of a
    picture's file may stand on one side alone, because the picture itself was shown."""
    a, b = (_normal(text, names_pictures) for text in (recorded, real))
    if a == b:
        return True
    numbers = [[match[0] for match in _NUMBER.finditer(text)] for text in (a, b)]
    if _NUMBER.sub("#", a) != _NUMBER.sub("#", b):
        return False
    return all(_close(x, y, tolerance) for x, y in zip(*numbers, strict=True))


def _normal(text: str, names_pictures: bool) -> str:
    lines = [line.strip() for line in text.splitlines()]
    if names_pictures:
        lines = [line for line in lines if not _PICTURE_FILE.fullmatch(line)]
    text = _PATH.sub(r"\1", _ADDRESS.sub("0x", " ".join(lines)))
    return " ".join(text.split())


def _close(a: str, b: str, tolerance: float) -> bool:
    """Whole numbers must be equal; of two others the less precise one's last digit counts too."""
    x, y = float(a), float(b)
    if not (math.isfinite(x) and math.isfinite(y)):
        return a == b
    if not {".", "e", "E"} & set(a + b):
        return x == y
    return math.isclose(x, y, rel_tol=tolerance, abs_tol=tolerance * 1e-3)


def same_pictures(recorded: Sequence[bytes], real: Sequence[bytes], tolerance: float) -> bool:
    """As many, of about the same shape, and differing by at most `tolerance` of the range in the mean of a 32 x 32 view."""
    return len(recorded) == len(real) and all(distance(a, b) <= tolerance for a, b in zip(recorded, real, strict=True))


def distance(a: bytes, b: bytes) -> float:
    """0 for pictures that look alike to 1; 1 for shapes that differ by more than a tenth, or one that can't be read."""
    try:
        first, second = (decode_image(data, "a picture") for data in (a, b))
    except DataError:
        return 1.0
    shape = math.log(first.width / first.height) - math.log(second.width / second.height)
    if abs(shape) > 0.1:
        return 1.0
    small = [image.convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.BOX) for image in (first, second)]
    return sum(ImageStat.Stat(ImageChops.difference(*small)).mean) / 3 / 255
