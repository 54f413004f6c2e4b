"""What a run will write into its folder, against the space that is free there: checkpoints, spool, dumps.

Checkpoints are exact sums: every parameter once in the precision that is written, and 12 bytes (fp32 weight, two moments) for
each trained one. Spool and dumps are at most what their settings allow, and no more than rollouts of the full context with all
their pictures would fill. All sizes are bytes. What the run's folder holds already is not counted again.
"""
from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from hdpo.config import Config
from hdpo.doctor.host_plan import CROPS
from hdpo.doctor.memory_plan import Change, weight_dtype, with_change, written
from hdpo.doctor.shapes import Shapes, read_shapes
from hdpo.errors import ConfigError
from hdpo.state.folders import step_folders

GIB = 2**30
STATE_BYTES = 12           # of a trained parameter, whatever the weights are written in
ROLLOUT_TOKEN = 16         # bytes of a rollout's token: id, mask, log-prob and text
PICTURE_PIXEL = 3          # bytes of a pixel that no compression makes smaller


@dataclass(frozen=True, slots=True)
class DiskPlan:
    """Bytes. `parts`: the most that each part of the run's folder will hold at once; `held`: what it holds today."""

    folder: Path
    checkpoint: int            # one of them
    checkpoints: int           # at once: those kept, the best, and the one being written
    parts: dict[str, int]
    held: dict[str, int]
    present: int               # checkpoints that are there already
    free: int | None           # None where the machine is another one

    @property
    def to_come(self) -> int:
        return sum(max(0, size - self.held.get(part, 0)) for part, size in self.parts.items())

    @property
    def at_least(self) -> int:
        """Two checkpoints, of which the older one is removed when the newer one is whole; one at the least is to come."""
        return max(1, min(2, self.checkpoints) - self.present) * self.checkpoint

    def fits(self) -> bool:
        return self.free is None or self.to_come <= self.free

    def lines(self) -> list[str]:
        said = [f"{name} {_size(size)}" for name, size in self.parts.items() if size]
        has = "" if self.free is None else f", {_size(self.free)} free"
        return [f"{self.checkpoints} checkpoints of {_size(self.checkpoint)} at once; in {self.folder}{has}, at most",
                ", ".join(said)]


def plan(config: Config, shapes: Shapes, weight_bytes: int, *, sft: bool = False, free: int | None = None) -> DiskPlan:
    """`weight_bytes`: of a weight as it is written, 2 in bf16, 4 in fp32. `free`: bytes of the file system, None: unknown."""
    folder, checkpoint = config.run.path, weight_bytes * shapes.parameters + STATE_BYTES * shapes.trained
    count, parts = _parts(config, shapes, weight_bytes, sft)
    return DiskPlan(folder, checkpoint, count, parts, {name: _held(folder / name) for name in parts}, len(step_folders(folder)),
                    free)


