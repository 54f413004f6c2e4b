"""One decoder for all pictures from outside: of data rows, of searches, of the model's code, and in its sessions.

Trainer, tool server and sandbox read this very file (src/hdpo/pictures.py is a link to it), so that a box which the model saw
in a photo is the same box in its code. Standard library, Pillow and, for deep greys, numpy; knows nothing else.

Only named formats are opened: nothing that starts a program (EPS), holds pages or films, or brings pictures inside of
pictures. A picture comes out in RGB and upright. Transparency is laid on white; a colour key of an RGB file is no
transparency, as for the image processors of models. Greys of 16 and 32 bits and floats are scaled to 0..255.
"""
from __future__ import annotations

import io
from typing import Any

from PIL import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
MAX_PIXELS = 128 << 20
"""Largest picture that is decoded."""
_ORIENTATION = 0x0112
_TURNS = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE",
          8: "ROTATE_90"}
_DEEP = ("I", "I;16", "I;16L", "I;16B", "I;16N", "F")


class PictureError(ValueError):
    """Not a readable picture; the message says why in a few words."""


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Encoded file -> RGB picture, upright, at its own resolution. Raises PictureError, whatever Pillow raises."""
    try:
        with opened(data, max_pixels) as image:
            return upright_rgb(image)
    except Exception as exc:  # noqa: BLE001 - Pillow's plugins raise whatever a damaged file leads them to
        raise _refused(exc) from exc


def size_of(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(width, height) that `decode` gives, having read all of the file: truncation is found. JPEGs cost an eighth."""
    try:
        with opened(data, max_pixels) as image:
            width, height = image.size
            image.draft("RGB", (max(1, width // 8), max(1, height // 8)))
            image.load()
            return (height, width) if _orientation(image) >= 5 else (width, height)
    except Exception as exc:  # noqa: BLE001 - as above
        raise _refused(exc) from exc


def opened(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture before its pixels are decoded. Raises PictureError for more of them than `max_pixels`, and what Pillow does."""
    Image.init()
    image = Image.open(io.BytesIO(data), formats=[name for name in FORMATS if name in Image.OPEN])
    # the size that Pillow has arrived at and will decode, whatever the file's first header says
    if image.width * image.height > max_pixels:
        raise PictureError(f"{image.width} x {image.height} pixels are too many")
    return image


class AtFirstUse(Image.Image):
    """An encoded picture that becomes the decoded one, upright and RGB, when anything of it is asked for.

    Until then it costs its file. The decoder itself is late already, but for a PNG's orientation it must read all the pixels.
    """

    def __init__(self, data: bytes) -> None:      # without Image's own, whose attributes must be missing
        opened(data)
        self.encoded = data

    def __getattr__(self, name: str) -> Any:
        if "encoded" not in vars(self):
            raise AttributeError(name)
        image = opened(self.encoded)
        image = image if is_plain(image) else upright_rgb(image)
        image.load()
        vars(self).update(vars(image))
        del self.encoded
        self.__class__ = type(image)   # type: ignore[assignment]
        return getattr(self, name)

    # what every object has, or the class, is asked of the class that this is from then on
    def __reduce_ex__(self, protocol: Any) -> Any:
        self.load()
        return self.__reduce_ex__(protocol)

    def __repr__(self) -> str:
        self.load()
        return repr(self)

    @property
    def format(self) -> Any:   # type: ignore[override]
        self.load()
        return self.format


def is_plain(image: Image.Image) -> bool:
    """Whether it needs no change to be RGB and upright, so that it may be decoded at its first use."""
    return image.mode == "RGB" and "transparency" not in image.info and _orientation(image) == 1


def upright_rgb(image: Image.Image) -> Image.Image:
    """A picture of any kind -> a new one in RGB, upright."""
    image.load()     # first: formats that turn themselves then do, and metadata may stand behind the pixels
    turn = _TURNS.get(_orientation(image))
    image = rgb(image)
    return image.transpose(Image.Transpose[turn]) if turn else image


def rgb(image: Image.Image) -> Image.Image:
    """A new RGB picture, without metadata: the next reader must not turn it again, nor see a colour key."""
    if image.mode in _DEEP:
        image = _scaled(image)
    if image.mode != "RGB" and (image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info):
        layered = image.convert("RGBA")
        result = Image.new("RGB", image.size, (255, 255, 255))
        result.paste(layered, mask=layered.getchannel("A"))
        return result
    result = image.copy() if image.mode == "RGB" else image.convert("RGB")
    result.info = {}
    return result


def _orientation(image: Image.Image) -> int:
    """EXIF's, 1 to 8; 1 where there is none or it can't be read, which costs nobody the picture."""
    try:
        turn = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # noqa: BLE001 - damaged metadata
        return 1
    return turn if turn in _TURNS else 1


def _scaled(image: Image.Image) -> Image.Image:
    """Deep grey -> 8 bits. 16 bits are 0..65535; other numbers say nothing of their range: it is the smallest of 0..1 (floats),
    0..255 and 0..65535 that holds them all, or else from the least to the largest."""
    import numpy as np

    values = np.nan_to_num(np.asarray(image).astype(np.float64), posinf=0.0, neginf=0.0)
    low, high = 0.0, 65535.0
    if not image.mode.startswith("I;16"):
        least, largest = float(values.min()), float(values.max())
        ranges = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
        low, high = next(((0.0, top) for top in ranges if 0 <= least and largest <= top), (least, largest))
    return Image.fromarray(np.rint((values - low) * (255 / ((high - low) or 1.0))).clip(0, 255).astype(np.uint8))


def _refused(exc: BaseException) -> PictureError:
    if isinstance(exc, Image.UnidentifiedImageError):
        return PictureError("unknown format")   # Pillow's own message shows a memory address
    if isinstance(exc, PictureError):
        return exc
    return PictureError(" ".join((str(exc) or type(exc).__name__).split())[:200])
