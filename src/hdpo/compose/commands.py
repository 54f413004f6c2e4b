"""`hdpo sft`, `hdpo rl`, `hdpo eval`: settings from the command line, then a stage from start to end."""
from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence

from hdpo.config import Config
from hdpo.config_file import dump_config, parse_run
from hdpo.keys import withdraw


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
    withdraw()
    if options.print_config:
        if os.environ.get("RANK", "0") == "0":
            print(dump_config(config), end="")
        return 0
    if options.dry_run:
        from hdpo.doctor.doctor import dry_run
        return dry_run(config, name)
    from hdpo.train.lifecycle import follow_launcher
    follow_launcher()
    run(config, options.steal_lock)
    return 0


def _train_sft(config: Config, steal_lock: bool) -> None:
    from hdpo.compose.folder import finished
    from hdpo.compose.stage import Stage
    from hdpo.train import sft
    config = with_epochs(config)
    if finished(config, "sft"):
        return
    with Stage(config, steal_lock) as stage:
        sft.train(config, stage.sft())


def _train_rl(config: Config, steal_lock: bool) -> None:
    from hdpo.compose.folder import finished
    from hdpo.compose.stage import Stage
    from hdpo.train import rl
    if finished(config, "rl"):
        return
    with Stage(config, steal_lock) as stage:
        rl.train(config, stage.rl())


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
