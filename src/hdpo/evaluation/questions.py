"""Questions of benchmarks as tasks to roll out, made when they are asked for: a picture is read when its rollout begins."""
from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

from hdpo.agent.chat import IMAGE_MARKER
from hdpo.agent.images import check_image
from hdpo.data.pictures import encoded_images
from hdpo.data.store import RowStore, open_rows
from hdpo.errors import DataError
from hdpo.evaluation.items import Benchmark, Item, is_path
from hdpo.evaluation.published import IMAGE_COLUMNS, column_key
from hdpo.types import Task


class Pictures:
    """The encoded pictures of items: from the row itself through the memory-mapped copy of its file, or from the file named."""

    def __init__(self, folder: Path | str, cache: str = "") -> None:
        self._folder, self._cache = Path(folder), cache
        self._stores: dict[Path | str, RowStore] = {}

    def read(self, item: Item) -> tuple[bytes, ...]:
        """Raises DataError for a picture that is missing or broken. An item without one has none."""
        if item.source is None:
            return ()
        folders = [Path(item.source).parent, self._folder, *(self._folder / name for name in ("images", "image"))]
        if isinstance(item.image, str):
            found = encoded_images(item.image, folders)
        else:
            if item.source not in self._stores:
                self._stores[item.source] = open_rows([str(item.source)], cache=self._cache)
            store = self._stores[item.source]
            row = store.row(item.row, [name for name in store.columns if column_key(name) in (*IMAGE_COLUMNS, "imagepath")])
            cells = [cell for cell in row.values() if cell not in (None, "")]
            found = encoded_images(next((cell for cell in cells if not is_path(cell)), cells[0] if cells else None), folders)
        for number, data in enumerate(found):
            check_image(data, f"image {number}")
        return found


@dataclass(slots=True)
class Question:
    benchmark: Benchmark
    item: Item
    pictures: Pictures


@dataclass(slots=True)
class Questions(Sequence[Task]):
    """The tasks of one arm. `broken` holds the reason for each whose picture could not be read: it is asked without."""

    questions: Sequence[Question]
    arm: str
    system: str
    bare: bool = False
    broken: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.questions)

    @overload
    def __getitem__(self, index: int) -> Task: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Task]: ...

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Questions(self.questions[index], self.arm, self.system, self.bare, self.broken)
        question = self.questions[index]
        item, name = question.item, task_id(question.benchmark.name, question.item.id, self.arm)
        try:
            images = question.pictures.read(item)
        except DataError as exc:
            self.broken[name], images = str(exc), ()
        text = (question.benchmark.bare if self.bare else question.benchmark.prompt)(item).replace(IMAGE_MARKER, "")
        messages = [{"role": "system", "content": self.system}, {"role": "user", "content": IMAGE_MARKER * len(images) + text}]
        return Task(name, question.benchmark.name, messages, images, item.gold or "-",
                    {"item": item.id, "arm": self.arm, "benchmark": question.benchmark.name})

    def numbers(self) -> list[int]:
        """A number for each task by its name alone, so that a question is sampled alike whatever else is still to be asked."""
        names = (task_id(question.benchmark.name, question.item.id, self.arm) for question in self.questions)
        return [int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 2 for name in names]


def task_id(benchmark: str, item: str, arm: str) -> str:
    return f"{benchmark}/{item}/{arm}"


def chosen(items: Sequence[Item], limit: int) -> list[Item]:
    """`limit` items or a few more, in their order: whole clusters, spread evenly over the benchmark; 0 is all."""
    kept = [item for item in items if not item.dropped]
    if not limit or limit >= len(kept):
        return kept
    clusters: dict[str, list[Item]] = {}
    for item in kept:
        clusters.setdefault(item.cluster or item.id, []).append(item)
    names = list(clusters)
    count, taken = 0, set()
    for name in _spread(names):
        if count >= limit:
            break
        taken.add(name)
        count += len(clusters[name])
    return [item for item in kept if (item.cluster or item.id) in taken]


def _spread(names: Sequence[str]) -> Iterator[str]:
    """All names, in an order of which every beginning is spread over the list (van der Corput)."""
    bits = max(1, (len(names) - 1).bit_length())
    for k in range(1 << bits):
        place = int(format(k, f"0{bits}b")[::-1], 2)
        if place < len(names):
            yield names[place]
