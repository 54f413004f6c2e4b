"""Checkpoints: a plain Hugging Face folder beside the state that resuming needs, whole or not at all.

    checkpoints/step_000010/{config.json, model.safetensors, tokenizer files, trainer/{state.json, rank_00000.*, ...}}

The state is copied to host memory inside the step, each rank its share; a thread of each rank writes it while training goes
on, under a hidden name, and rank 0 renames the folder when every rank's files are on the disk. So the newest visible one is
always whole, whenever the machine is lost. Files that were damaged later are found by their checksums before a run resumes.
All randomness of a run is a function of (seed, step, task, sample), generators of the ranks are saved besides, and the
data position is part of the state: the step after a resume is the step that would have come.
"""
from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from hdpo.config import Config
from hdpo.errors import CheckpointError
from hdpo.ranks.world import World
from hdpo.state.shards import (
    ShardReader,
    TrainingState,
    damage,
    listed_files,
    rng_state,
    set_rng_state,
    sync_folder,
)
from hdpo.state.writing import Writing

log = logging.getLogger(__name__)

MAY_CHANGE = (
    "run.", "log.", "eval.", "checkpoint.", "optim.steps", "optim.max_skipped", "optim.offload", "judge.", "tools.",
    "batch.", "sync.", "reward.max_unscored", "data.cache", "data.image_root",
    "rollout.max_num_seqs", "rollout.max_batched_tokens", "rollout.kv_cache_gib", "rollout.gpu_memory", "rollout.engine",
    "rollout.tensor_parallel", "rollout.enforce_eager", "rollout.sleep", "rollout.image_cache_gib")
"""Fields a resumed run may set differently: they do not change what is learned."""

OTHERS_S, LEAVE_S = 60.0, 15.0
"""How long rank 0 waits for files of the others that say they have written them; for those of ranks that may be gone."""


class Saved(Protocol):
    """What can be saved. Methods are collective."""

    world: World

    def export_model(self, folder: Path) -> Callable[[], list[Path]]:
        """Begin to write the weights of now as a Hugging Face folder; the returned function, called on another thread, waits
        until this rank's files are written and returns them."""
        ...

    def snapshot_state(self) -> TrainingState: ...

    def restore_state(self, reader: ShardReader) -> None: ...


