"""Images of prompts and tools: decode, bound to what the model may see, count tokens, name by content, encode.

A picture is bounded once, here. The bounded size is a fixed point of Qwen's `smart_resize`, so the image processors of
trainer and engine leave it alone and both see the same pixels. Imports Pillow, nothing heavier.
"""
from __future__ import annotations

import base64
import hashlib
import io
import math
from functools import lru_cache

from PIL import Image

from hdpo import pictures, text
from hdpo.errors import DataError

MAX_ASPECT_RATIO = 200
"""Qwen's processors refuse anything longer."""

TOOL_PIXELS = 64 << 20
"""Largest picture of a tool that is decoded."""


def decode_image(data: bytes, what: str, max_pixels: int = pictures.MAX_PIXELS) -> Image.Image:
    """Encoded file -> RGB image, upright, at its original size; transparency is laid on white. Raises DataError naming `what`."""
    try:
        return pictures.decode(data, max_pixels)
    except pictures.PictureError as exc:
        raise DataError(f"{what}: not a readable image ({text.one_line(exc)})") from exc


def check_image(data: bytes, what: str) -> tuple[int, int]:
    """(width, height) that `decode_image` gives, having read all of the file; JPEGs are decoded at an eighth of their size,
    which still finds truncation. Raises DataError naming `what`."""
    try:
        return pictures.size_of(data)
    except pictures.PictureError as exc:
        raise DataError(f"{what}: not a readable image ({text.one_line(exc)})") from exc


@lru_cache(maxsize=4096)
def bounded_size(width: int, height: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(width, height) the model sees: multiples of `factor`, min_pixels <= area <= max_pixels, about the same aspect
    ratio (at most 200). Feeding the result back returns it unchanged.

    Qwen's rule (`smart_resize`) wherever its result is such a fixed point; it is not for very long pictures and where
    the bounds are close to each other, and there the nearest grid that fits is taken. Raises ValueError if none fits.
    """
    longest = max(width, height)
    width, height = (max(edge, math.ceil(longest / MAX_ASPECT_RATIO)) for edge in (width, height))
    size = _smart_resize(width, height, factor, min_pixels, max_pixels)
    if min_pixels <= size[0] * size[1] <= max_pixels and max(size) <= MAX_ASPECT_RATIO * min(size):
        return size
    return _nearest_grid(width / height, factor, min_pixels, max_pixels)


def _smart_resize(width: int, height: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """As in transformers' Qwen2-VL image processor, without its check of the aspect ratio."""
    wide, high = round(width / factor), round(height / factor)
    if wide * high * factor**2 > max_pixels:
        scale = math.sqrt(width * height / max_pixels)
        wide, high = (max(1, math.floor(edge / scale / factor)) for edge in (width, height))
    elif wide * high * factor**2 < min_pixels:
        scale = math.sqrt(min_pixels / (width * height))
        wide, high = (math.ceil(edge * scale / factor) for edge in (width, height))
    return wide * factor, high * factor


def _nearest_grid(aspect: float, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The grid whose aspect ratio (width / height) is nearest, among equals the largest."""
    fewest, most = math.ceil(min_pixels / factor**2), max_pixels // factor**2
    best: tuple[float, int, int, int] | None = None
    for high in range(1, most + 1):
        low, top = max(1, math.ceil(fewest / high), math.ceil(high / MAX_ASPECT_RATIO)), min(
            most // high, high * MAX_ASPECT_RATIO)
        if low > top:
            continue
        wide = min(max(round(aspect * high), low), top)
        candidate = (abs(math.log(wide / high / aspect)), -wide * high, wide, high)
        best = min(best or candidate, candidate)
    if best is None:
        raise ValueError(f"no image of {min_pixels} to {max_pixels} pixels has edges that are multiples of {factor}")
    return best[2] * factor, best[3] * factor


def bound_image(image: Image.Image, factor: int, min_pixels: int, max_pixels: int) -> Image.Image:
    """The image at its bounded size (bicubic); the very same object if nothing is to be done."""
    return resized(image, bounded_size(*image.size, factor, min_pixels, max_pixels))


def resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The image at `size` (bicubic); the very same object if it already has it."""
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


def num_image_tokens(size: tuple[int, int], factor: int) -> int:
    """Placeholder tokens of one bounded image: one per factor x factor pixels (grid.prod() / merge**2)."""
    return (size[0] // factor) * (size[1] // factor)


def content_key(image: Image.Image) -> str:
    """A name unique per content, size and mode: 32 hexadecimal digits."""
    digest = hashlib.blake2b(f"{image.mode} {image.size}".encode(), digest_size=16)
    digest.update(image.tobytes())
    return digest.hexdigest()


def encode_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def data_url(image: Image.Image) -> str:
    return "data:image/png;base64," + base64.b64encode(encode_png(image)).decode("ascii")
