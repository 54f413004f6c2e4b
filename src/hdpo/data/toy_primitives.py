"""What the toy base is pretrained on: the skills of the toy world one by one, never its tool policy.

Naming a digit at a position, reading a crop or a plate, telling large from tiny, copying out of observations, writing a
call whose content is given, single-digit sums. There is no system prompt, and no question offers a choice between
answering and calling a tool: that choice belongs to SFT and RL. Pictures are drawn at the model's own resolution, in
batches; `draw_batch` gives what the image processor would make of the originals.
"""
from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from hdpo.data import toy_words as words
from hdpo.data.toy_glyphs import Glyphs, load_glyphs
from hdpo.data.toy_tokenizer import IMAGE_TOKENS, MERGE, PATCH, TEMPORAL, VIEW
from hdpo.toolserver import layout

IMAGE = "<|vision_start|>" + "<|image_pad|>" * IMAGE_TOKENS + "<|vision_end|>"
HALF = VIEW // 2
CORNERS = ((0, 0), (HALF, 0), (0, HALF), (HALF, HALF))


@dataclass
class Stamp:
    """One digit: glyph row, centre (x, y), size and angle in view pixels and radians; clipped to its cell."""

    glyph: int
    cell: tuple[int, int, int]     # x, y, side
    centre: tuple[float, float]
    size: float
    angle: float


@dataclass
class Picture:
    """`blocks` [4, 4, 3] colours of a badge, or None for paper; `plate` whitens the lower half."""

    paper: tuple[float, float, float]
    ink: tuple[float, float, float]
    stamps: list[Stamp] = field(default_factory=list)
    blocks: np.ndarray | None = None
    plate: bool = False


@dataclass
class Lesson:
    """A conversation: turns of (user text, assistant text), `{image}` in a user text for each picture."""

    kind: str
    turns: list[tuple[str, str]]
    pictures: list[Picture]


