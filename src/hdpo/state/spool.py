"""Finished rollouts on the disk as they end, so that a killed run samples none of them again.

    spool/step_000012/rank_00003.0.spool       one file per rank and process; records in the order rollouts ended

A step's spool is kept until a checkpoint that covers the step is visible. A resumed run starts with the weights of that
checkpoint, which are those that sampled the step's rollouts, and takes what it finds instead of sampling. When a step was
taken as a whole from its spool, the same update follows and the next step's spool is good too (to the rounding of that
update); after a step for which anything was sampled, later spools are discarded.

Beyond run.spool_gib, of which each rank has an equal share, nothing more is kept until a checkpoint lets steps go: later
steps without those before are of no use, so it is the first ones that stay.

A record is complete or ignored: its length and CRC-32 stand before it. Pictures are written once per content and file.
Deterministic runs do not use it: rollouts repeat bit for bit only in the same batches.
"""
from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import logging
import math
import os
import queue
import shutil
import struct
import threading
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from hdpo.config import Config
from hdpo.ranks.world import World
from hdpo.state.folders import newest_step, numbered, step_of
from hdpo.state.same_run import MAY_CHANGE, MUST_STAY, content_of, flat_settings
from hdpo.types import EndReason, Task, ToolCall, Trajectory

log = logging.getLogger(__name__)

Known = Mapping[tuple[int, int], Trajectory]
"""(prompt's index in the step, sample index) -> trajectory."""

_FRAME = struct.Struct("<III")      # bytes of the head, bytes of the body, CRC-32 of both
_WEBP_SIDE = 16383                  # pixels; longer pictures can't be WebP
_PLAIN = [field.name for field in dataclasses.fields(Trajectory) if field.name not in ("task", "images", "calls", "end")]


class Spool:
    """One per rank. `add` may be called from any thread and returns at once; `begin` is collective."""

    def __init__(self, config: Config, world: World, content: Mapping[str, str] | None = None) -> None:
        """`content`: what lies behind the configuration's paths, where it is known already (Checkpoints.content)."""
        self._config, self._world, self._folder = config, world, config.run.path / "spool"
        self._content = content_of(config) if content is None else content
        self._active = not config.run.deterministic
        self._known: Known = {}
        self._sampled = False
        self._writer: _Writer | None = None
        if world.is_main and not (self._active and config.run.resume):
            shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def begin(self, step: int) -> Known:
        """Turn to a step: discard what is covered or has become invalid, and return the rollouts the step already has."""
        if not self._active:
            return {}
        if self._writer is not None:
            self._writer.close()
        invalid = self._world.any(self._sampled)
        if self._world.is_main:
            covered = newest_step(self._config.run.path)
            for folder in numbered(self._folder):
                number = step_of(folder)
                if number < min(covered, step) or (invalid and number >= step):
                    shutil.rmtree(folder, ignore_errors=True)
        self._world.barrier()
        self._known = spooled(self._config, step, self._content)
        self._sampled = False
        self._world.barrier()       # every rank has listed the files before the first new one appears
        here = _step_folder(self._config.run.path, step)
        self._writer = _Writer(_free_name(here, self._world.rank), _header(self._config, step, self._content), self._room())
        return self._known

    def _room(self) -> float:
        """Bytes that this rank may still keep."""
        if not self._config.run.spool_gib:
            return math.inf
        held = sum(file.stat().st_size for file in self._folder.glob(f"step_*/rank_{self._world.rank:05d}.*.spool"))
        return self._config.run.spool_gib * 2**30 / self._world.size - held

    def add(self, trajectory: Trajectory) -> None:
        """Keep a finished trajectory. One that failed on our side is not kept: a resumed run tries it again."""
        if self._writer is not None and (trajectory.index, trajectory.sample_index) not in self._known:
            self._sampled = True
            if trajectory.end.scorable:
                self._writer.put(trajectory)


def spooled(config: Config, step: int, content: Mapping[str, str] | None = None) -> Known:
    """The rollouts of a step that are on the disk and were sampled under this configuration, from the same rows."""
    content = content_of(config) if content is None else content
    return _Spooled(_step_folder(config.run.path, step), _header(config, step, content))


def _step_folder(run: Path, step: int) -> Path:
    return run / "spool" / f"step_{step:06d}"


def _header(config: Config, step: int, content: Mapping[str, str]) -> dict[str, Any]:
    return {"step": step, "settings": _settings_fingerprint(config, content)}


def _settings_fingerprint(config: Config, content: Mapping[str, str]) -> str:
    """Equal for configurations under which the same weights would sample the same rollouts."""
    flat = flat_settings(config.model_dump(mode="json"))
    kept = {key: value for key, value in flat.items() if key in MUST_STAY or not key.startswith(MAY_CHANGE)} | dict(content)
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


# -- writing -------------------------------------------------------------------------------------------------------


