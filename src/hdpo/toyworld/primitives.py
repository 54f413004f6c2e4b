"""What the toy base is pretrained on: the skills of the toy world one by one, never its tool policy.

Naming a digit at a position, reading a crop or a plate, telling large from tiny, copying out of observations, writing a
call whose content is given, single-digit sums. There is no system prompt, and no question offers a choice between
answering and calling a tool: that choice belongs to SFT and RL. Pictures are drawn at the model's own resolution, in
batches (`toy_tensors`).
"""
from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from hdpo.toolserver.layout import COMPACT as layout
from hdpo.toyworld import words
from hdpo.toyworld.glyphs import Glyphs, load_glyphs
from hdpo.toyworld.tokenizer import VIEW

HALF = VIEW // 2
REASONS = {"view": words.SEE, "badge": words.READ, "crop": words.FOUND, "copy": words.FOUND, "sum": words.KNOW}
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
    """Draws lessons from a seed; `split` chooses the glyphs, `reasons` is the share of answers that follow a reason."""

    def __init__(self, seed: int, split: str = "train", reasons: float = 0.7) -> None:
        self.random = random.Random(seed)
        self.reasons = reasons
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
                turns.append((layout.image_results([words.BADGE_TITLE.format(code)], [True]) + "{image}", code))
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
            kinds = self.random.choices(words.KINDS, k=self.random.randint(1, 4))
            name = " ".join([self.random.choice(words.STEMS), *kinds])
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
        if lesson.kind in REASONS:
            lesson.turns = [(user, self._answered(lesson.kind, answer)) for user, answer in lesson.turns]
        return lesson

    def _answered(self, kind: str, answer: str) -> str:
        """In answer tags, most often after a short reason: what is asked must still be known at the end of the sentence."""
        reason = f"<reason>{REASONS[kind]}</reason>\n" if self.random.random() < self.reasons else ""
        return f"{reason}<answer>{answer}</answer>"

    def batch(self, rows: int) -> list[Lesson]:
        return [self.lesson() for _ in range(rows)]
