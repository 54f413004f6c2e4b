"""The folders in checkpoints/: which are ours, which can be resumed from, and which have had their time.

Ours are `step_` and digits, and the hidden ones that such a folder becomes: .partial_ (being written), .pruned_ (being
removed), .replaced_ and .damaged_ (put aside). Whatever else lies there is the user's and is never counted, read or removed.
Trouble with an old folder is a warning, once; it never ends a run.
"""
from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

from hdpo.errors import CheckpointError

log = logging.getLogger(__name__)

_NAME = re.compile(r"step_(\d+)")
_HIDDEN = re.compile(r"\.(partial|pruned|replaced|damaged)_step_\d+")
_warned: set[str] = set()


def step_folders(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return numbered(run / "checkpoints")


def numbered(parent: Path) -> list[Path]:
    """Folders named step_ and digits, in the order of their numbers."""
    found = [folder for folder in parent.glob("step_*") if _NAME.fullmatch(folder.name) and _is_folder(folder)]
    return sorted(found, key=step_of)


def _is_folder(path: Path) -> bool:
    """Also a link to one that was moved away, even when it leads nowhere by now."""
    return path.is_dir() or path.is_symlink()


def step_of(folder: Path) -> int:
    """The number in the name: steps done when the checkpoint was made."""
    match = _NAME.fullmatch(folder.name)
    assert match, folder
    return int(match[1])


def newest_step(run: Path) -> int:
    """Steps done at the newest checkpoint; 0 when there is none."""
    return max((step_of(folder) for folder in step_folders(run)), default=0)


def has_state(folder: Path) -> bool:
    """Whether a checkpoint holds more than weights: users remove trainer/ of old ones to save space."""
    return (folder / "trainer").is_dir()


def hidden_folders(parent: Path, *kinds: str) -> list[Path]:
    """Folders that were checkpoints once or were going to be, by what became of them."""
    found = [(match[1], folder) for folder in parent.glob(".*")
             if (match := _HIDDEN.fullmatch(folder.name)) and _is_folder(folder)]
    return sorted(folder for kind, folder in found if kind in kinds)


def put_aside(folder: Path, why: str) -> Path:
    """Hide a checkpoint under .{why}_{name}. Raises OSError."""
    hidden = folder.with_name(f".{why}_{folder.name}")
    remove(hidden)
    return folder.rename(hidden)


def prune(run: Path, keep: int) -> None:
    """Remove all but the newest `keep` (0: none) and the one with the highest metric.

    Folders put aside count as older than any other: they go when `keep` whole ones stand. Raises nothing.
    """
    for left in hidden_folders(run / "checkpoints", "pruned"):
        remove(left)
    folders = step_folders(run)
    if not keep:
        return
    best = _best(folders)
    for folder in folders[:-keep]:
        if folder != best:
            try:
                remove(put_aside(folder, "pruned"))     # renamed first: a crash leaves no half checkpoint visible
            except OSError as exc:
                warn_once(f"the old checkpoint {folder} can't be removed ({exc.strerror}); it stays")
    if len(folders) >= keep:
        for left in hidden_folders(run / "checkpoints", "replaced", "damaged"):
            remove(left)


def remove(folder: Path) -> None:
    """Remove a hidden folder, or a link to one that somebody moved elsewhere: what it leads to is his and stays. What can't be
    removed (a file that is open elsewhere on NFS) is tried again at the next save."""
    try:
        if folder.is_symlink():
            folder.unlink()
        elif folder.exists():
            shutil.rmtree(folder)
    except OSError as exc:
        warn_once(f"{folder} can't be removed yet ({exc.strerror}); its space is not free")


def warn_once(text: str) -> None:
    if text not in _warned:
        _warned.add(text)
        log.warning(text)


def _best(folders: list[Path]) -> Path | None:
    """The checkpoint with the highest value of the newest one's metric; of equals the newest."""
    if not folders or not (name := _metric(folders[-1]).get("name")):
        return None
    metrics = [(_metric(folder), folder) for folder in folders]
    scored = [(metric["value"], step_of(folder), folder) for metric, folder in metrics
              if metric.get("name") == name and metric.get("value") is not None]
    return max(scored)[2] if scored else None


def _metric(folder: Path) -> dict[str, Any]:
    try:
        return read_state(folder).get("metric") or {}
    except CheckpointError as exc:
        warn_once(f"{exc}; this checkpoint can't be the best")
        return {}


def read_state(folder: Path) -> dict[str, Any]:
    """trainer/state.json of a checkpoint. Raises CheckpointError."""
    try:
        return json.loads((folder / "trainer" / "state.json").read_text())
    except (OSError, ValueError) as exc:
        raise CheckpointError(f"{folder / 'trainer' / 'state.json'} cannot be read ({exc})") from exc
