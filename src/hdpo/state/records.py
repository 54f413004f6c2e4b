"""Trajectories in files, ended or carried: records that are complete or ignored.

The length and the CRC-32 of a record stand before it, so that a file may be torn by a crash. A task and a picture are written
once per file. Whatever a trajectory holds comes back as it was, every pixel included.

A file that may rely on the data refers to a row's pictures by its number and their fingerprint, and to what the model saw as one
of them, a box of one, or the file that a tool sent (origins.py). Where a row has no number, or a picture no such origin, their
bytes stand in the file. What can't be made again exactly when it is read is left out, as if it had never been written.
"""
from __future__ import annotations

import dataclasses
import io
import json
import logging
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from hdpo.agent.images import content_key, decode_image
from hdpo.errors import DataError
from hdpo.state.origins import DECODERS, Origin, Originals, made_again, origin_of, print_of
from hdpo.types import Carried, EndReason, Task, ToolCall, Trajectory

log = logging.getLogger(__name__)

_FRAME = struct.Struct("<III")      # bytes of the head, bytes of the body, CRC-32 of both
_WEBP_SIDE = 16383                  # pixels; longer pictures can't be WebP
_PLAIN = [field.name for field in dataclasses.fields(Trajectory)
          if field.name not in ("task", "images", "files", "calls", "end")]


class RecordFile:
    """Appends records to a file that was opened for writing; `header` says what they belong to.

    `refers`: to the data, for pictures that are in it.
    """

    def __init__(self, file: BinaryIO, header: Mapping[str, Any], refers: bool = False) -> None:
        self._file, self._originals = file, Originals() if refers else None
        self._written: set[str] = set()      # tasks and pictures that are in the file
        self.mark("header", **header)

    def mark(self, kind: str, **values: Any) -> None:
        """A record without a trajectory."""
        _append(self._file, {"kind": kind, **values}, b"")

    def task(self, index: int, task: Task) -> None:
        if (name := f"task {index}") not in self._written:
            by_row = self._originals is not None and task.row >= 0 and len(task.images) > 0
            head = {"kind": "task", "index": index, **_task_head(task)} | ({"print": print_of(task.images)} if by_row else {})
            _append(self._file, head, b"" if by_row else b"".join(task.images))
            self._written.add(name)

    def put(self, record: Trajectory | Carried) -> None:
        trajectory = record.so_far if isinstance(record, Carried) else record
        self.task(trajectory.index, trajectory.task)
        pictures = []
        for number, image in enumerate(trajectory.images):
            key = trajectory.image_keys[number] if number < len(trajectory.image_keys) else (
                f"{trajectory.index} {trajectory.sample_index} {number}")
            if key not in self._written:
                self._picture(key, image, trajectory, trajectory.files[number] if number < len(trajectory.files) else b"")
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

    def _picture(self, key: str, image: Image.Image, trajectory: Trajectory, file: bytes) -> None:
        index = trajectory.index
        origin = origin_of(image, file, trajectory.task, index, self._originals) if self._originals and file else None
        if origin is None:
            _append(self._file, {"kind": "image", "key": key}, _lossless(image))
        else:
            _append(self._file, {"kind": "seen", "key": key, "index": index, "origin": origin, "size": image.size,
                                 "content": content_key(image), "decoders": DECODERS}, file if origin.picture < 0 else b"")


def _append(file: BinaryIO, head: dict[str, Any], body: bytes) -> None:
    text = json.dumps(head).encode()
    file.write(_FRAME.pack(len(text), len(body), zlib.crc32(body, zlib.crc32(text))) + text + body)


