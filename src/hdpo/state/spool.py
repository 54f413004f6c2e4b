"""Finished rollouts on the disk as they end, so that a killed run samples none of them again.

    spool/step_000012/rank_00003.0.spool       one file per rank and process; records in the order rollouts ended

A step's spool is kept until a checkpoint that covers the step is visible. A resumed run starts with the weights of that
checkpoint, which are those that sampled the step's rollouts, and takes what it finds instead of sampling. When a step was
taken as a whole from its spool, the same update follows and the next step's spool is good too (to the rounding of that
update); after a step for which anything was sampled, later spools are discarded.

Pictures of rows, and boxes of them that a tool cut out, are in the data already: a spool refers to them (records.py). A rollout
whose row holds another picture when a run goes on is sampled again.

Beyond run.spool_gib, of which each rank has an equal share, nothing more is kept until a checkpoint lets steps go: later
steps without those before are of no use, so it is the first ones that stay.

With rollout.carry_over, what is unfinished at the end of a step is kept too, so that the step is whole in its spool.
Deterministic runs do not use it: rollouts repeat bit for bit only in the same batches.
"""
from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import queue
import shutil
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from hdpo.config import Config
from hdpo.ranks.world import World
from hdpo.state.folders import newest_step, numbered, step_of
from hdpo.state.origins import RowPictures
from hdpo.state.records import RecordFile, Records
from hdpo.state.same_run import MAY_CHANGE, MUST_STAY, content_of, flat_settings
from hdpo.types import Carried, Trajectory

log = logging.getLogger(__name__)


class Spool:
    """One per rank. `add` may be called from any thread and returns at once; `begin` is collective."""

    def __init__(self, config: Config, world: World, content: Mapping[str, str] | None = None) -> None:
        """`content`: what lies behind the configuration's paths, where it is known already (Checkpoints.content)."""
        self._config, self._world, self._folder = config, world, config.run.path / "spool"
        self._content = content_of(config) if content is None else content
        self._active = not config.run.deterministic
        self._known = Records((), {})
        self._sampled = self._full = False
        self._writer: _Writer | None = None
        if world.is_main and not (self._active and config.run.resume):
            shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def begin(self, step: int) -> Records:
        """Turn to a step: discard what is covered or has become invalid, and return the rollouts the step already has."""
        if not self._active:
            return self._known
        if self._writer is not None:
            self._writer.close()
            self._full = self._writer.full
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
        self._writer = _Writer(_free_name(here, self._world.rank), _header(self._config, step, self._content), self._room(),
                               self._full)
        return self._known

    def _room(self) -> float:
        """Bytes that this rank may still keep."""
        if not self._config.run.spool_gib:
            return math.inf
        held = sum(file.stat().st_size for file in self._folder.glob(f"step_*/rank_{self._world.rank:05d}.*.spool"))
        return self._config.run.spool_gib * 2**30 / self._world.size - held

    def add(self, trajectory: Trajectory) -> None:
        """Keep a finished trajectory. One that failed on our side is not kept: a resumed run tries it again."""
        key = trajectory.index, trajectory.sample_index
        if self._writer is not None and (key not in self._known or key in self._known.carried):
            self._sampled = True
            if trajectory.end.scorable:
                self._writer.put(trajectory)

    def cut(self, going: Iterable[Carried], failed: Iterable[Trajectory], claimed: int) -> None:
        """The step, which began `claimed` prompts, is over: keep what goes on in the next, and what `add` left out. With these
        of every rank the step is whole."""
        if self._writer is not None:
            mark = {"claimed": claimed, "rank": self._world.rank, "ranks": self._world.size}
            for item in cast(list[_Item], [*going, *failed, mark]):
                self._writer.put(item)


def spooled(config: Config, step: int, content: Mapping[str, str] | None = None) -> Records:
    """The rollouts of a step that are on the disk and were sampled under this configuration, from the same rows."""
    content = content_of(config) if content is None else content
    return Records(_step_folder(config.run.path, step).glob("*.spool"), _header(config, step, content), RowPictures(config.data))


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


_Item = Trajectory | Carried | dict[str, int]      # a dict: the mark of a step that is over


class _Writer:
    """Appends to one file in a thread. Losing the spool costs sampling again, never the run: errors are one warning."""

    def __init__(self, path: Path, header: dict[str, Any], room: float, full: bool = False) -> None:
        """`room`: bytes that may be written. `full`: there was none for the step before, as has been said."""
        self._path, self._header, self._room = path, header, room
        self._queue: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self.full = full and room <= 0
        self._thread = threading.Thread(target=self._run, name="hdpo-spool", daemon=True)
        self._thread.start()

    def put(self, item: _Item) -> None:
        self._queue.put(item)

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
            records = RecordFile(file, self._header, refers=True)
            item: _Item | None = first
            while item is not None:
                if file.tell() < self._room:
                    records.mark("cut", **item) if isinstance(item, dict) else records.put(item)
                elif not self.full:
                    self.full = True
                    log.warning("rollouts are not kept for a resume until the next checkpoint: run.spool_gib is used up")
                if self._queue.empty():
                    file.flush()
                    os.fdatasync(file.fileno())
                item = self._queue.get()


def _free_name(folder: Path, rank: int) -> Path:
    """A file of its own for each process: one that was killed may have left half a record at its end."""
    taken = len(list(folder.glob(f"rank_{rank:05d}.*.spool")))
    return folder / f"rank_{rank:05d}.{taken}.spool"
