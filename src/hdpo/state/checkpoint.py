"""Checkpoints: a plain Hugging Face folder beside the state that resuming needs, whole or not at all.

    checkpoints/step_000010/{config.json, model.safetensors, tokenizer files, trainer/{state.json, rank_00000.*, ...}}

The state is copied to host memory inside the step, each rank its share; a thread of each rank writes it while training goes
on, under a hidden name, and rank 0 renames the folder when every rank's files are on the disk. So the newest visible one is
always whole, whenever the machine is lost. Files that were damaged later are found by their checksums before a run resumes.
All randomness of a run is a function of (seed, step, task, sample), generators of the ranks are saved besides, and the
data position is part of the state: the step after a resume is the step that would have come.
"""
from __future__ import annotations

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
from hdpo.state import folders
from hdpo.state.folders import hidden_folders, prune, put_aside, read_state, step_folders, step_of
from hdpo.state.lock import RunLock
from hdpo.state.same_run import check_same_run, content_of, record
from hdpo.state.shards import (
    ShardReader,
    TrainingState,
    damage,
    listed_files,
    rng_state,
    set_rng_state,
    sync_folder,
)
from hdpo.state.starting import starting_point
from hdpo.state.writing import Writing

log = logging.getLogger(__name__)

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


class Checkpoints:
    """Saves and resumes one run. Collective but for `note`; close it (`with`) so that the last write is not cut off.

    Opening a run sets damaged checkpoints aside, with a warning, so that it goes on from the newest good one. `lock` is rank
    0's hold on the folder: nothing is written once another process has taken it over. `content` is what `content_of` finds.
    """

    def __init__(self, policy: Saved, config: Config, lock: RunLock | None = None) -> None:
        self.policy, self.config, self.run, self.world, self._lock = policy, config, config.run.path, policy.world, lock
        self._writing: Writing | None = None
        self._metric: tuple[int, float] = (-1, math.nan)
        self._changes: list[dict[str, Any]] = []
        self.beside: Callable[[Path], Callable[[], list[Path]]] = lambda folder: list
        """Set it to what writes more into the folder of a whole state, as `Saved.export_model` does."""
        self.new_rows = False      # whether the training rows are not those of the checkpoint (run.allow)
        self.content: dict[str, str] = self.world.broadcast(content_of(config) if self.world.is_main else None)
        if self.world.is_main:
            self._clear(keep=config.run.resume)
        self.world.barrier()
        if config.run.resume:
            self._set_damaged_aside()
        self.start: Path | None = self.world.broadcast(starting_point(config) if self.world.is_main else None)
        self.start_step = int(read_state(self.start)["step"]) if self.start else 0
        if self.start is not None and config.run.resume_from:
            self._check_named(self.start)
        self.world.barrier()
        if self.world.is_main and self.start is not None:
            self._rewind(self.start)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._writing is not None:    # only after an error: other ranks may be gone
            self._writing.finish(LEAVE_S)

    # -- saving ----------------------------------------------------------------------------------------------------

    def note(self, step: int, scalars: Mapping[str, float]) -> None:
        """Remember the value that `checkpoint.best` chooses by, when it is among the numbers logged after `step` steps: the
        highest is the best, and of a number with a minus before its name the lowest."""
        name = self.config.checkpoint.best.removeprefix("-")
        if name in scalars:
            self._metric = (step, float(scalars[name]) * (1 if name == self.config.checkpoint.best else -1))

    def save(self, step: int, data: dict[str, Any]) -> Path:
        """Copy the state after `step` steps; it is written while training goes on. A save under way is awaited first.

        Raises CheckpointError, on every rank, when the earlier one could not be written; what is visible is untouched.
        """
        self.finish()
        final = self.run / "checkpoints" / f"step_{step:06d}"
        if self.world.broadcast(final.is_dir()):
            return final
        partial = self._begin(final)
        write_model, write_beside = self.policy.export_model(partial), self.beside(partial)
        state = self.policy.snapshot_state()
        state.rng = rng_state()
        summary = {"step": step, "data": data, "world_size": self.world.size, "metric": self._metric_at(step),
                   "config": self.config.model_dump(mode="json"), "content": self.content, "changes": self._changes}

        def commit() -> None:
            os.replace(partial, final)
            sync_folder(final.parent)
            prune(self.run, self.config.checkpoint.keep)

        self._writing = Writing(self.world, final, partial, lambda: write_model() + write_beside(), state, summary, commit)
        return final

    def save_due(self, step: int, data: dict[str, Any], before: Callable[[], object] = lambda: None) -> None:
        """Save what is due after `step` steps: the weights alone, the whole state (after a call of `before`), or nothing."""
        due, last = self.config.checkpoint, step == self.config.optim.steps
        if due.weights_every_steps and step % due.weights_every_steps == 0:
            self.save_weights(step)
        if last or step % due.every_steps == 0:
            before()
            self.save(step, data)

    def save_weights(self, step: int) -> Path:
        """Copy the weights after `step` steps to weights/step_*, a model folder that is never removed, and write it while
        training goes on. Raises as `save` does."""
        self.finish()
        final = self.run / "weights" / f"step_{step:06d}"
        partial = self._begin(final)

        def commit() -> None:
            shutil.rmtree(partial / "trainer")      # where ranks met
            shutil.rmtree(final, ignore_errors=True)    # of a life before this run went back to an earlier step
            os.replace(partial, final)
            sync_folder(final.parent)

        self._writing = Writing(self.world, final, partial, self.policy.export_model(partial), TrainingState({}, {}, {}),
                                {"step": step}, commit)
        return final

    def _begin(self, final: Path) -> Path:
        """A hidden folder to write into, made by rank 0. Raises CheckpointError on every rank."""
        partial = final.with_name(f".partial_{final.name}")
        failure = ""
        if self.world.is_main:
            failure = (self._lock.lost() if self._lock is not None else "") or _make_folder(partial)
        if failure := self.world.broadcast(failure):
            raise _cannot_write(final, failure)
        return partial

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
        """Load the state to go on from: (steps done, data position), or (0, None) on a fresh run. Any number of ranks.

        `make_room` is called before anything is loaded. Raises CheckpointError for a state of another configuration.
        """
        if self.start is None:
            return 0, None
        state = read_state(self.start)
        changes = check_same_run(self.start, state, self.config, self.content)
        self._changes = record(state, changes)
        self.new_rows = any(change.field.startswith("data.") or change.field == "run.seed" for change in changes)
        for change in changes if self.world.is_main else []:
            log.warning(change.line())
        reader = ShardReader(self.start / "trainer", state["world_size"])
        make_room()
        self.policy.restore_state(reader)
        if (rng := reader.rng(self.world.rank)) is not None:
            set_rng_state(rng)
        return self.start_step, state["data"]

    def _clear(self, keep: bool) -> None:
        """Remove what a killed process left behind; without `keep`, checkpoints of a run that starts anew step aside."""
        for left in [*hidden_folders(self.run / "checkpoints", "partial", "pruned"),
                     *hidden_folders(self.run / "weights", "partial")]:
            folders.remove(left)
        for folder in [] if keep else step_folders(self.run):
            log.warning("run.resume is false: %s becomes %s", folder, put_aside(folder, "replaced").name)

    def _rewind(self, start: Path) -> None:
        """Put aside what came after the step that the run goes back to, so that those steps can be saved again."""
        later = [folder for folder in step_folders(self.run) if step_of(folder) > self.start_step]
        for folder in later:
            log.warning("the run goes on from %s: %s becomes %s", start, folder, put_aside(folder, "replaced").name)
        if later or start.parent != self.run / "checkpoints":
            shutil.rmtree(self.run / "spool", ignore_errors=True)    # sampled by weights that are not these

    def _check_named(self, start: Path) -> None:
        """Raises CheckpointError when the checkpoint that `run.resume_from` names is damaged."""
        for text in self.world.gather(_damage(start, self.world)):
            if text:
                raise CheckpointError(f"run.resume_from: {text}; name another checkpoint")

    def _set_damaged_aside(self) -> None:
        """Check the newest checkpoint's files, each rank its share; rename a damaged one and look at the one before."""
        aside: list[str] = []
        while there := self.world.broadcast([folder for folder in step_folders(self.run) if folders.has_state(folder)]):
            found = [text for text in self.world.gather(_damage(there[-1], self.world)) if text]
            if not found:
                break
            if self.world.is_main:
                hidden = put_aside(there[-1], "damaged")
                before = f"going on from {there[-2].name}" if len(there) > 1 else "there is no earlier one"
                log.warning("checkpoint damaged: %s; it is now %s, %s", found[0], hidden.name, before)
            aside.append(found[0])
            self.world.barrier()
        if aside and not there:
            raise CheckpointError(f"no checkpoint of {self.run} is usable: {aside[-1]}; to start anew set run.name to a new name")


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
