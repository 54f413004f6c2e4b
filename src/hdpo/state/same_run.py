"""Whether a checkpoint belongs to this configuration, and what may be different when a run goes on.

Fields that don't change what is learned may differ freely. Any other may when `run.allow` names it; the change is then
recorded in every later checkpoint. Paths of model and data are compared by what lies there.
"""
from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hdpo.config import Config
from hdpo.errors import CheckpointError, DataError
from hdpo.state import fingerprints

log = logging.getLogger(__name__)

MAY_CHANGE = (
    "run.", "log.", "eval.", "checkpoint.", "optim.steps", "optim.epochs", "optim.max_skipped", "optim.offload", "judge.",
    "tools.", "batch.", "sync.", "reward.max_unscored", "data.val", "data.cache", "data.image_root",
    "rollout.max_num_seqs", "rollout.max_batched_tokens", "rollout.kv_cache_gib", "rollout.gpu_memory", "rollout.engine",
    "rollout.tensor_parallel", "rollout.enforce_eager", "rollout.sleep", "rollout.image_cache_gib")
"""Fields a resumed run may set differently: they do not change what is learned. But for these:"""

MUST_STAY = ("run.seed",)


@dataclass(frozen=True, slots=True)
class Change:
    """A field that `run.allow` lets differ from the checkpoint's."""

    field: str
    was: Any
    now: Any
    step: int        # steps done when it changed

    def line(self) -> str:
        return f"run.allow: {self.field} was {self.was!r}, is {self.now!r} from step {self.step + 1} on"


def content_of(config: Config) -> dict[str, str]:
    """Field -> what lies behind its paths. Raises DataError naming a path that can't be read."""
    found = {}
    try:
        if config.model.path and Path(config.model.path).is_dir():
            found["model.path"] = fingerprints.of_model(config.model.path)
        if config.data.train:
            found["data.train"] = " ".join(fingerprints.of_data(path) for path in config.data.train)
    except OSError as exc:
        raise DataError(f"{exc.filename}: {exc.strerror}") from exc
    return found


def check_same_run(folder: Path, state: Mapping[str, Any], config: Config, content: Mapping[str, str]) -> list[Change]:
    """The changes that `run.allow` lets through. Raises CheckpointError, one line, for any other; ConfigError is raised by
    the configuration itself when `run.allow` names no field."""
    then, now = flat_settings(state["config"]), flat_settings(config.model_dump(mode="json"))
    defaults = flat_settings(Config().model_dump(mode="json"))
    known = state.get("content", {})
    changes, refused = [], []
    for key in now:
        was = then.get(key, defaults[key])     # a field that an older version did not have stands at its default
        if known.get(key) and content.get(key):
            same, moved = known[key] == content[key], was != now[key]
            said = f"{key} was {was!r}, is {now[key]!r} with other content" if moved else f"the files of {key} have changed"
        else:
            same, said = was == now[key] or _free(key, then, now), f"{key} was {was!r}, is {now[key]!r}"
        if same:
            continue
        if key in config.run.allow:
            changes.append(Change(key, was, now[key], int(state["step"])))
        else:
            refused.append((key, said + _hint(key)))
    if refused:
        raise CheckpointError(
            f"{folder} belongs to another configuration: {', '.join(said for _, said in refused)}; to go on all the same set "
            f"run.allow=[{','.join(key for key, _ in refused)}], to begin anew set run.name to a new name, or run.resume=false")
    return changes


def record(state: Mapping[str, Any] | None, changes: list[Change]) -> list[dict[str, Any]]:
    """All changes of a run so far, for its next checkpoints."""
    return [*(state or {}).get("changes", []), *(asdict(change) for change in changes)]


def _free(key: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    if key == "optim.steps" and now.get("optim.schedule") != "constant":
        return False
    return key.startswith(MAY_CHANGE) and key not in MUST_STAY


def _hint(key: str) -> str:
    return " (the learning rate would jump: the schedule ends at optim.steps)" if key == "optim.steps" else ""


def flat_settings(tree: dict[str, Any]) -> dict[str, Any]:
    """section.key -> value"""
    return {f"{section}.{key}": value for section, fields in tree.items() for key, value in fields.items()}
