"""Weights & Biases behind `LogSink`. The package is imported only when a run asks for it."""
from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from hdpo.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image


class WandbSink:
    """Logs to project `hdpo` under the run's name; the key is read by wandb itself from WANDB_API_KEY.

    `config` is the run's configuration without secrets. A resumed run continues under the same id. WANDB_MODE=offline
    keeps everything in `folder`. Raises ConfigError when wandb is not installed.
    """

    def __init__(self, name: str, folder: str | os.PathLike[str], config: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise ConfigError("log.wandb is true but wandb is not installed: pip install wandb or set it to false") from None
        self._wandb = wandb
        self._run = wandb.init(project="hdpo", name=name, id=name.replace("/", "-"), resume="allow", dir=str(folder),
                               config=config, settings=wandb.Settings(silent=True))

    def write(self, step: int, scalars: dict[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def write_text(self, step: int, tag: str, text: str) -> None:
        table = self._wandb.Table(columns=["text"], data=[[text]])
        self._run.log({tag: table}, step=step)

    def write_image(self, step: int, tag: str, image: Image) -> None:
        self._run.log({tag: self._wandb.Image(image)}, step=step)

    def close(self) -> None:
        self._run.finish()
