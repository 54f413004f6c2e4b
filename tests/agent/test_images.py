"""Decoding and bounding of images."""
from __future__ import annotations

import base64
import io

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image

from hdpo.agent import images
from hdpo.errors import DataError

EDGE = st.integers(1, 20_000)


def noise(width: int, height: int) -> Image.Image:
    return Image.effect_noise((width, height), 80).convert("RGB")


def encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind)
    return buffer.getvalue()


@given(EDGE, EDGE, st.sampled_from([16, 28, 32]), st.integers(1, 4096), st.integers(1, 1000))
def test_a_bounded_size_keeps_all_rules_and_bounding_it_again_changes_nothing(
        width: int, height: int, factor: int, min_cells: int, more: int) -> None:
    low, high = min_cells * factor**2, (min_cells + more) * factor**2
    try:
        size = images.bounded_size(width, height, factor, low, high)
    except ValueError:
        assume(False)
    assert size[0] % factor == size[1] % factor == 0
    assert low <= size[0] * size[1] <= high
    assert max(size) / min(size) <= 200
    assert images.bounded_size(*size, factor, low, high) == size


@given(EDGE, EDGE)
def test_the_processor_of_transformers_leaves_bounded_sizes_alone(width: int, height: int) -> None:
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize
    for factor, low, high in ((32, 4 * 32**2, 5120 * 32**2), (28, 56 * 56, 1280 * 28**2), (16, 4096, 4096)):
        wide, tall = images.bounded_size(width, height, factor, low, high)
        assert smart_resize(tall, wide, factor, low, high) == (tall, wide)


@given(st.integers(40, 8000), st.integers(40, 8000))
def test_ordinary_pictures_get_exactly_the_size_of_smart_resize(width: int, height: int) -> None:
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize
    assume(max(width, height) / min(width, height) < 20)
    tall, wide = smart_resize(height, width, 32, 4 * 32**2, 5120 * 32**2)
    assert images.bounded_size(width, height, 32, 4 * 32**2, 5120 * 32**2) == (wide, tall)


def test_a_bounded_image_is_returned_as_the_same_object() -> None:
    bounded = images.bound_image(noise(101, 77), 16, 1024, 65536)
    assert images.bound_image(bounded, 16, 1024, 65536) is bounded


def test_bounds_without_any_fitting_size_are_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 32"):
        images.bounded_size(100, 100, 32, 10, 1000)


def test_tokens_are_one_per_factor_squared_pixels() -> None:
    assert images.num_image_tokens((64, 32), 16) == 8


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "I;16", "LA", "RGBA"])
def test_every_pixel_format_decodes_to_rgb(mode: str) -> None:
    kind = "TIFF" if mode in ("CMYK", "I;16") else "PNG"
    decoded = images.decode_image(encoded(Image.new(mode, (9, 7)), kind), "picture")
    assert decoded.mode == "RGB" and decoded.size == (9, 7)


def test_transparency_is_laid_on_white() -> None:
    glass = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    glass.putpixel((1, 0), (10, 20, 30, 255))
    decoded = images.decode_image(encoded(glass, "PNG"), "glass")
    assert decoded.getpixel((0, 0)) == (255, 255, 255) and decoded.getpixel((1, 0)) == (10, 20, 30)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_truncated_files_are_refused_by_name_whether_checked_or_decoded(kind: str) -> None:
    whole = encoded(noise(120, 90), kind)
    assert images.check_image(whole, "row 3") == (120, 90)
    for reader in (images.check_image, images.decode_image):
        for data in (whole[:len(whole) // 2], b"", b"not an image"):
            with pytest.raises(DataError, match="^row 3: not a readable image"):
                reader(data, "row 3")


def test_a_decompression_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match="bomb"):
        images.decode_image(encoded(noise(64, 64), "PNG"), "bomb")


def test_content_keys_tell_pixels_and_shapes_apart_and_nothing_else() -> None:
    flat = Image.new("RGB", (4, 8))
    changed = flat.copy()
    changed.putpixel((0, 0), (1, 0, 0))
    keys = [images.content_key(i) for i in (flat, flat.copy(), changed, Image.new("RGB", (8, 4)))]
    assert keys[0] == keys[1] and len(set(keys)) == 3


def test_png_and_data_url_are_lossless() -> None:
    picture = noise(30, 20)
    assert images.decode_image(images.encode_png(picture), "png").tobytes() == picture.tobytes()
    head, _, body = images.data_url(picture).partition(",")
    assert head == "data:image/png;base64" and base64.b64decode(body) == images.encode_png(picture)
