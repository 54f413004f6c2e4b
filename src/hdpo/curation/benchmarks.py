"""The questions and pictures of the benchmarks, prepared once to be compared with training rows.

    {out}/work/benchmarks.npz      hashes and thumbnails of the pictures, and as JSON the questions and what could not be read

One process of a node makes it, with a progress bar; the others wait for it.
"""
from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from hdpo.agent.images import decode_image
from hdpo.config.curation import DecontaminationSettings
from hdpo.curation.likeness import looks_cropped, says_something, thumbnail
from hdpo.data.copies import fingerprint, once
from hdpo.errors import ConfigError, DataError
from hdpo.evaluation.benchmarks import BENCHMARKS, open_benchmarks
from hdpo.evaluation.items import Benchmark, Item
from hdpo.evaluation.questions import Pictures
from hdpo.progress import progress

FORMAT = 1
_AT_ONCE = 64


@dataclass(slots=True)
class Known:
    """Q questions and P pictures. `places[p]` is the question that showed picture p first; `hashes` [P, variants] uint64,
    `thumbs` [P, SIDE, SIDE] uint8, `sizes` [P, 2]. `about`: by benchmark, questions, pictures and what could not be read."""

    questions: list[tuple[str, str, str, str]] = field(default_factory=list)      # benchmark, item, cluster, text
    places: Any = None
    hashes: Any = None
    thumbs: Any = None
    sizes: Any = None
    about: dict[str, dict[str, Any]] = field(default_factory=dict)

    def name(self, question: int) -> str:
        return "/".join(self.questions[question][:2])


def chosen(settings: DecontaminationSettings) -> list[Benchmark]:
    """Raises ConfigError where none is there, UserError for an unknown name."""
    data = Path(settings.data)
    names = settings.benchmarks or [name for name in BENCHMARKS if (data / name).is_dir()]
    if not names:
        raise ConfigError(f"curation.decontamination.data: {data} holds no folder of a benchmark ({', '.join(BENCHMARKS)})")
    return open_benchmarks(",".join(names))


def key_of(settings: DecontaminationSettings) -> str:
    """Changes when the benchmarks' files do. Raises DataError for a benchmark that is not there."""
    found = [[benchmark.name, [fingerprint(file) for file in benchmark.files(Path(settings.data) / benchmark.name)]]
             for benchmark in chosen(settings)]
    return hashlib.blake2b(json.dumps([FORMAT, found]).encode(), digest_size=16).hexdigest()


def open_known(settings: DecontaminationSettings, folder: Path, cache: str = "") -> Known:
    """What is known of the benchmarks, made now unless it lies in `folder`. Raises DataError."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"benchmarks_{key_of(settings)}.npz"
    if not file.exists():
        with once(file.with_suffix(".lock")):
            if not file.exists():
                _save(_make(settings, cache), file)
    with np.load(file) as held:
        return Known([tuple(q) for q in json.loads(str(held["questions"]))], held["places"], held["hashes"], held["thumbs"],
                     held["sizes"], json.loads(str(held["about"])))


def _save(known: Known, file: Path) -> None:
    part = file.with_suffix(f".part{os.getpid()}.npz")
    np.savez(part, questions=json.dumps(known.questions), places=known.places, hashes=known.hashes, thumbs=known.thumbs,
             sizes=known.sizes, about=json.dumps(known.about))
    os.replace(part, file)


def _make(settings: DecontaminationSettings, cache: str) -> Known:
    known, places, hashes, thumbs, sizes = Known(), [], [], [], []
    seen: set[bytes] = set()
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1), "hdpo-benchmarks") as threads:
        for benchmark in chosen(settings):
            pictures = Pictures(Path(settings.data) / benchmark.name, cache)
            about: dict[str, Any] = {"questions": 0, "pictures": 0, "unreadable": Counter()}
            read = benchmark.items(Path(settings.data) / benchmark.name)
            items = iter(progress(f"benchmark {benchmark.name}", "", read, delay_s=1))
            while some := list(islice(items, _AT_ONCE)):
                encoded = [_read(pictures, item) for item in some]
                looked = threads.map(_look, [data for data, _ in encoded])
                for item, (data, problem), found in zip(some, encoded, looked, strict=True):
                    known.questions.append((benchmark.name, item.id, item.cluster or item.id, item.question))
                    about["questions"] += 1
                    if problem:
                        about["unreadable"]["picture_missing_or_broken"] += 1
                    for raw, (size, thumb, variants) in zip(data, found, strict=True):
                        digest = hashlib.blake2b(raw, digest_size=16).digest()
                        if digest in seen:
                            continue
                        seen.add(digest)
                        if thumb is None or not says_something(thumb):
                            about["unreadable"]["picture_of_one_colour" if thumb is not None else "picture_broken"] += 1
                            continue
                        about["pictures"] += 1
                        places.append(len(known.questions) - 1)
                        hashes.append(variants)
                        thumbs.append(thumb)
                        sizes.append(size)
            known.about[benchmark.name] = {**about, "unreadable": dict(about["unreadable"])}
    known.places, known.hashes = np.array(places, np.int64), np.array(hashes, np.uint64).reshape(len(hashes), -1)
    known.thumbs, known.sizes = np.array(thumbs, np.uint8), np.array(sizes, np.int64).reshape(-1, 2)
    return known


def _read(pictures: Pictures, item: Item) -> tuple[tuple[bytes, ...], str]:
    try:
        return pictures.read(item), ""
    except DataError as exc:
        return (), str(exc)


def _look(encoded: Sequence[bytes]) -> list[tuple[tuple[int, int], Any, list[int]]]:
    found: list[tuple[tuple[int, int], Any, list[int]]] = []
    for data in encoded:
        try:
            image = decode_image(data, "picture")
        except DataError:
            found.append(((0, 0), None, []))
            continue
        thumb = thumbnail(image)
        found.append((image.size, thumb, looks_cropped(thumb)))
    return found
