"""Checkpoints: a plain Hugging Face folder beside the state that resuming needs, written whole or not at all.

    checkpoints/step_000010/{config.json, model.safetensors, tokenizer files, trainer/{state.json, zero3/...}}

A folder is written under a hidden name and renamed when it is complete, so the newest visible one is always usable. All
randomness of a run is a function of (seed, step, task, sample), and the data position is part of the state, so the
step after a resume is the step that would have come.
"""
from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, Protocol

from hdpo.config import Config
from hdpo.errors import CheckpointError
from hdpo.train.world import World

MAY_CHANGE = (
    "run.", "log.", "eval.", "checkpoint.", "optim.steps", "optim.max_skipped", "optim.offload", "judge.", "tools.",
    "batch.", "sync.", "reward.max_unscored",
    "rollout.max_num_seqs", "rollout.max_batched_tokens", "rollout.kv_cache_gib", "rollout.gpu_memory", "rollout.engine")
"""Fields a resumed run may set differently: they do not change what is learned."""


class Saved(Protocol):
    world: World

    def save_model(self, folder: Path) -> None: ...

    def save_state(self, folder: Path) -> None: ...

    def load_state(self, folder: Path) -> None: ...


def step_folders(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted((run / "checkpoints").glob("step_*"))


def save(run: Path, step: int, policy: Saved, data: dict[str, Any], config: Config) -> Path:
    """Save after `step` steps are done. Collective. Raises CheckpointError and leaves the earlier ones untouched."""
    final = run / "checkpoints" / f"step_{step:06d}"
    if policy.world.broadcast(final.is_dir()):
        return final
    partial = final.with_name(f".partial_{final.name}")
    try:
        if policy.world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            (partial / "trainer").mkdir(parents=True)
        policy.world.barrier()
        policy.save_model(partial)
        policy.save_state(partial / "trainer")
        policy.world.barrier()
        if policy.world.is_main:
            state = {"step": step, "data": data, "world_size": policy.world.size, "config": config.model_dump(mode="json")}
            (partial / "trainer" / "state.json").write_text(json.dumps(state))
            os.replace(partial, final)
    except OSError as exc:
        raise CheckpointError(f"cannot write checkpoint {final}: {exc}; earlier checkpoints are intact") from exc
    policy.world.barrier()
    if policy.world.is_main:
        _prune(run, config.checkpoint.keep)
    return final


def _prune(run: Path, keep: int) -> None:
    for folder in step_folders(run)[:-keep] if keep else []:
        doomed = folder.with_name(f".pruned_{folder.name}")   # rename first: a crash never leaves half a checkpoint visible
        folder.rename(doomed)
        shutil.rmtree(doomed)


def resume(run: Path, policy: Saved, config: Config) -> tuple[int, dict[str, Any] | None]:
    """Load the newest checkpoint: (steps done, data position), or (0, None) on a fresh run. Collective."""
    folders = policy.world.broadcast(step_folders(run)) if config.run.resume else []
    if not folders:
        return 0, None
    folder = folders[-1]
    state = read_state(folder)
    _check_same_run(folder, state, config)
    if state["world_size"] != policy.world.size:
        raise CheckpointError(f"{folder} was saved by {state['world_size']} ranks and this run has {policy.world.size}; "
                              f"start with {state['world_size']} ranks, or from its weights: --set model.path={folder}")
    policy.load_state(folder / "trainer")
    return int(state["step"]), state["data"]


def read_state(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "trainer" / "state.json").read_text())
    except (OSError, ValueError) as exc:
        raise CheckpointError(f"{folder} is damaged ({exc}); remove it to resume from the one before") from exc


def _check_same_run(folder: Path, state: dict[str, Any], config: Config) -> None:
    then, now = _flat(state["config"]), _flat(config.model_dump(mode="json"))
    for key in then.keys() | now.keys():
        if then.get(key) != now.get(key) and not key.startswith(MAY_CHANGE):
            raise CheckpointError(f"{folder} belongs to another configuration: {key} was {then.get(key)!r}, is {now.get(key)!r}; "
                                  "set run.name to a new name, or run.resume=false")


def _flat(tree: dict[str, Any]) -> dict[str, Any]:
    return {f"{section}.{key}": value for section, fields in tree.items() for key, value in fields.items()}