class Teacher:
    """Draws lessons from a seed; `split` chooses the glyphs."""

    def __init__(self, seed: int, split: str = "train") -> None:
        self.random = random.Random(seed)
        self.glyphs: Glyphs = load_glyphs(split)

    # pictures -------------------------------------------------------------------------------------------------------
    def _stamp(self, digit: int, cell: tuple[int, int, int], size: float, shift: float) -> Stamp:
        r = self.random
        x, y, side = cell
        centre = (x + side / 2 + r.uniform(-shift, shift), y + side / 2 + r.uniform(-shift, shift))
        rows = self.glyphs.by_digit[digit]
        return Stamp(int(rows[r.randrange(len(rows))]), cell, centre, size, r.uniform(-0.12, 0.12))

    def _colours(self) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
        r = self.random
        paper = (r.uniform(0.78, 1), r.uniform(0.78, 1), r.uniform(0.78, 1))
        ink = (r.uniform(0, 0.4), r.uniform(0, 0.4), r.uniform(0, 0.4))
        return paper, ink

    def quadrants(self, digits: list[int], tiny: bool) -> Picture:
        picture = Picture(*self._colours())
        for digit, (x, y) in zip(digits, CORNERS, strict=True):
            size = self.random.uniform(1.8, 2.3) if tiny else self.random.uniform(19.5, 28)
            picture.stamps.append(self._stamp(digit, (x, y, HALF), size, 0.6 if tiny else 2.3))
        return picture

    def crop(self, digit: int) -> Picture:
        picture = Picture(*self._colours())
        size = self.random.choice((self.random.uniform(29, 36), self.random.uniform(40, 56)))
        picture.stamps.append(self._stamp(digit, (0, 0, VIEW), size, 5))
        return picture

    def badge(self, number: str) -> Picture:
        blocks = np.array([[[self.random.random() for _ in range(3)] for _ in range(4)] for _ in range(4)])
        picture = Picture((1.0, 1.0, 1.0), self._colours()[1], [], blocks, bool(number))
        for place, digit in enumerate(number):
            cell = (place * HALF, HALF, HALF)
            picture.stamps.append(self._stamp(int(digit), cell, self.random.uniform(20, 28), 2))
        return picture

    # lessons --------------------------------------------------------------------------------------------------------
    def _number(self, low: int, high: int) -> str:
        length = self.random.randint(low, high)
        return str(self.random.randrange(10 ** (length - 1), 10 ** length))

    def _name(self) -> str:
        return f"{self.random.choice(words.STEMS)} {self.random.choice(words.KINDS)}"

    def _digits(self) -> list[int]:
        return [self.random.randrange(10) for _ in range(4)]

    def view(self) -> Lesson:
        digits, order = self._digits(), self.random.sample(range(4), 4)
        turns = [(words.ASK_DIGIT.format(words.POSITIONS[p]), str(digits[p])) for p in order]
        return self._about(turns, self.quadrants(digits, tiny=False), "view")

    def size(self) -> Lesson:
        tiny = self.random.random() < 0.5
        turns = [("How large are the digits?", "tiny" if tiny else "large")]
        for p in self.random.sample(range(4), 2):
            turns.append((f"Crop the {words.POSITIONS[p]}.", words.crop_code(p, tiny)))
        self.random.shuffle(turns)
        return self._about(turns, self.quadrants(self._digits(), tiny), "size")

    @staticmethod
    def _about(turns: list[tuple[str, str]], picture: Picture, kind: str) -> Lesson:
        return Lesson(kind, [("{image}" + turns[0][0], turns[0][1]), *turns[1:]], [picture])

    def crops(self) -> Lesson:
        digits = self._digits()[:3]
        ask = [self.random.choice(("{image}Which digit is this?", layout.python_result("", "", 1) + "{image}"))
               for _ in digits]
        return Lesson("crop", [(a, str(d)) for a, d in zip(ask, digits, strict=True)], [self.crop(d) for d in digits])

    def badges(self) -> Lesson:
        numbers = [str(self.random.randrange(10, 100)) for _ in range(3)]
        pictures = [self.badge(n) for n in numbers]
        return Lesson("badge", [("{image}" + words.ASK_BADGE, n) for n in numbers], pictures)

    def copies(self) -> Lesson:
        turns: list[tuple[str, str]] = []
        pictures: list[Picture] = []
        for _ in range(3):
            name, code, kind = self._name(), str(self.random.randrange(1000, 10000)), self.random.randrange(5)
            fact = words.FACT.format(name, code)
            if kind == 0:
                code = self._number(1, 6)
                turns.append((layout.python_result(code, "", 0), code))
            elif kind == 1:
                turns.append((layout.search_results(name, [(name, words.LINK, fact)]), code))
            elif kind == 2:
                code = str(self.random.randrange(10, 100))
                pictures.append(self.badge(self.random.choice(("", code))))
                turns.append((layout.image_results([words.BADGE_TITLE.format(code)]) + "{image}", code))
            elif kind == 3:
                turns.append((f"{fact} {words.ASK_FACT.format(name)}", code))
            else:
                code = self.random.choice((self._number(2, 6), name))
                turns.append((f"Repeat {code}.", code))
        return Lesson("copy", turns, pictures)

    def calls(self) -> Lesson:
        turns = []
        for _ in range(3):
            kind = self.random.randrange(5)
            if kind < 2:
                low, high = ((1, 1), (2, 4))[kind]
                code = f"{self._number(low, high)}{self.random.choice('+*')}{self._number(low, high)}"
                turns.append((f"Compute {code}.", words.PYTHON_CALL.format(f"print({code})")))
            elif kind < 4:
                name = self._name()
                turns.append((f"Find {name}.", words.TEXT_CALL.format(name)))
            else:
                turns.append(("Find this image.", words.IMAGE_CALL))
        return Lesson("call", turns, [])

    def names(self) -> Lesson:
        """Names of one to four words, so that copying goes on from word to word instead of stopping after the first."""
        turns = []
        for _ in range(4):
            name = " ".join([self.random.choice(words.STEMS), *self.random.choices(words.KINDS, k=self.random.randint(1, 4))])
            if self.random.random() < 0.5:
                turns.append((f"Repeat {name}.", name))
            else:
                turns.append((f"Find {name}.", words.TEXT_CALL.format(name)))
        return Lesson("name", turns, [])

    def sums(self) -> Lesson:
        turns = []
        for _ in range(5):
            a, b = self.random.randrange(10), self.random.randrange(10)
            turns.append((words.ASK_SUM.format(f"{a}+{b}"), str(a + b)))
        return Lesson("sum", turns, [])

    def lesson(self) -> Lesson:
        kinds: list[Callable[[], Lesson]] = [
            self.view, self.size, self.crops, self.badges, self.copies, self.calls, self.names, self.sums]
        lesson = self.random.choices(kinds, (0.22, 0.03, 0.14, 0.12, 0.11, 0.06, 0.25, 0.07))[0]()
        if lesson.kind in ("view", "crop", "badge", "copy", "sum"):
            lesson.turns = [(user, f"<answer>{answer}</answer>") for user, answer in lesson.turns]
        return lesson

    def batch(self, rows: int) -> list[Lesson]:
        return [self.lesson() for _ in range(rows)]