def _parts(config: Config, shapes: Shapes, weight_bytes: int, sft: bool) -> tuple[int, dict[str, int]]:
    """(checkpoints at once, bytes by folder)."""
    steps, due, weights = config.optim.steps, config.checkpoint, weight_bytes * shapes.parameters
    saves = math.ceil(steps / due.every_steps)
    count = min(saves, due.keep + bool(due.best) + 1) if due.keep else saves
    parts = {"checkpoints": count * (weights + STATE_BYTES * shapes.trained),
             "weights": weights * (steps // due.weights_every_steps) if due.weights_every_steps else 0}
    if not sft:
        rows = config.rollout.prompts_per_step * config.rollout.group_size * _rollout(config, shapes)
        every = config.log.rollouts_every
        spooled = 0 if config.run.deterministic else rows * min(steps, due.every_steps)
        parts["spool"] = _at_most(spooled, config.run.spool_gib)
        parts["rollouts"] = _at_most(rows * (steps // every), config.log.rollouts_gib) if every else 0
    return count, parts


def check(config: Config, shapes: Shapes, weight_bytes: int, *, sft: bool = False, free: int | None = None
          ) -> tuple[DiskPlan, str]:
    """The plan, and a line where the whole run may not fit (else ""). Raises ConfigError where even two checkpoints don't."""
    made = plan(config, shapes, weight_bytes, sft=sft, free=free)
    if made.free is not None and made.at_least > made.free:
        raise ConfigError(f"disk: {made.folder} has {_size(made.free)} free, a run needs {_size(made.at_least)} to save: a "
                          f"checkpoint has {_size(made.checkpoint)}, and the last one stays until the next is whole; set "
                          "run.folder to a larger disk")
    if made.fits():
        return made, ""
    way = "run.folder on a larger disk"
    for change in _remedies(config, made):
        if replace(made, parts=_parts(with_change(config, change), shapes, weight_bytes, sft)[1]).fits():
            way = ", ".join(f"{field}={written(value)}" for field, value in change.items()) + f", or {way}"
            break
    return made, (f"disk: the run may not fit: {made.folder} may come to need {_size(made.to_come)} more, "
                  f"{_size(made.free or 0)} are free; it fits with {way}")


def here(config: Config, *, sft: bool, elsewhere: bool = False, on_device: bool | None = None) -> tuple[DiskPlan, str]:
    """The checked plan for run.folder on this machine; `elsewhere`: another machine's disk, of which nothing is known."""
    size = weight_dtype(config, on_device).itemsize
    return check(config, read_shapes(config.model), size, sft=sft, free=None if elsewhere else free_space(config.run.path))


def free_space(folder: Path) -> int:
    """Bytes that this user may still write where `folder` is or will be. Raises ConfigError."""
    place = folder.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        return shutil.disk_usage(place).free
    except OSError as exc:
        raise ConfigError(f"run.folder: {folder}: {exc.strerror}") from exc


def _rollout(config: Config, shapes: Shapes) -> int:
    """The most that one rollout of a group fills, its share of the prompt's pictures included."""
    pixels = 0
    if shapes.vision_layers:
        pixels = min(CROPS, config.rollout.max_images * min(config.model.max_pixels, config.model.max_tool_pixels))
        pixels += config.model.max_pixels // config.rollout.group_size
    return config.max_model_len * ROLLOUT_TOKEN + pixels * PICTURE_PIXEL


def _at_most(size: int, gib: float) -> int:
    return min(size, int(gib * GIB)) if gib else size


def _held(folder: Path) -> int:
    """Bytes of the files there. One that goes while they are counted counts nothing."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:
            continue
    return total


def _remedies(config: Config, made: DiskPlan) -> Iterator[Change]:
    """Settings that write less, those first that lose least; then all of them together."""
    over, due = made.to_come - (made.free or 0), config.checkpoint
    room = math.floor(10 * (made.parts.get("rollouts", 0) - over) / GIB) / 10
    keep = made.checkpoints - 1 - bool(due.best) - math.ceil(over / made.checkpoint)
    smaller: Change = {"log.rollouts_gib": room} if room > 0 else {"log.rollouts_every": 0}
    dumps = smaller if made.parts.get("rollouts") else {}
    fewer: Change = {"checkpoint.keep": max(1, keep)} if due.keep != 1 else {}
    spool: list[Change] = [{"run.spool_gib": gib} for gib in (20.0, 10.0, 5.0, 1.0) if gib * GIB < made.parts.get("spool", 0)]
    rarer: list[Change] = [{"checkpoint.weights_every_steps": due.weights_every_steps * times} for times in (2, 5, 10)
                           if due.weights_every_steps]
    every = {**fewer, **dumps, **(spool[-1] if spool else {})}
    yield from (change for change in (dumps, fewer, *rarer, *spool, dumps | fewer, every) if change)
    yield from (every | change for change in rarer)


def _size(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB // 10 else f"{size / 2**20:.1f} MiB"
