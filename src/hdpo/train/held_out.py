"""The loss of SFT on demonstrations that are not trained on: through the same chat, packing and forward, without gradients."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor

import torch

from hdpo.config import Config
from hdpo.data.tasks import Demonstration
from hdpo.packing.batching import PackingSpec, make_train_batch
from hdpo.protocols import Policy
from hdpo.train.lifecycle import due
from hdpo.train.objectives import LogProbs
from hdpo.types import Sample


class HeldOut:
    """Computes `eval/sft_loss` when it is due: before the first step, every eval.every_steps and after the last."""

    def __init__(self, config: Config, policy: Policy, rows: Sequence[Demonstration], encode: Callable[[Demonstration], Sample],
                 spec: PackingSpec, threads: Executor) -> None:
        """`rows` are the same on every rank; none turns it off. `threads` encode them, optim.rows_per_step at a time over all
        ranks, which bounds the memory that their pictures take."""
        self._config, self._policy, self._rows, self._encode = config, policy, rows, encode
        self._spec, self._threads = spec, threads

    def __call__(self, step: int) -> dict[str, float]:
        """The number to log after `step` steps, or nothing. Collective."""
        wanted = step in (0, self._config.optim.steps) or due(step, self._config.eval.every_steps)
        return {"eval/sft_loss": self.loss()} if self._rows and wanted else {}

    def loss(self) -> float:
        """Mean negative log-likelihood of all trained tokens, nat a token, whatever ranks and micro-batches they are computed
        in; NaN where no token is trained. Collective; every rank gets the same value."""
        world, log_probs = self._policy.world, LogProbs((), chunk_tokens=self._config.batch.head_chunk_tokens)
        total, tokens, portion = torch.zeros((), dtype=torch.float64), 0, self._config.optim.rows_per_step
        for first in range(0, len(self._rows), portion):
            mine = range(first + world.rank, min(first + portion, len(self._rows)), world.size)
            samples = list(self._threads.map(lambda number: self._encode(self._rows[number]), mine))
            (mini,) = make_train_batch([samples], self._spec, world, channels=0).mini_batches
            with torch.no_grad():
                for micro in mini.micro_batches:
                    total = total - self._policy.run(micro, log_probs(micro))[0].double().sum()    # stays on the device
                    tokens += len(micro.targets)
                    world.progress()
        nll, count = world.sum([float(total), float(tokens)])
        return nll / count if count else float("nan")
