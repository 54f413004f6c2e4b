"""The five families of the toy world. Each draws one `Puzzle`: a question, its answer and the tool call that finds it.

| family     | without a tool                                   | needs a tool                                            |
|------------|--------------------------------------------------|---------------------------------------------------------|
| perception | four large digits, legible as the model sees them | -                                                       |
| fine       | -                                                | the same question; digits two pixels high in the model's |
|            |                                                  | view, legible after cropping the original with Python   |
| arithmetic | a sum of two digits                              | a product of two three-digit numbers                    |
| search     | the fact stands in the question                  | the fact is only in the text index                      |
| identity   | the badge's number is drawn on it                | the number is only known to image search                |

The wording is the same in both columns wherever it can be: what has to be judged is the picture, the numbers, the facts
at hand. Guessing pays one time in ten at best.
"""
from __future__ import annotations

import io
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from hdpo.toolserver.layout import COMPACT as layout
from hdpo.toyworld import words
from hdpo.toyworld.glyphs import Glyphs

BADGE_SIDE = 128      # pixels
BLOCKS = 4            # colours along a badge's side
GLYPH_SIDE = 8        # pixels of a scanned digit
TINY, LARGE = range(8, 9), range(84, 109)      # pixels of a digit in the original picture
TINY_BELOW = 12       # smaller digits are cropped closely


@dataclass(frozen=True, slots=True)
class Puzzle:
    """`call` is the assistant's tool call, `observation` and `observation_images` what the tool server answers to it."""

    family: str
    tool_needed: bool | None     # None: a tool helps in some of the questions like this one, and nobody can say in which
    question: str                # with an `<image>` marker for each of `images`
    images: tuple[bytes, ...]
    answer: str
    direct_reason: str           # what a demonstration says before answering at once
    tool_reason: str             # ... before calling the tool
    call: str
    observation: str
    observation_images: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class Source:
    """What puzzles of one split are drawn from; the splits share no glyph, no name and no product."""

    glyphs: Glyphs
    codes: Mapping[str, str]     # name -> gate code
    rumours: Mapping[str, str]   # name -> a wrong gate code, for puzzles in which sources disagree
    names: tuple[str, ...]       # the names of this split
    held_out: bool


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _colours(rng: random.Random) -> tuple[tuple[int, ...], tuple[int, ...]]:
    paper = tuple(rng.randrange(205, 256) for _ in range(3))
    return paper, tuple(rng.randrange(0, 95) for _ in range(3))


