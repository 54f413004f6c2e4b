"""Answers on disk from the moment they end: one file of lines per process, read back whatever their number was.

A line says nothing that depends on when or where the answer was made, so that a run that was killed and goes on, on any
ranks, ends with the same lines. Pictures are kept once, made small, under a name of their content.
"""
from __future__ import annotations

import io
import json
import os
import uuid
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

from PIL import Image

from hdpo.agent.images import content_key
from hdpo.agent.parse import extract_answer
from hdpo.errors import ConfigError
from hdpo.state.dump import encode_image
from hdpo.types import EndReason, Trajectory

Key = tuple[str, str, str, int]     # benchmark, item, arm, sample
SIDE = 768                          # longest side of a kept picture, pixels


class Kept:
    """`folder`/answers/*.jsonl and `folder`/images. `add` is called on the background loop and returns at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._answers, self._images = folder / "answers", folder / "images"
        self._answers.mkdir(parents=True, exist_ok=True)
        self._images.mkdir(exist_ok=True)
        self._file: io.TextIOWrapper | None = None
        self._lock = Lock()
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="hdpo-kept")
        self._seen: set[str] = set()

    def add(self, record: Mapping[str, Any], images: Iterable[Image.Image] = ()) -> None:
        for image, name in zip(images, record["images"], strict=True):
            if name not in self._seen:
                self._seen.add(name)
                self._pool.submit(self._picture, image, name)
        with self._lock:
            if self._file is None:
                self._file = (self._answers / f"part_{uuid.uuid4().hex}.jsonl").open("w", encoding="utf-8", errors="replace")
            self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
            self._file.flush()      # to the kernel: it outlives this process, whatever kills it

    def _picture(self, image: Image.Image, name: str) -> None:
        path = self._images / name
        if not path.exists():
            temporary = path.with_name(f".{name}.{uuid.uuid4().hex}")
            temporary.write_bytes(encode_image(image, SIDE))
            os.replace(temporary, path)

    def known(self) -> dict[Key, dict[str, Any]]:
        """Every answer kept so far; one with an `error` gives way to one without."""
        found: dict[Key, dict[str, Any]] = {}
        for path in sorted(self._answers.glob("part_*.jsonl")):
            with path.open(encoding="utf-8", errors="replace") as file:
                for line in file:
                    try:
                        record = json.loads(line)
                        key = (record["benchmark"], record["id"], record["arm"], record["sample"])
                    except (ValueError, KeyError, TypeError):     # the last line of a process that was killed
                        continue
                    if key not in found or found[key]["error"] and not record["error"]:
                        found[key] = record
        return found

    def image(self, name: str) -> bytes | None:
        path = self._images / name
        return path.read_bytes() if path.is_file() else None

    def close(self) -> None:
        self._pool.shutdown()
        if self._file is not None:
            self._file.close()


def check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Answers of one folder are of one setting. Raises ConfigError naming what differs from when it was begun."""
    path = folder / "settings.json"
    if path.is_file():
        before = json.loads(path.read_text())
        for name, value in settings.items():
            if before.get(name) != value:
                raise ConfigError(f"{folder}: its answers were made with {name} = {before.get(name)!r}, this run has {value!r}; "
                                  "name another --set run.name, or remove the folder")
        return
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{uuid.uuid4().hex}")
    temporary.write_text(json.dumps(settings, indent=2) + "\n")
    os.replace(temporary, path)


def record_of(trajectory: Trajectory, broken: str = "") -> dict[str, Any]:
    """The line of one answer. `broken`: why its picture could not be shown."""
    task, calls = trajectory.task, [call for call in trajectory.calls if not call.infrastructure]
    error = broken or ("" if trajectory.end.scorable else trajectory.error or trajectory.end.value)
    return {
        "benchmark": task.extra["benchmark"], "id": task.extra["item"], "arm": task.extra["arm"],
        "sample": trajectory.sample_index,
        "answer": extract_answer(trajectory.final_turn), "calls": len(calls), "tools": [call.name for call in calls],
        "failed": sum(not call.ok for call in calls), "error": error, "end": trajectory.end.value,
        "turns": list(trajectory.turns), "observations": [call.observation for call in trajectory.calls],
        "call_records": [{"name": call.name, "arguments": call.arguments, "ok": call.ok, "num_images": call.num_images,
                          "seconds": 0.0, "infrastructure": call.infrastructure} for call in trajectory.calls],
        "prompt": task.messages, "prompt_images": len(task.images), "prompt_tokens": trajectory.prompt_length,
        "response_tokens": len(trajectory.token_ids) - trajectory.prompt_length, "sampled_tokens": trajectory.num_sampled,
        "images": list(trajectory.image_keys) if trajectory.image_keys else [content_key(image) for image in trajectory.images]}


def end_of(record: Mapping[str, Any]) -> EndReason:
    return EndReason(record["end"]) if not record["error"] else EndReason.INFRASTRUCTURE
