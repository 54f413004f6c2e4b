"""Where a run begins: anew, at its newest checkpoint, or at the one that `run.resume_from` names."""
from __future__ import annotations

from pathlib import Path

from hdpo.config import Config
from hdpo.errors import CheckpointError, ConfigError
from hdpo.state.folders import has_state, read_state, step_folders
from hdpo.state.shards import listed_files


def starting_point(config: Config) -> Path | None:
    """The checkpoint to go on from; None for a run that begins. Reads only. Raises CheckpointError, ConfigError.

    `run.resume_from` is followed once: a run that has saved since then goes on from its newest, so that the same command
    may be given again, by a launcher too.
    """
    if not config.run.resume:
        if config.run.resume_from:
            raise ConfigError("run.resume_from names a checkpoint to go on from, and run.resume=false says not to: leave one out")
        return None
    folders = step_folders(config.run.path)
    resumable = [folder for folder in folders if has_state(folder)]
    if config.run.resume_from and not any(_followed(folder, config.run.resume_from) for folder in resumable):
        return _named(config, config.run.resume_from)
    if folders and not resumable:
        raise CheckpointError(f"{folders[-1]} holds weights and no trainer/ to go on from: to train on from its weights, set "
                              "model.path to it and run.name to a new name; to begin anew, run.resume=false")
    return resumable[-1] if resumable else None


def readable_start(config: Config) -> Path | None:
    """`starting_point`, or None where its state can't be read: opening the run then puts it aside or names it."""
    start = starting_point(config)
    try:
        if start is not None:
            read_state(start)
    except CheckpointError:
        return None
    return start


def is_finished(config: Config) -> bool:
    """Whether the last step of this configuration is saved already, in files of the right size."""
    start = readable_start(config)
    if start is None:
        return False
    state = read_state(start)
    try:
        files = listed_files(start / "trainer", start, state["world_size"])
        whole = all((start / name).stat().st_size == size for name, (size, _) in files.items())
    except (CheckpointError, OSError):      # found and named when the run is opened
        return False
    return whole and int(state["step"]) >= config.optim.steps


def _named(config: Config, wanted: str) -> Path:
    folder = config.run.path / "checkpoints" / f"step_{int(wanted):06d}" if wanted.isdecimal() else Path(wanted)
    if not folder.is_dir():
        there = ", ".join(found.name for found in step_folders(config.run.path)) or "none"
        raise CheckpointError(f"run.resume_from: no such checkpoint: {folder}; this run has {there}")
    if not has_state(folder):
        raise CheckpointError(f"run.resume_from: {folder} holds no trainer/ to go on from; model.path can name its weights")
    return folder


def _followed(folder: Path, wanted: str) -> bool:
    """Whether the checkpoint was made after `run.resume_from` had been followed."""
    try:
        return read_state(folder)["config"]["run"].get("resume_from") == wanted
    except CheckpointError:
        return False
