"""The one decoder: what strangers' files become, and that nothing else comes out of it than a picture or its refusal."""
from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from odd_files import BROKEN, chunk, corners, encoded, header, png
from PIL import EpsImagePlugin, Image

import hdpo
from hdpo import pictures
from hdpo.agent.images import check_image, decode_image
from hdpo.errors import DataError

SANDBOX = Path(__file__).parents[2] / "sandbox"


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def test_trainer_tool_server_and_sandbox_read_one_file() -> None:
    assert (Path(hdpo.__file__).parent / "pictures.py").samefile(SANDBOX / "pictures.py")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_comes_out_upright_and_its_checked_size_is_the_decoded_one(kind: str, orientation: int) -> None:
    back = {1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
            5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
            8: Image.Transpose.ROTATE_270}[orientation]
    stored = corners() if back is None else corners().transpose(back)
    options = {"quality": 95} if kind in ("JPEG", "WEBP") else {}
    data = encoded(stored, kind, exif=turned(orientation), **options)
    image = decode_image(data, "photo")
    assert image.size == check_image(data, "photo") == (40, 24)
    assert np.abs(np.asarray(image, int)[3::6, 5::10] - np.asarray(corners(), int)[3::6, 5::10]).max() < 40
    assert image.getexif().get(0x0112, 1) == 1     # or the next reader turns it again


def test_damaged_metadata_costs_nobody_the_picture() -> None:
    data = encoded(corners(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12\0\3\0\0\0\1")
    assert decode_image(data, "photo").size == check_image(data, "photo") == (40, 24)


RAMP = np.linspace(0, 1, 256)[None, :].repeat(4, 0)


@pytest.mark.parametrize(("values", "kind"), [
    ((RAMP * 65535).astype(np.uint16), "PNG"), ((RAMP * 65535).astype(np.uint16), "TIFF"), ((RAMP * 65535).astype(">u2"), "TIFF"),
    ((RAMP * 65535).astype(np.int32), "TIFF"), (RAMP.astype(np.float32), "TIFF"), ((RAMP * 255).astype(np.float32), "TIFF"),
    ((RAMP * 65535).astype(np.float32), "TIFF"), ((RAMP * 7e6 - 3e6).astype(np.float32), "TIFF"),
    ((RAMP * 7e6 - 3e6).astype(np.int32), "TIFF")], ids=lambda value: getattr(value, "dtype", value))
def test_deep_greys_keep_all_their_levels(values: np.ndarray, kind: str) -> None:
    decoded = np.asarray(decode_image(encoded(Image.fromarray(values), kind), "ramp"), int)
    assert np.abs(decoded - np.arange(256)[None, :, None]).max() <= 1


def test_numbers_that_are_none_are_black() -> None:
    values = np.array([[np.nan, 0.0, 1.0, np.inf]], np.float32)
    assert np.asarray(decode_image(encoded(Image.fromarray(values), "TIFF"), "odd"))[0, :, 0].tolist() == [0, 0, 255, 0]


def test_a_colour_key_of_an_rgb_file_is_no_transparency_as_for_the_processors_of_models() -> None:
    image = Image.new("RGB", (2, 1), (9, 9, 9))
    data = encoded(image, "PNG", transparency=(9, 9, 9))
    decoded = decode_image(data, "key")
    assert decoded.tobytes() == Image.open(io.BytesIO(data)).convert("RGB").tobytes() == image.tobytes()
    assert decoded.convert("RGBA").getchannel("A").getextrema() == (255, 255)


@pytest.mark.parametrize("first", [(1, 1), (13_000, 13_000)])
def test_the_pixel_limit_holds_for_what_pillow_would_decode(first: tuple[int, int]) -> None:
    second = (13_000, 13_000) if first == (1, 1) else (1, 1)
    data = png(header(*first), header(*second), chunk(b"IDAT", zlib.compress(bytes(4))))
    for reader in (decode_image, check_image):
        if first == (1, 1):
            with pytest.raises(DataError, match="13000 x 13000 pixels are too many"):
                reader(data, "picture")
        else:
            reader(data, "picture")
    with pytest.raises(DataError, match="40 x 24 pixels are too many"):
        decode_image(encoded(corners(), "PNG"), "tool picture", max_pixels=959)


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_picture_is_refused_in_one_line(name: str) -> None:
    for reader in (decode_image, check_image):
        with pytest.raises(DataError, match="^row 3: not a readable image") as caught:
            reader(BROKEN[name], "row 3")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [IndexError, RuntimeError, NotImplementedError, AttributeError, RecursionError, MemoryError,
                                   KeyError, struct.error, AssertionError, ZeroDivisionError])
def test_whatever_pillow_raises_is_a_refusal(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: Image.Image) -> None:
        raise error("two\nlines")
    data = encoded(corners(), "PNG")
    monkeypatch.setattr(Image.Image, "load", load)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    for reader in (decode_image, check_image):
        with pytest.raises(DataError, match="^row 3: not a readable image .*two.*lines"):
            reader(data, "row 3")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damage_anywhere_in_a_file_is_a_refusal_or_a_picture() -> None:
    generator = np.random.default_rng(7)
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000"):
        whole = encoded(corners(), kind)
        for _ in range(60):
            data = bytearray(whole[:generator.integers(1, len(whole) + 1)])
            for place in generator.integers(0, len(data), 3):
                data[place] = generator.integers(0, 256)
            outcomes = []
            for reader in (decode_image, check_image):
                try:
                    found = reader(bytes(data), "row")
                    outcomes.append(found if isinstance(found, tuple) else found.size)
                except DataError:
                    outcomes.append(None)
            assert outcomes[0] == outcomes[1]


def test_no_program_is_started_for_a_postscript_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("started"))
    with pytest.raises(DataError, match="unknown format"):
        decode_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n", "page")
    assert "EPS" not in pictures.FORMATS
