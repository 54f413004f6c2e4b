"""Weights & Biases behind `LogSink`. The package is imported only when a run asks for it.

Logging never ends a run: a server that can't be reached makes the run's log an offline one, with one line, and what fails later
is said once. A run has an id of its own in its folder, so that a resumed one goes on in the same place and another run of the
same name does not. Steps are a metric of their own (`step`): wandb's own counter only goes up, and drops what a run that went
back to its checkpoint logs again.
"""
from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hdpo.errors import ConfigError
from hdpo.keys import key

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hdpo.protocols import ShownRollout

log = logging.getLogger(__name__)

REACH_S, FINISH_S = 20.0, 60.0
"""How long a start waits for the server, and the end for what is not sent yet."""
ID_FILE = "wandb_id.txt"
Q_SIZE = "hdpo/q_size_is/"
COLUMNS = ("step", "task", "source", "rollout", "truth", "verdict", "decided by", "calls", "accuracy advantage", "tool advantage")


def check_wandb() -> None:
    """Raises ConfigError when the package is missing."""
    try:
        import wandb  # noqa: F401
    except ImportError:
        raise ConfigError("log.wandb is true but wandb is not installed: pip install wandb or set it to false") from None


class WandbSink:
    """Logs to project `hdpo` under the run's name; the key is WANDB_API_KEY's, or what `wandb login` has left.

    `config` is the run's configuration without secrets. `resumed`: the run goes on from a checkpoint. WANDB_MODE=offline keeps
    everything in `folder`. Raises ConfigError when wandb is not installed, and nothing else.
    """

    def __init__(self, name: str, folder: str | os.PathLike[str], config: dict[str, Any], resumed: bool = False) -> None:
        check_wandb()
        import wandb
        self._wandb, self._failed = wandb, False
        identity = _identity(Path(folder) / ID_FILE, resumed)

        secret = {"api_key": key("WANDB_API_KEY")} if key("WANDB_API_KEY") else {}     # it has left the environment

        def open_run(**mode: Any) -> Any:
            run = wandb.init(project="hdpo", name=name, id=identity, resume="allow", dir=str(folder), config=config,
                             settings=wandb.Settings(silent=True, init_timeout=REACH_S, **secret), **mode)
            run.define_metric("step")
            run.define_metric("*", step_metric="step")
            return run
        try:
            self._run = open_run()
        except Exception as exc:    # noqa: BLE001  a network's boundary: keys, proxies, servers and timeouts
            log.warning("Weights & Biases can't be reached (%s): this run is logged offline; `wandb sync %s` sends it later",
                        _one_line(exc), Path(folder) / "wandb")
            self._run = self._try(lambda: open_run(mode="offline"))

    def write(self, step: int, scalars: dict[str, float]) -> None:
        self._log(step, lambda: {**scalars, **self._sizes(scalars)})

    def _sizes(self, scalars: dict[str, float]) -> dict[str, Any]:
        """|Q| of the step's groups as a histogram."""
        shares = {int(name.removeprefix(Q_SIZE)): share for name, share in scalars.items() if name.startswith(Q_SIZE)}
        if not shares:
            return {}
        sizes, groups = sorted(shares), scalars.get("hdpo/groups", 1.0)
        edges = [sizes[0] - 0.5, *(size + 0.5 for size in sizes)]
        return {"hdpo/q_size": self._wandb.Histogram(np_histogram=([round(shares[size] * groups) for size in sizes], edges))}

    def write_rollouts(self, step: int, rollouts: Sequence[ShownRollout]) -> None:
        """A table: a row for each rollout, its pictures in one cell each."""
        pictures = max((len(one.images) for one in rollouts), default=0)

        def table() -> dict[str, Any]:
            rows = [[step, one.task, one.source, one.text, one.truth, one.verdict, one.by, one.calls,
                     *(one.advantages or (None, None)), *(self._wandb.Image(image) for image in one.images),
                     *[None] * (pictures - len(one.images))] for one in rollouts]
            return {"rollouts": self._wandb.Table(columns=[*COLUMNS, *(f"picture {n + 1}" for n in range(pictures))], data=rows)}
        if rollouts:
            self._log(step, table)

    def close(self) -> None:
        if self._run is not None:
            self._try(self._run.finish)

    def _log(self, step: int, values: Callable[[], dict[str, Any]]) -> None:
        if self._run is not None:
            self._try(lambda: self._run.log({**values(), "step": step}))

    def _try(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as exc:    # noqa: BLE001  a network's boundary: a run never ends because of its log
            if not self._failed:
                log.warning("Weights & Biases: %s; training goes on, metrics.jsonl has every step", _one_line(exc))
            self._failed = True
            return None


def _identity(file: Path, resumed: bool) -> str:
    """The id that the run's folder holds, or a new one for a run that begins."""
    known = file.read_text().strip() if resumed and file.is_file() else ""
    if not known:
        known = uuid.uuid4().hex[:12]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(known + "\n")
    return known


def _one_line(exc: Exception) -> str:
    return " ".join(str(exc).split()) or type(exc).__name__
