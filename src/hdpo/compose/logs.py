"""The run's folder, and the sinks that its figures go to."""
from __future__ import annotations

from contextlib import ExitStack

from hdpo.config import Config
from hdpo.errors import ConfigError, boundary
from hdpo.protocols import LogSink
from hdpo.ranks.world import World
from hdpo.train.jsonl import JsonlSink
from hdpo.train.runlog import RunLog


def open_run_folder(config: Config, world: World, files: dict[str, str]) -> None:
    """Rank 0 makes it, with these files. Raises ConfigError."""
    if world.is_main:
        with boundary(ConfigError, "run.folder can't be written", OSError):
            config.run.path.mkdir(parents=True, exist_ok=True)
            for name, text in files.items():
                (config.run.path / name).write_text(text)


def open_log(config: Config, world: World, shown: list[tuple[str, str]], start_step: int, closing: ExitStack) -> RunLog:
    """`shown` are the figures of the progress line: (its name there, the metric). `start_step` steps are done."""
    sinks: list[LogSink] = []
    if world.is_main:
        first = start_step + 1
        sinks.append(JsonlSink(config.run.path / "metrics.jsonl", resume_step=first))
        if config.log.tensorboard:
            from hdpo.adapters.tensorboard import TensorBoardSink
            sinks.append(TensorBoardSink(config.run.path / "tensorboard", resume_step=first))
        if config.log.wandb:
            from hdpo.adapters.wandb import WandbSink
            sinks.append(WandbSink(config.run.name, config.run.path, config.model_dump(mode="json"),
                                   resumed=start_step > 0))
    log = RunLog(config, world, sinks, shown)
    closing.callback(log.close)
    return log