def _task_head(task: Task) -> dict[str, Any]:
    return {"id": task.id, "data_source": task.data_source, "messages": task.messages, "ground_truth": task.ground_truth,
            "extra": task.extra, "row": task.row, "sizes": [len(image) for image in task.images]}


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
    when asked for. A later file's count. `pictures` gives a row's, for files that refer to the data."""

    def __init__(self, files: Iterable[Path], header: Mapping[str, Any],
                 pictures: Callable[[int], tuple[bytes, ...]] | None = None) -> None:
        self._places: dict[tuple[int, int], tuple[Path, int, int]] = {}
        self._tasks: dict[tuple[Path, int], tuple[dict[str, Any], int]] = {}
        self.carried: set[tuple[int, int]] = set()     # keys of those that have not ended
        self._cuts: dict[int, dict[str, int]] = {}     # by rank
        self._pictures: dict[tuple[Path, str], tuple[dict[str, Any], int, int]] = {}
        self._decoded: dict[tuple[Path, str], Image.Image] = {}
        self._originals, self._of_row = Originals(), pictures
        self._whole = True             # nothing was left out
        for path in sorted(files):
            self._scan(path, header)
        self._forget_lost()

    def _scan(self, path: Path, header: Mapping[str, Any]) -> None:
        for head, offset, size in _read_all(path):
            kind = head.pop("kind")
            if kind == "header" and head != header:
                return
            if kind == "cut":
                self._cuts[head["rank"]] = head
            if kind == "task":
                self._tasks[path, head.pop("index")] = head, offset
            elif kind in ("image", "seen"):
                self._pictures[path, head["key"]] = head, offset, size
            elif kind in ("trajectory", "carried"):
                self._places[head["index"], head["sample"]] = path, offset, size
                (self.carried.add if kind == "carried" else self.carried.discard)((head["index"], head["sample"]))

    def _forget_lost(self) -> None:
        """Leave out what refers to rows whose pictures are no longer what they were, or to pixels of another decoder."""
        lost = set()
        for (path, index), (head, _) in self._tasks.items():
            try:
                if "print" in head and (self._of_row is None or print_of(self._of_row(head["row"])) != head["print"]):
                    lost.add((path, index))
            except DataError:
                lost.add((path, index))
        lost |= {(path, head["index"]) for (path, _), (head, _, _) in self._pictures.items()
                 if head.get("decoders", DECODERS) != DECODERS}
        for place in lost:
            self._tasks.pop(place, None)
        for key in [key for key, (path, _, _) in self._places.items() if (path, key[0]) in lost]:
            self._leave_out(key)

    def _leave_out(self, key: tuple[int, int]) -> None:
        if self._whole:
            log.warning("rollouts that were kept are sampled again: the pictures of their rows are not what they were")
        self._whole = False
        del self._places[key]
        self.carried.discard(key)

    @property
    def claimed(self) -> int | None:
        """Where these are all trajectories of a step that was cut: how many prompts it began. None elsewhere."""
        ranks = {cut["ranks"] for cut in self._cuts.values()}
        whole = self._whole and len(ranks) == 1 and self._cuts.keys() == set(range(*ranks))
        return max(cut["claimed"] for cut in self._cuts.values()) if whole else None

    def groups(self) -> dict[int, Task]:
        """The prompts of all records, in order, also those without a trajectory."""
        return {index: self._task(path, index) for path, index in sorted(self._tasks, key=lambda place: place[1])}

    def __getitem__(self, key: tuple[int, int]) -> Trajectory | Carried:
        path, offset, size = self._places[key[0], key[1]]
        body = json.loads(_read(path, offset, size))
        try:
            images = tuple(self._picture(path, name) for name in body.pop("pictures"))
            task = self._task(path, key[0])
        except DataError:
            self._leave_out(key)
            raise KeyError(key) from None
        calls = tuple(ToolCall(**call) for call in body.pop("calls"))
        body["turns"], body["image_keys"] = tuple(body["turns"]), tuple(body["image_keys"])
        carried = body.pop("carried", None)
        found = Trajectory(task=task, images=images, calls=calls, end=EndReason(body.pop("end")), **body)
        return found if carried is None else Carried(found, **carried)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def _task(self, path: Path, index: int) -> Task:
        head, offset = self._tasks[path, index]
        if "print" in head:
            assert self._of_row is not None      # else the task was left out
            return _task(head, self._of_row(head["row"]))
        images = []
        for size in head["sizes"]:
            images.append(_read(path, offset, size))
            offset += size
        return _task(head, tuple(images))

    def _picture(self, path: Path, name: str) -> Image.Image:
        """Decoded once: the rollouts of a prompt share its pictures. Raises DataError for one that isn't what it was."""
        if (path, name) not in self._decoded:
            head, offset, size = self._pictures[path, name]
            self._decoded[path, name] = self._seen(path, head, _read(path, offset, size)) if "origin" in head else _opened(
                _read(path, offset, size))
        return self._decoded[path, name]

    def _seen(self, path: Path, head: dict[str, Any], file: bytes) -> Image.Image:
        picture, box = head["origin"]
        whole = decode_image(file, "image") if picture < 0 else self._originals.picture(
            (path, head["index"]), picture, lambda: self._task(path, head["index"]).images[picture])
        image = made_again(Origin(picture, box and tuple(box)), tuple(head["size"]), whole)
        if content_key(image) != head["content"]:
            raise DataError("the picture is another one now")
        return image


def _task(head: dict[str, Any], images: tuple[bytes, ...]) -> Task:
    return Task(images=images, **{name: value for name, value in head.items() if name not in ("sizes", "print")})


def _opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def _read(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)