# tensors ----------------------------------------------------------------------------------------------------------------
def _paste(canvas: torch.Tensor, pictures: list[Picture], glyphs: Glyphs, side: int, tiny: bool) -> None:
    """Blend all stamps whose cell is `side` wide into canvas [pictures, 3, VIEW, VIEW]."""
    found = [(i, s) for i, p in enumerate(pictures) for s in p.stamps if s.cell[2] == side and (s.size < 6) == tiny]
    if not found:
        return
    ink = torch.from_numpy(glyphs.ink[[s.glyph for _, s in found]])[:, None]
    if tiny:   # two pixels: average instead of sampling between pixels
        ink = F.avg_pool2d(ink, 4)
    local = torch.tensor([[s.centre[0] - s.cell[0], s.centre[1] - s.cell[1], s.size, s.angle] for _, s in found])
    step = torch.arange(side) + 0.5
    y, x = torch.meshgrid(step, step, indexing="ij")
    dx, dy = x - local[:, 0, None, None], y - local[:, 1, None, None]
    cos, sin = torch.cos(local[:, 3])[:, None, None], torch.sin(local[:, 3])[:, None, None]
    half = local[:, 2, None, None] / 2
    grid = torch.stack([(dx * cos + dy * sin) / half, (dy * cos - dx * sin) / half], -1)
    mask = F.grid_sample(ink, grid, "bilinear" if tiny else "bicubic", "zeros", False).clamp(0, 1)
    for (i, s), m in zip(found, mask, strict=True):
        area = canvas[i, :, s.cell[1]:s.cell[1] + side, s.cell[0]:s.cell[0] + side]
        area += (torch.tensor(pictures[i].ink)[:, None, None] - area) * m


def draw_batch(pictures: list[Picture], glyphs: Glyphs) -> torch.Tensor:
    """Pictures as uint8 [pictures, 3, VIEW, VIEW]."""
    canvas = torch.tensor([p.paper for p in pictures])[:, :, None, None].repeat(1, 1, VIEW, VIEW)
    for i, p in enumerate(pictures):
        if p.blocks is not None:
            blocks = torch.from_numpy(p.blocks).float().permute(2, 0, 1)
            rows = blocks.repeat_interleave(VIEW // 4, 1).repeat_interleave(VIEW // 4, 2)
            canvas[i] = rows
            if p.plate:
                canvas[i, :, HALF:] = 1.0
    for side, tiny in ((HALF, False), (HALF, True), (VIEW, False)):
        _paste(canvas, pictures, glyphs, side, tiny)
    return (canvas * 255).round().to(torch.uint8)


def patchify(images: torch.Tensor) -> torch.Tensor:
    """uint8 [N, 3, VIEW, VIEW] -> the processor's pixel_values [N * patches, 3 * TEMPORAL * PATCH * PATCH]."""
    n, cells = len(images), VIEW // PATCH // MERGE
    x = (images.float() / 255 - 0.5) / 0.5
    x = x.reshape(n, 3, cells, MERGE, PATCH, cells, MERGE, PATCH).permute(0, 2, 5, 3, 6, 1, 4, 7)
    x = x.unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, TEMPORAL, -1, -1)
    return x.reshape(n * (VIEW // PATCH) ** 2, 3 * TEMPORAL * PATCH * PATCH)


def positions(ids: list[int], vision_start: int) -> np.ndarray:
    """M-RoPE positions [3, L]: text counts up, an image spans time x rows x columns and advances by its side."""
    side = VIEW // PATCH // MERGE
    row, column = np.repeat(np.arange(side), side), np.tile(np.arange(side), side)
    parts, start, at = [], 0, 0
    array = np.asarray(ids)
    for where in np.flatnonzero(array == vision_start):
        text = where + 1 - start
        parts.append(np.tile(np.arange(at, at + text), (3, 1)))
        at += text
        parts.append(at + np.stack([np.zeros_like(row), row, column]))
        at += side
        start = where + 1 + IMAGE_TOKENS
    parts.append(np.tile(np.arange(at, at + len(array) - start), (3, 1)))
    return np.concatenate(parts, 1)


@dataclass
class LessonBatch:
    """Right-padded rows: input_ids, labels [B, L] (labels -100 where not trained), position_ids [3, B, L], pixels."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    pixel_values: torch.Tensor
    num_images: int


def collate(lessons: list[Lesson], tokenizer: Any, glyphs: Glyphs) -> LessonBatch:
    texts = ["".join(f"<|im_start|>user\n{u.replace('{image}', IMAGE)}<|im_end|>\n<|im_start|>assistant\n{a}<|im_end|>\n"
                     for u, a in lesson.turns) for lesson in lessons]
    pictures = [p for lesson in lessons for p in lesson.pictures]
    rows = [e.ids for e in tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)]
    start, end, vision = (tokenizer.convert_tokens_to_ids(t) for t in ("<|im_start|>", "<|im_end|>", "<|vision_start|>"))
    assistant = tokenizer.encode("assistant")[0]
    length = max(map(len, rows))
    ids = np.full((len(rows), length), tokenizer.pad_token_id)
    labels = np.full((len(rows), length), -100)
    where = np.zeros((3, len(rows), length), dtype=np.int64)
    for b, row in enumerate(rows):
        ids[b, :len(row)] = row
        where[:, b, :len(row)] = positions(row, vision)
        trained = False
        for t, token in enumerate(row):
            if trained:
                labels[b, t] = token
                trained = token != end
            elif t >= 2 and row[t - 1] == assistant and row[t - 2] == start:
                trained = True   # this token is the newline after the role
    return LessonBatch(torch.from_numpy(ids), torch.from_numpy(labels), torch.from_numpy(where),
                       patchify(draw_batch(pictures, glyphs)) if pictures else torch.empty(0), len(pictures))
