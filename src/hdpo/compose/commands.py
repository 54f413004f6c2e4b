"""`hdpo sft`, `hdpo rl`, `hdpo eval`: settings from the command line, then a stage from start to end."""
from __future__ import annotations

import contextlib
import math
import os
import re
import shlex
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from hdpo.config import Config
from hdpo.config.file import dump_config, parse_run
from hdpo.errors import DataError, ModelError
from hdpo.keys import withdraw

PART_OF = "HDPO_PART_OF"
"""In the environment of a stage that another command runs one after the other, such as `hdpo demo`."""
UNSAFE = r"[^\w@%+=:,./\[\]-]"
"""What a shell would not leave alone."""


def sft(argv: Sequence[str]) -> int:
    return _command("sft", "Supervised fine-tuning on recorded tool trajectories (columns messages, images).", argv, _train_sft)


def rl(argv: Sequence[str]) -> int:
    return _command("rl", "HDPO reinforcement learning on rows in the Metis-RL schema.", argv, _train_rl)


def evaluate(argv: Sequence[str]) -> int:
    """Benchmarks where --benchmarks names some, else data.val."""
    if any(argument.startswith("--benchmarks") for argument in argv):
        from hdpo.compose.benchmarks import main
        return main(argv)
    return _command("eval", "Greedy rollouts on the held-out rows of data.val: accuracy and tool use, by family and by need. "
                    "With --benchmarks A,B --data FOLDER published benchmarks instead: hdpo eval --benchmarks all --help.",
                    argv, _evaluate)


def _command(name: str, description: str, argv: Sequence[str],
             run: Callable[[Config, bool], None]) -> int:
    config, options = parse_run(name, description, argv)
    withdraw(config.tools.key_names)
    if config.model.path and not Path(config.model.path).is_dir() and not options.print_config:
        config = _found(config)
    if options.print_config:
        if os.environ.get("RANK", "0") == "0":
            print(dump_config(config), end="")
        return 0
    if options.dry_run:
        from hdpo.doctor.doctor import dry_run
        with contextlib.suppress(DataError):      # said by the check of the data
            config = with_epochs(config) if name == "sft" else config
        return dry_run(config, name)
    from hdpo.train.lifecycle import follow_launcher, name_the_end
    follow_launcher()
    warnings.simplefilter("ignore", FutureWarning)      # of torch and its neighbours to each other, over the progress bar
    name_the_end()
    run(config, options.steal_lock)
    return 0


def _found(config: Config) -> Config:
    """With the folder of a model that is named by its id and lies in the hub's cache; what is nowhere is named later."""
    from hdpo.adapters.model_folder import find_model
    with contextlib.suppress(ModelError):
        return config.model_copy(update={"model": config.model.model_copy(update={"path": find_model(config.model.path)})})
    return config


def _train_sft(config: Config, steal_lock: bool) -> None:
    from hdpo.compose.folder import finished
    from hdpo.compose.stage import Stage
    from hdpo.train import sft
    config = with_epochs(config)
    done = finished(config, "sft")
    if not done:
        with Stage(config, steal_lock) as stage:
            sft.train(config, stage.sft())
    say_what_next(config, "sft", report=not done)


def _train_rl(config: Config, steal_lock: bool) -> None:
    from hdpo.compose.folder import finished
    from hdpo.compose.stage import Stage
    from hdpo.train import rl
    done = finished(config, "rl")
    if not done:
        with Stage(config, steal_lock) as stage:
            rl.train(config, stage.rl())
    say_what_next(config, "rl", report=not done)


def say_what_next(config: Config, command: str, report: bool) -> None:
    """Where a run that has ended left its model, what comes next, how to evaluate it, and how to look at it. Rank 0 says it, and
    with `report` writes the page."""
    from hdpo.ranks.world import World
    from hdpo.report.page import write_report
    from hdpo.state.folders import newest_step
    from hdpo.state.starting import is_finished
    if not World().is_main or not is_finished(config):      # a run that was stopped has said so
        return
    checkpoint = f"{config.run.path}/checkpoints/step_{newest_step(config.run.path):06d}"
    held_out = config.eval.tasks if command == "sft" else config.data.val
    evaluation = command_line("eval", f"{config.run.path}/config.yaml", [
        f"model.path={checkpoint}", f"run.name={config.run.name}-eval", f"data.val=[{','.join(held_out) or 'VAL.parquet'}]"])
    lines = [("done", f"{config.optim.steps} steps; the final folder is {checkpoint}")]
    if command == "rl":
        lines += [("next", evaluation), ("serve", f"hdpo serve --model {checkpoint} --port 8000")]
    elif PART_OF not in os.environ:      # what comes next comes by itself there
        lines += [("next", command_line("rl", "metis_8b_rl", [f"model.path={checkpoint}", "data.train=[RL.parquet]"])),
                  ("evaluate", evaluation)]
    try:
        page = write_report(config.run.path) if report else config.run.path / "report.html"
        lines.append(("look", f"{page}, tensorboard --logdir {config.run.path}/tensorboard"))
    except DataError as exc:      # a page that can't be written ends no run
        lines.append(("look", f"no report: {exc}"))
    for name, text in lines:
        print(f"{name:9} {text}", flush=True)


def command_line(command: str, config: str, settings: Sequence[str], devices: bool = False) -> str:
    """A command as it is typed; on all of a node's devices when this one runs on several, or `devices` says so."""
    given = " ".join(f"--set {shlex.quote(setting) if re.search(UNSAFE, setting) else setting}" for setting in settings)
    if devices or int(os.environ.get("WORLD_SIZE", 1)) > 1:
        return f'make {command} CONFIG={config} ARGS="{given}"'
    return f"hdpo {command} --config {config} {given}"


def _evaluate(config: Config, steal_lock: bool) -> None:
    from hdpo.compose.stage import Stage
    from hdpo.evaluation.evaluate import format_table
    with Stage(config, steal_lock) as stage:
        evaluator = stage.evaluation()
        result = evaluator(config.eval.label_after, 0)
        if evaluator.world.is_main and result is not None:
            print(format_table(result.summary))


def with_epochs(config: Config) -> Config:
    """optim.epochs as the number of steps that it is, for the rows there are. Raises DataError for files that can't be read."""
    if not config.optim.epochs:
        return config
    from hdpo.data.tasks import check_columns
    rows = check_columns(config.data.train, config.data, demonstrations=True)
    steps = math.ceil(config.optim.epochs * rows / config.optim.rows_per_step)
    return config.model_copy(update={"optim": config.optim.model_copy(update={"steps": steps})})
