"""A picture's origin says every one of its pixels, or there is none."""
from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw

from hdpo.agent.images import bound_image, decode_image, encode_png
from hdpo.state.origins import Origin, Originals, box_of, made_again, origin_of
from hdpo.types import Task


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def page(width: int, height: int) -> Image.Image:
    """White, with few words: most boxes of it look alike."""
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    for line in range(40, height, 60):
        draw.text((30 + line % 7, line), f"line {line} of the page", fill="black")
    return image


def encoded(image: Image.Image, kind: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("whole", [noise(300, 200), page(400, 300), Image.new("RGB", (90, 70), (3, 4, 5))], ids=str)
def test_every_box_of_a_picture_is_found_and_is_the_same_pixels(whole: Image.Image) -> None:
    coin = np.random.default_rng(3)
    for _ in range(12):
        left, top = (int(coin.integers(0, edge)) for edge in whole.size)
        right, bottom = (int(coin.integers(low + 1, edge + 1)) for low, edge in zip((left, top), whole.size))
        part = whole.crop((left, top, right, bottom))
        box = box_of(part, whole)
        assert box is not None and whole.crop(box).tobytes() == part.tobytes()


@pytest.mark.parametrize("change", [
    lambda part: Image.eval(part, lambda value: value ^ 1), lambda part: part.resize((part.width * 2, part.height)),
    lambda part: part.transpose(Image.Transpose.FLIP_LEFT_RIGHT), lambda part: part.convert("L").convert("RGB"),
    lambda part: Image.composite(part, Image.new("RGB", part.size), Image.eval(part.getchannel(0), lambda _: 255).crop(
        (0, 0, part.width - 1, part.height)).resize(part.size, Image.Resampling.NEAREST)) and noise(*part.size, seed=9)])
def test_what_is_no_box_of_a_picture_is_not_taken_for_one(change: object) -> None:
    whole = noise(300, 200)
    assert box_of(change(whole.crop((10, 20, 130, 120))), whole) is None   # type: ignore[operator]
    assert box_of(noise(301, 10), whole) is None
    one_pixel_off = whole.crop((10, 20, 130, 120))
    one_pixel_off.putpixel((77, 55), (1, 2, 3))
    assert box_of(one_pixel_off, whole) is None


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("JPEG", {"quality": 90}), ("WEBP", {"lossless": 1})])
def test_what_a_tool_sends_is_named_by_a_box_or_by_its_own_file_and_made_again_to_the_pixel(kind: str, options: dict) -> None:
    """The model's code decodes the same file; what it sends may be smaller or larger than what the model sees of it."""
    first, second = encoded(noise(80, 60), "PNG"), encoded(page(500, 420), kind, **options)
    task = Task("t", "toy", [], (first, second), "")
    whole = decode_image(second, "")
    for came, wanted in ((whole.crop((31, 17, 431, 357)), 1), (whole, 1), (whole.crop((31, 17, 131, 97)).resize((400, 320)), -1)):
        file = encode_png(came)
        seen = bound_image(decode_image(file, ""), 32, 1024, 64 * 1024)
        origin = origin_of(seen, file, task, 4, Originals())
        assert origin is not None and origin.picture == wanted and (origin.box is None) is (wanted < 0 or file == second)
        source = decode_image(file if wanted < 0 else second, "")
        assert made_again(origin, seen.size, source).tobytes() == seen.tobytes()


def test_a_prompts_picture_is_the_rows_own() -> None:
    file = encoded(noise(300, 200), "JPEG")
    seen = bound_image(decode_image(file, ""), 32, 1024, 64 * 1024)
    assert origin_of(seen, file, Task("t", "toy", [], (b"other", file), ""), 0, Originals()) == Origin(1)


def test_pixels_that_no_file_says_have_no_origin() -> None:
    whole, seen = encoded(noise(300, 200), "PNG"), noise(64, 64, 5)
    task = Task("t", "toy", [], (whole,), "")
    for file in (whole, encode_png(noise(64, 64, 6)), encoded(seen, "JPEG"), b"no picture"):
        assert origin_of(seen, file, task, 0, Originals()) is None
    assert origin_of(seen, encode_png(seen), task, 0, Originals()) is None, "noise: the file is larger than its pixels' number"
    assert origin_of(seen, encode_png(seen), Task("t", "toy", [], (b"no picture",), ""), 0, Originals()) is None
