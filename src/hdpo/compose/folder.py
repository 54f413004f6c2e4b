"""A run's beginning: its folder is held and what needs no model is checked, before anything is written or loaded."""
from __future__ import annotations

import json
import logging
from contextlib import ExitStack

from hdpo.adapters.model_folder import check_model_folder
from hdpo.config import Config
from hdpo.doctor import disk_plan
from hdpo.doctor.doctor import check_tools
from hdpo.doctor.own_code import check_own
from hdpo.ranks.world import World
from hdpo.state.folders import newest_step, read_state
from hdpo.state.lock import RunLock
from hdpo.state.same_run import check_same_run, content_of
from hdpo.state.starting import is_finished, readable_start

log = logging.getLogger(__name__)


def begin_run(config: Config, command: str, steal_lock: bool, closing: ExitStack) -> RunLock | None:
    """Rank 0 holds the folder until the stage is closed, and looks at what would be refused later. The other ranks wait for
    it where they first meet. Raises UserError, one line."""
    if not World().is_main:
        return None
    lock = RunLock(config.run.path, steal_lock)
    closing.callback(lock.release)
    check_start(config, command)
    if command != "eval":
        _, warning = disk_plan.here(config, sft=command == "sft")
        if warning:
            log.warning(warning)
    return lock


def check_start(config: Config, command: str) -> None:
    """Whether the model's folder is whole, the run may go on from its checkpoint, and it has the tools and the log it asks for.
    Raises UserError."""
    if command != "eval" and (start := readable_start(config)) is not None:
        check_same_run(start, read_state(start), config, content_of(config))
    if config.rolls_out(command):
        check_own(config)
    if config.rolls_out(command) and not config.tools.url:
        check_tools(config)
    check_model_folder(config.model.path)
    if command != "eval" and config.log.wandb:
        from hdpo.adapters.wandb import check_wandb
        check_wandb()


def finished(config: Config, command: str) -> bool:
    """Whether there is nothing left to do, which rank 0 says in a line. Raises UserError when the folder is another run's."""
    if not is_finished(config):
        return False
    if command == "rl" and config.eval.after and config.data.val and not _evaluated(config):
        return False
    if World().is_main:
        check_start(config, command)
        print(f"finished already: all {config.optim.steps} steps are done, {config.run.path}/checkpoints/"
              f"step_{newest_step(config.run.path):06d} holds the last; a larger optim.steps goes on", flush=True)
    return True


def _evaluated(config: Config) -> bool:
    try:
        return config.eval.label_after in json.loads((config.run.path / "summary.json").read_text())
    except (OSError, ValueError):
        return False
