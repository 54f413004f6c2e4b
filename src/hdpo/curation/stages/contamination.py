"""Stage 4, decontamination: no row whose picture or question stands in a benchmark.

Three-valued: of a picture that can't be compared nothing is known. Such a row is counted as unknown, named in its
extra_info, and kept or dropped as a setting says.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from hdpo.agent.images import decode_image
from hdpo.config.curation import DecontaminationSettings
from hdpo.curation.benchmarks import Known
from hdpo.curation.likeness import likeness, looks, numbers_of, runs_of, same_shape, says_something, thumbnail, words_of
from hdpo.curation.record import Outcome, Record, Waits
from hdpo.errors import DataError

COMMON = 3
"""Problems of a benchmark that may share a run of words before it counts as the benchmark's form."""
LOOKED_AT = 8
"""Candidates of a picture that are compared closely, the nearest first."""


class Contamination:
    """`run` is a stage of the job. `known` holds the benchmarks; None (nothing to compare with) keeps every row."""

    def __init__(self, known: Known | None, settings: DecontaminationSettings) -> None:
        self._known, self._settings = known, settings
        self._runs: dict[tuple[str, ...], list[int]] = {}
        self._sizes: list[int] = []                     # runs of each question that count
        self._numbers: list[frozenset[str]] = []
        self._whole: dict[tuple[str, ...], int] = {}    # short questions without a picture
        if known is not None:
            self._index(known)

    def _index(self, known: Known) -> None:
        words = [words_of(text) for *_, text in known.questions]
        length, least = self._settings.question_ngram, self._settings.question_words
        problems: dict[tuple[str, tuple[str, ...]], set[str]] = {}
        for (benchmark, _, cluster, _), some in zip(known.questions, words, strict=True):
            for run in set(runs_of(some, length)):
                problems.setdefault((benchmark, run), set()).add(cluster)
        shown = set(known.places.tolist())
        for number, some in enumerate(words):
            benchmark = known.questions[number][0]
            own = {run for run in runs_of(some, length) if len(problems[benchmark, run]) <= COMMON}
            self._numbers.append(numbers_of(some))
            self._sizes.append(len(own) if len(some) >= least and len(own) >= least - length else 0)
            if self._sizes[-1]:
                for run in own:
                    self._runs.setdefault(run, []).append(number)
            elif some and number not in shown:
                self._whole.setdefault(tuple(some), number)

    def run(self, records: Sequence[Record]) -> list[Outcome | Waits]:
        return [self.one(record) for record in records]

    def one(self, record: Record) -> Outcome:
        if self._known is None:
            return Outcome(record)
        found, unknown = self._pictures(record)
        if (overlap := self._question(record)) is not None:
            found.append(overlap)
        record = record.noted(**({"overlap": found} if found else {}), **({"overlap_unknown": unknown} if unknown else {}))
        if found and self._settings.action == "drop":
            first = found[0]
            return Outcome(record, f"benchmark_{first['by']}", f"{first['benchmark']}/{first['item']}: {first['detail']}")
        if unknown and self._settings.unknown == "drop":
            return Outcome(record, "picture_unknown", unknown)
        return Outcome(record)

    def _pictures(self, record: Record) -> tuple[list[dict[str, Any]], str]:
        """(what the question's pictures overlap with, why nothing is known of one)."""
        found, unknown = [], ""
        for number, data in enumerate(record.images, start=1):
            try:
                image = decode_image(data, f"image {number}")
            except DataError as exc:
                unknown = unknown or str(exc)
                continue
            thumb = thumbnail(image)
            if not says_something(thumb):
                unknown = unknown or f"image {number} is of one colour"
            elif (overlap := self._same_picture(thumb, image.size)) is not None:
                found.append(overlap | {"detail": f"image {number} {overlap['detail']}"})
        return found, unknown

    def _same_picture(self, thumb: Any, size: tuple[int, int]) -> dict[str, Any] | None:
        known, settings = self._known, self._settings
        assert known is not None
        if not len(known.hashes):
            return None
        bits = np.bitwise_count(known.hashes ^ np.uint64(looks(thumb))).min(axis=1)
        near = np.flatnonzero(bits <= settings.picture_bits)
        for place in near[np.argsort(bits[near], kind="stable")][:LOOKED_AT]:
            width, height = known.sizes[place].tolist()
            if same_shape((width, height), size) and (like := likeness(known.thumbs[place], thumb)) >= settings.picture_likeness:
                return self._overlap("picture", int(known.places[place]), f"is like its picture ({like:.3f})")
        return None

    def _question(self, record: Record) -> dict[str, Any] | None:
        words = words_of(record.question)
        if not record.images and (number := self._whole.get(tuple(words))) is not None:
            return self._overlap("question", number, "the question is the same")
        shared: Counter[int] = Counter()
        for run in set(runs_of(words, self._settings.question_ngram)):
            shared.update(self._runs.get(run, ()))
        numbers, best = numbers_of(words), (0.0, -1)
        for number, count in shared.items():
            if self._numbers[number] <= numbers:
                best = max(best, (count / self._sizes[number], -1 - number))
        if best[0] < self._settings.question_share:
            return None
        return self._overlap("question", -1 - best[1], f"the question has {best[0]:.0%} of its runs of words")

    def _overlap(self, by: str, question: int, detail: str) -> dict[str, Any]:
        assert self._known is not None
        benchmark, item, _, _ = self._known.questions[question]
        return {"by": by, "benchmark": benchmark, "item": item, "detail": detail}