def _digit_picture(rng: random.Random, glyphs: Glyphs, digits: list[int], sizes: range, shift: int) -> Image.Image:
    paper, ink = _colours(rng)
    picture = Image.new("RGB", (words.SIDE, words.SIDE), paper)
    quarter = words.SIDE // 4
    for position, digit in enumerate(digits):
        size = sizes[0] if len(sizes) == 1 else rng.randrange(sizes.start, sizes.stop)
        x = quarter * (1 + 2 * (position % 2)) - size // 2 + rng.randint(-shift, shift)
        y = quarter * (1 + 2 * (position // 2)) - size // 2 + rng.randint(-shift, shift)
        mask = glyphs.draw(rng, digit, size)
        picture.paste(ink, (x, y, x + size, y + size), mask)
    return picture


def quadrants(rng: random.Random, source: Source, family: str, needed: bool | None, sizes: range, shift: int,
              wear: float = 0.0) -> Puzzle:
    """Four digits of `sizes` pixels, of which one is asked for; `wear` is how much of the ink's contrast noise hides."""
    digits = [rng.randrange(10) for _ in range(4)]
    position = rng.randrange(4)
    tiny = sizes.stop <= TINY_BELOW
    picture = _digit_picture(rng, source.glyphs, digits, sizes, shift)
    boxes = words.TINY_BOXES if tiny else words.LARGE_BOXES
    if wear:
        picture = _worn(rng, picture, boxes, max(1, sizes.start // GLYPH_SIDE), wear)
    box = boxes[position]
    return Puzzle(
        family=family, tool_needed=needed,
        question="<image>" + words.ASK_DIGIT.format(words.POSITIONS[position]), images=(png(picture),),
        answer=str(digits[position]), direct_reason=words.SEE, tool_reason=words.LOOK_CLOSER,
        call=words.PYTHON_CALL.format(words.crop_code(position, tiny)),
        observation=layout.python_result("", "", 1), observation_images=(png(picture.crop(box)),))


def _worn(rng: random.Random, picture: Image.Image, boxes: Sequence[tuple[int, int, int, int]], grain: int,
          wear: float) -> Image.Image:
    """Grey noise in grains of `grain` pixels over the boxes: as coarse as the strokes, so that no zoom brings them back."""
    pixels = np.asarray(picture).astype(np.int16)
    noise = np.random.RandomState(rng.randrange(2**32))
    for left, top, right, bottom in boxes:
        shape = (-(-(bottom - top) // grain), -(-(right - left) // grain))
        grains = np.rint(noise.normal(0.0, 255 * wear, shape)).astype(np.int16)
        spread = grains.repeat(grain, 0).repeat(grain, 1)[:bottom - top, :right - left]
        pixels[top:bottom, left:right] += spread[:, :, None]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def perception(rng: random.Random, source: Source) -> Puzzle:
    return quadrants(rng, source, "perception", False, LARGE, 7)


def fine(rng: random.Random, source: Source) -> Puzzle:
    return quadrants(rng, source, "fine", True, TINY, 1)


def arithmetic(expression: str, answer: int, tool_needed: bool | None) -> Puzzle:
    return Puzzle(
        family="arithmetic", tool_needed=tool_needed, question=words.ASK_SUM.format(expression), images=(),
        answer=str(answer), direct_reason=words.KNOW, tool_reason=words.COMPUTE,
        call=words.PYTHON_CALL.format(f"print({expression})"), observation=layout.python_result(f"{answer}\n", "", 0))


def easy_sum(rng: random.Random, source: Source) -> Puzzle:
    a, b = rng.randrange(10), rng.randrange(10)
    return arithmetic(f"{a}+{b}", a + b, tool_needed=False)


def product(rng: random.Random, source: Source) -> Puzzle:
    while True:
        a, b = rng.randrange(101, 1000), rng.randrange(101, 1000)
        if ((a + b) % 4 == 3) == source.held_out:
            return arithmetic(f"{a}*{b}", a * b, tool_needed=True)


def _search(rng: random.Random, source: Source, told: bool) -> Puzzle:
    name = source.names[rng.randrange(len(source.names))]
    code = source.codes[name]
    fact, question = words.FACT.format(name, code), words.ASK_FACT.format(name)
    return Puzzle(
        family="search", tool_needed=not told, question=f"{fact} {question}" if told else question, images=(), answer=code,
        direct_reason=words.TOLD, tool_reason=words.SEARCH, call=words.TEXT_CALL.format(name),
        observation=layout.search_results(name, [(name, words.LINK, fact)]))


def told_fact(rng: random.Random, source: Source) -> Puzzle:
    return _search(rng, source, told=True)


def hidden_fact(rng: random.Random, source: Source) -> Puzzle:
    return _search(rng, source, told=False)


def _identity(rng: random.Random, source: Source, drawn: bool) -> Puzzle:
    number = str(rng.randrange(10, 100))
    badge = Image.new("RGB", (BADGE_SIDE, BADGE_SIDE))
    draw, block, half = ImageDraw.Draw(badge), BADGE_SIDE // BLOCKS, BADGE_SIDE // 2
    for y in range(BLOCKS):
        for x in range(BLOCKS):
            colour = tuple(rng.randrange(256) for _ in range(3))
            draw.rectangle((x * block, y * block, (x + 1) * block - 1, (y + 1) * block - 1), fill=colour)
    if drawn:
        draw.rectangle((0, half, BADGE_SIDE, BADGE_SIDE), fill=(255, 255, 255))
        for place, digit in enumerate(number):
            size = rng.randrange(44, 55)
            x = half // 2 + place * half - size // 2 + rng.randint(-3, 3)
            y = half + half // 2 - size // 2 + rng.randint(-3, 3)
            badge.paste(_colours(rng)[1], (x, y, x + size, y + size), source.glyphs.draw(rng, int(digit), size))
    picture = png(badge)
    return Puzzle(
        family="identity", tool_needed=not drawn, question="<image>" + words.ASK_BADGE, images=(picture,), answer=number,
        direct_reason=words.READ, tool_reason=words.LOOK_UP, call=words.IMAGE_CALL,
        observation=layout.image_results([words.BADGE_TITLE.format(number)], [True]), observation_images=(picture,))


def labelled_badge(rng: random.Random, source: Source) -> Puzzle:
    return _identity(rng, source, drawn=True)


def plain_badge(rng: random.Random, source: Source) -> Puzzle:
    return _identity(rng, source, drawn=False)


CYCLE: tuple[Callable[[random.Random, Source], Puzzle], ...] = (
    perception, fine, easy_sum, product, told_fact, hidden_fact, labelled_badge, plain_badge, perception, fine)
"""Ten puzzles in which every family comes twice and half need a tool."""

PLAIN_CYCLE: tuple[Callable[[random.Random, Source], Puzzle], ...] = (
    perception, perception, easy_sum, told_fact, labelled_badge, perception)
"""Puzzles that need no tool, for demonstrations that offer none; seeing is the hardest of these skills."""
