"""Trajectories in files, ended or carried: records that are complete or ignored.

The length and the CRC-32 of a record stand before it, so that a file may be torn by a crash. A task and a picture are written
once per file. Whatever a trajectory holds comes back as it was, every pixel included.
"""
from __future__ import annotations

import dataclasses
import io
import json
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from hdpo.types import Carried, EndReason, Task, ToolCall, Trajectory

_FRAME = struct.Struct("<III")      # bytes of the head, bytes of the body, CRC-32 of both
_WEBP_SIDE = 16383                  # pixels; longer pictures can't be WebP
_PLAIN = [field.name for field in dataclasses.fields(Trajectory) if field.name not in ("task", "images", "calls", "end")]


class RecordFile:
    """Appends records to a file that was opened for writing; `header` says what they belong to."""

    def __init__(self, file: BinaryIO, header: Mapping[str, Any]) -> None:
        self._file = file
        self._written: set[str] = set()      # tasks and pictures that are in the file
        self.mark("header", **header)

    def mark(self, kind: str, **values: Any) -> None:
        """A record without a trajectory."""
        _append(self._file, {"kind": kind, **values}, b"")

    def task(self, index: int, task: Task) -> None:
        if (name := f"task {index}") not in self._written:
            _append(self._file, {"kind": "task", "index": index, **_task_head(task)}, b"".join(task.images))
            self._written.add(name)

    def put(self, record: Trajectory | Carried) -> None:
        trajectory = record.so_far if isinstance(record, Carried) else record
        self.task(trajectory.index, trajectory.task)
        pictures = []
        for number, image in enumerate(trajectory.images):
            key = trajectory.image_keys[number] if number < len(trajectory.image_keys) else (
                f"{trajectory.index} {trajectory.sample_index} {number}")
            if key not in self._written:
                _append(self._file, {"kind": "image", "key": key}, _lossless(image))
                self._written.add(key)
            pictures.append(key)
        body = {name: getattr(trajectory, name) for name in _PLAIN}
        body |= {"end": trajectory.end.value, "calls": [dataclasses.asdict(call) for call in trajectory.calls],
                 "pictures": pictures}
        if isinstance(record, Carried):
            body["carried"] = {"compact_ids": record.compact_ids, "begun": record.begun, "session": record.session}
        kind = "carried" if isinstance(record, Carried) else "trajectory"
        _append(self._file, {"kind": kind, "index": trajectory.index, "sample": trajectory.sample_index},
                json.dumps(body).encode())


def _append(file: BinaryIO, head: dict[str, Any], body: bytes) -> None:
    text = json.dumps(head).encode()
    file.write(_FRAME.pack(len(text), len(body), zlib.crc32(body, zlib.crc32(text))) + text + body)


def _task_head(task: Task) -> dict[str, Any]:
    return {"id": task.id, "data_source": task.data_source, "messages": task.messages, "ground_truth": task.ground_truth,
            "extra": task.extra, "sizes": [len(image) for image in task.images]}


def _lossless(image: Image.Image) -> bytes:
    """Every pixel in a fifth fewer bytes than PNG's fastest, and no more time (benchmarks/bench_scale.py)."""
    buffer = io.BytesIO()
    if image.mode == "RGB" and max(image.size) <= _WEBP_SIDE:
        image.save(buffer, "WEBP", lossless=True, method=0, quality=0)
    else:
        image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _read_all(path: Path) -> Iterator[tuple[dict[str, Any], int, int]]:
    """(head, offset of the body, bytes of the body) of every whole record, up to the first torn one."""
    with path.open("rb") as file:
        while len(frame := file.read(_FRAME.size)) == _FRAME.size:
            head_size, body_size, crc = _FRAME.unpack(frame)
            text, offset = file.read(head_size), file.tell()
            body = file.read(body_size)
            if len(body) < body_size or zlib.crc32(body, zlib.crc32(text)) != crc:
                return
            yield json.loads(text), offset, body_size


class Records(Mapping[tuple[int, int], Trajectory | Carried]):
    """Trajectories by (index, sample index), of all `files` that begin with `header`: places are found at once, contents are read
    when asked for. A later file's count."""

    def __init__(self, files: Iterable[Path], header: Mapping[str, Any]) -> None:
        self._places: dict[tuple[int, int], tuple[Path, int, int]] = {}
        self._tasks: dict[tuple[Path, int], tuple[dict[str, Any], int]] = {}
        self.carried: set[tuple[int, int]] = set()     # keys of those that have not ended
        self._cuts: dict[int, dict[str, int]] = {}     # by rank
        self._pictures: dict[tuple[Path, str], tuple[int, int]] = {}
        self._decoded: dict[tuple[Path, str], Image.Image] = {}
        for path in sorted(files):
            self._scan(path, header)

    def _scan(self, path: Path, header: Mapping[str, Any]) -> None:
        for head, offset, size in _read_all(path):
            kind = head.pop("kind")
            if kind == "header" and head != header:
                return
            if kind == "cut":
                self._cuts[head["rank"]] = head
            if kind == "task":
                self._tasks[path, head.pop("index")] = head, offset
            elif kind == "image":
                self._pictures[path, head["key"]] = offset, size
            elif kind in ("trajectory", "carried"):
                self._places[head["index"], head["sample"]] = path, offset, size
                (self.carried.add if kind == "carried" else self.carried.discard)((head["index"], head["sample"]))

    @property
    def claimed(self) -> int | None:
        """Where these are all trajectories of a step that was cut: how many prompts it began. None elsewhere."""
        ranks = {cut["ranks"] for cut in self._cuts.values()}
        whole = len(ranks) == 1 and self._cuts.keys() == set(range(*ranks))
        return max(cut["claimed"] for cut in self._cuts.values()) if whole else None

    def groups(self) -> dict[int, Task]:
        """The prompts of all records, in order, also those without a trajectory."""
        return {index: self._task(path, index) for path, index in sorted(self._tasks, key=lambda place: place[1])}

    def __getitem__(self, key: tuple[int, int]) -> Trajectory | Carried:
        path, offset, size = self._places[key[0], key[1]]
        body = json.loads(_read(path, offset, size))
        images = tuple(self._picture(path, name) for name in body.pop("pictures"))
        calls = tuple(ToolCall(**call) for call in body.pop("calls"))
        body["turns"], body["image_keys"] = tuple(body["turns"]), tuple(body["image_keys"])
        carried = body.pop("carried", None)
        found = Trajectory(task=self._task(path, key[0]), images=images, calls=calls, end=EndReason(body.pop("end")), **body)
        return found if carried is None else Carried(found, **carried)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def _task(self, path: Path, index: int) -> Task:
        head, offset = self._tasks[path, index]
        images = []
        for size in head["sizes"]:
            images.append(_read(path, offset, size))
            offset += size
        return Task(images=tuple(images), **{name: value for name, value in head.items() if name != "sizes"})

    def _picture(self, path: Path, name: str) -> Image.Image:
        """Decoded once: the rollouts of a prompt share its pictures."""
        if (path, name) not in self._decoded:
            image = Image.open(io.BytesIO(_read(path, *self._pictures[path, name])))
            image.load()
            self._decoded[path, name] = image
        return self._decoded[path, name]


def _read(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)