def step_folders(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted((run / "checkpoints").glob("step_*"))


class Checkpoints:
    """Saves and resumes one run. Collective but for `note`; close it (`with`) so that the last write is not cut off.

    Opening a run sets damaged checkpoints aside, with a warning, so that it goes on from the newest good one.
    """

    def __init__(self, policy: Saved, config: Config) -> None:
        self.policy, self.config, self.run, self.world = policy, config, config.run.path, policy.world
        self._writing: Writing | None = None
        self._metric: tuple[int, float] = (-1, math.nan)
        if self.world.is_main:
            self._clear(keep=config.run.resume)
        self.world.barrier()
        if config.run.resume:
            self._set_damaged_aside()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._writing is not None:    # only after an error: other ranks may be gone
            self._writing.finish(LEAVE_S)

    # -- saving ----------------------------------------------------------------------------------------------------

    def note(self, step: int, scalars: Mapping[str, float]) -> None:
        """Remember the value that `checkpoint.best` chooses by, when it is among the numbers logged after `step` steps."""
        if self.config.checkpoint.best in scalars:
            self._metric = (step, float(scalars[self.config.checkpoint.best]))

    def save(self, step: int, data: dict[str, Any]) -> Path:
        """Copy the state after `step` steps; it is written while training goes on. A save under way is awaited first.

        Raises CheckpointError, on every rank, when the earlier one could not be written; what is visible is untouched.
        """
        self.finish()
        final = self.run / "checkpoints" / f"step_{step:06d}"
        if self.world.broadcast(final.is_dir()):
            return final
        partial = final.with_name(f".partial_{final.name}")
        failure = _make_folder(partial) if self.world.is_main else ""
        if failure := self.world.broadcast(failure):
            raise _cannot_write(final, failure)
        write_model, state = self.policy.export_model(partial), self.policy.snapshot_state()
        state.rng = rng_state()
        summary = {"step": step, "data": data, "world_size": self.world.size, "metric": self._metric_at(step),
                   "config": self.config.model_dump(mode="json")}

        def commit() -> None:
            os.replace(partial, final)
            sync_folder(final.parent)
            prune(self.run, self.config.checkpoint.keep)

        self._writing = Writing(self.world, final, partial, write_model, state, summary, commit)
        return final

    def save_last(self, step: int, data: dict[str, Any]) -> None:
        """Save and wait until it is visible: the run is about to end."""
        self.save(step, data)
        self.finish()

    def _metric_at(self, step: int) -> dict[str, Any]:
        name = self.config.checkpoint.best
        known = self._metric[0] == step and math.isfinite(self._metric[1])
        if name and not known and self.world.is_main:
            log.warning("checkpoint.best: %s was not logged at step %d, so that checkpoint cannot be the best", name, step)
        return {"name": name, "value": self._metric[1] if known else None}

    def check(self) -> None:
        """Raise CheckpointError on every rank when some rank could not write. Waits for nothing."""
        self._settle(wait=False)

    def finish(self) -> None:
        """Wait until what is being written is visible. Raises CheckpointError on every rank."""
        self._settle(wait=True)

    def _settle(self, wait: bool) -> None:
        writing = self._writing
        if writing is None:
            return
        if wait:
            writing.wrote.wait()
        alive = self.world.any(writing.is_alive())    # asked first: errors of threads that have ended are final
        failed = [error for error in self.world.gather(writing.error) if error]
        if not failed and wait:
            writing.finish(OTHERS_S)
            failed = [error for error in self.world.gather(writing.error) if error]
        if failed:
            writing.finish(0.0)
            self._writing = None
            raise _cannot_write(writing.final, failed[0])
        if wait or not alive:
            self._writing = None

    # -- resuming --------------------------------------------------------------------------------------------------

    def resume(self, make_room: Callable[[], None] = lambda: None) -> tuple[int, dict[str, Any] | None]:
        """Load the newest checkpoint: (steps done, data position), or (0, None) on a fresh run. Any number of ranks.

        `make_room` is called before anything is loaded.
        """
        folders = self.world.broadcast(step_folders(self.run)) if self.config.run.resume else []
        if not folders:
            return 0, None
        state = read_state(folders[-1])
        _check_same_run(folders[-1], state, self.config)
        reader = ShardReader(folders[-1] / "trainer", state["world_size"])
        make_room()
        self.policy.restore_state(reader)
        if (rng := reader.rng(self.world.rank)) is not None:
            set_rng_state(rng)
        return int(state["step"]), state["data"]

    def _clear(self, keep: bool) -> None:
        """Remove what a killed process left behind; without `keep`, checkpoints of a run that starts anew step aside."""
        for left in (self.run / "checkpoints").glob(".p*_step_*"):    # .partial_ and .pruned_
            _remove(left)
        for folder in [] if keep else step_folders(self.run):
            log.warning("run.resume is false: %s becomes %s", folder, _rename(folder, "replaced").name)

    def _set_damaged_aside(self) -> None:
        """Check the newest checkpoint's files, each rank its share; rename a damaged one and look at the one before."""
        aside: list[str] = []
        while folders := self.world.broadcast(step_folders(self.run)):
            found = [text for text in self.world.gather(_damage(folders[-1], self.world)) if text]
            if not found:
                break
            if self.world.is_main:
                hidden = _rename(folders[-1], "damaged")
                before = f"going on from {folders[-2].name}" if len(folders) > 1 else "there is no earlier one"
                log.warning("checkpoint damaged: %s; it is now %s, %s", found[0], hidden.name, before)
            aside.append(found[0])
            self.world.barrier()
        if aside and not folders:
            raise CheckpointError(f"no checkpoint of {self.run} is usable: {aside[-1]}; to start anew set run.name to a new name")


def prune(run: Path, keep: int) -> None:
    """Remove all but the newest `keep` (0: none) and the one with the highest metric."""
    folders = step_folders(run)
    best = _best(folders)
    for folder in folders[:-keep] if keep else []:
        if folder != best:
            _remove(_rename(folder, "pruned"))     # renamed first: a crash leaves no half checkpoint visible


def _rename(folder: Path, why: str) -> Path:
    """Hide a checkpoint under .{why}_{name}."""
    hidden = folder.with_name(f".{why}_{folder.name}")
    _remove(hidden)
    return folder.rename(hidden)


def _remove(folder: Path) -> None:
    """A folder, or a link to one that somebody moved elsewhere: what it leads to is his and stays. What can't be removed stays
    hidden with a warning, because a run must not end for it."""
    try:
        if folder.is_symlink():
            folder.unlink()
        elif folder.exists():
            shutil.rmtree(folder)
    except OSError as exc:
        log.warning("cannot remove %s (%s)", folder, exc.strerror or exc)


def _best(folders: list[Path]) -> Path | None:
    """The checkpoint with the highest value of the newest one's metric; of equals the newest."""
    metrics = [_metric_of(folder) for folder in folders]
    scored = [(metric["value"], folder) for metric, folder in zip(metrics, folders)
              if metric.get("name") == metrics[-1].get("name") and metric.get("value") is not None]
    return max(scored)[1] if scored else None


def _metric_of(folder: Path) -> dict[str, Any]:
    """Empty for a checkpoint that can't be read, for example behind a link that leads nowhere: it is no candidate."""
    try:
        return read_state(folder).get("metric") or {}
    except CheckpointError:
        return {}


def read_state(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "trainer" / "state.json").read_text())
    except (OSError, ValueError) as exc:
        raise CheckpointError(f"{folder / 'trainer' / 'state.json'} cannot be read ({exc})") from exc


def _damage(folder: Path, world: World) -> str:
    """What is wrong with this rank's share of a checkpoint's files, or an empty string."""
    try:
        files = listed_files(folder / "trainer", folder, read_state(folder)["world_size"])
    except CheckpointError as exc:
        return str(exc)
    by_size = sorted(files, key=lambda name: files[name])
    return damage(folder, {name: files[name] for name in by_size[world.rank::world.size]})


def _make_folder(partial: Path) -> str:
    try:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "trainer").mkdir(parents=True)
    except OSError as exc:
        return exc.strerror or str(exc)
    return ""


def _cannot_write(final: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"cannot write checkpoint {final}: {reason}; earlier checkpoints are intact; the same "
                           "command goes on from the newest when that is mended")


def _check_same_run(folder: Path, state: dict[str, Any], config: Config) -> None:
    now = flat_settings(config.model_dump(mode="json"))
    then = flat_settings(Config().model_dump(mode="json")) | flat_settings(state["config"])   # older ones know fewer fields
    for key in then.keys() | now.keys():
        if then.get(key) != now.get(key) and not key.startswith(MAY_CHANGE):
            raise CheckpointError(f"{folder} belongs to another configuration: {key} was {then.get(key)!r}, is {now.get(key)!r}; "
                                  "set run.name to a new name, or run.resume=false")


def flat_settings(tree: dict[str, Any]) -> dict[str, Any]:
    """section.key -> value"""
    return {f"{section}.{key}": value for section, fields in tree.items() for key, value in fields.items()}