class _Writer:
    """Appends to one file in a thread. Losing the spool costs sampling again, never the run: errors are one warning."""

    def __init__(self, path: Path, header: dict[str, Any], room: float) -> None:
        """`room`: bytes that may be written."""
        self._path, self._header, self._room = path, header, room
        self._queue: queue.SimpleQueue[Trajectory | None] = queue.SimpleQueue()
        self._full = False
        self._written: set[str] = set()      # tasks and pictures that are in the file
        self._thread = threading.Thread(target=self._run, name="hdpo-spool", daemon=True)
        self._thread.start()

    def put(self, trajectory: Trajectory) -> None:
        self._queue.put(trajectory)

    def close(self) -> None:
        """Wait until everything is on the disk."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            self._append_all()
        except Exception as exc:   # noqa: BLE001  a thread's boundary: the run does not depend on its spool
            log.warning("rollouts of this step are not kept for a resume: cannot write %s (%s)", self._path, exc)
            while self._queue.get() is not None:
                pass

    def _append_all(self) -> None:
        first = self._queue.get()
        if first is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("wb") as file:
            _append(file, {"kind": "header", **self._header}, b"")
            trajectory: Trajectory | None = first
            while trajectory is not None:
                if file.tell() < self._room:
                    self._append(file, trajectory)
                elif not self._full:
                    self._full = True
                    log.warning("rollouts are not kept for a resume until the next checkpoint: run.spool_gib is used up")
                if self._queue.empty():
                    file.flush()
                    os.fdatasync(file.fileno())
                trajectory = self._queue.get()

    def _append(self, file: BinaryIO, trajectory: Trajectory) -> None:
        task = f"task {trajectory.index}"
        if task not in self._written:
            _append(file, {"kind": "task", "index": trajectory.index, **_task_head(trajectory.task)},
                    b"".join(trajectory.task.images))
            self._written.add(task)
        pictures = []
        for number, image in enumerate(trajectory.images):
            key = trajectory.image_keys[number] if number < len(trajectory.image_keys) else (
                f"{trajectory.index} {trajectory.sample_index} {number}")
            if key not in self._written:
                _append(file, {"kind": "image", "key": key}, _lossless(image))
                self._written.add(key)
            pictures.append(key)
        body = {name: getattr(trajectory, name) for name in _PLAIN}
        body |= {"end": trajectory.end.value, "calls": [dataclasses.asdict(call) for call in trajectory.calls],
                 "pictures": pictures}
        _append(file, {"kind": "trajectory", "index": trajectory.index, "sample": trajectory.sample_index},
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


def _free_name(folder: Path, rank: int) -> Path:
    """A file of its own for each process: one that was killed may have left half a record at its end."""
    taken = len(list(folder.glob(f"rank_{rank:05d}.*.spool")))
    return folder / f"rank_{rank:05d}.{taken}.spool"


# -- reading -------------------------------------------------------------------------------------------------------


def _records(path: Path) -> Iterator[tuple[dict[str, Any], int, int]]:
    """(head, offset of the body, bytes of the body) of every whole record, up to the first torn one."""
    with path.open("rb") as file:
        while len(frame := file.read(_FRAME.size)) == _FRAME.size:
            head_size, body_size, crc = _FRAME.unpack(frame)
            text, offset = file.read(head_size), file.tell()
            body = file.read(body_size)
            if len(body) < body_size or zlib.crc32(body, zlib.crc32(text)) != crc:
                return
            yield json.loads(text), offset, body_size


class _Spooled(Mapping[tuple[int, int], Trajectory]):
    """Trajectories of one step's files, of all ranks: places are found at once, contents are read when asked for."""

    def __init__(self, folder: Path, header: dict[str, Any]) -> None:
        self._places: dict[tuple[int, int], tuple[Path, int, int]] = {}
        self._tasks: dict[tuple[Path, int], tuple[dict[str, Any], int]] = {}
        self._pictures: dict[tuple[Path, str], tuple[int, int]] = {}
        self._decoded: dict[tuple[Path, str], Image.Image] = {}
        for path in sorted(folder.glob("*.spool")):
            self._scan(path, header)

    def _scan(self, path: Path, header: dict[str, Any]) -> None:
        for head, offset, size in _records(path):
            kind = head.pop("kind")
            if kind == "header" and head != header:
                return
            if kind == "task":
                self._tasks[path, head.pop("index")] = head, offset
            elif kind == "image":
                self._pictures[path, head["key"]] = offset, size
            elif kind == "trajectory":
                self._places[head["index"], head["sample"]] = path, offset, size

    def __getitem__(self, key: tuple[int, int]) -> Trajectory:
        path, offset, size = self._places[key[0], key[1]]
        body = json.loads(_read(path, offset, size))
        images = tuple(self._picture(path, name) for name in body.pop("pictures"))
        calls = tuple(ToolCall(**call) for call in body.pop("calls"))
        body["turns"], body["image_keys"] = tuple(body["turns"]), tuple(body["image_keys"])
        return Trajectory(task=self._task(path, key[0]), images=images, calls=calls, end=EndReason(body.pop("end")), **body)

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
