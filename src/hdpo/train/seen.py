"""The trainer's log-probs of a step's tokens, kept on the device until the step is logged."""
from __future__ import annotations

import torch
from torch import Tensor

from hdpo.state.trained import TrainedRow
from hdpo.types import MicroBatch


class Seen:
    """What the loss saw of every row, once: a row that comes again in a later epoch is passed over."""

    def __init__(self) -> None:
        self._held: list[tuple[MicroBatch, Tensor, Tensor | None]] = []
        self._rows: set[tuple[int, int]] = set()

    def note(self, micro: MicroBatch, log_probs: Tensor, old: Tensor | None) -> None:
        """log_probs [M] of the weights being trained; old [M] of those that sampled, None where they are the same."""
        new = set(micro.origins) - self._rows
        if new:
            self._rows |= new
            self._held.append((micro, log_probs.detach(), old))

    def take(self) -> list[TrainedRow]:
        """The rows noted since the last call; waits for the device once."""
        held, self._held, self._rows = self._held, [], set()
        if not held:
            return []
        moved = torch.cat([tensor.flatten().float() for _, now, old in held
                           for tensor in (now, now if old is None else old)]).cpu()
        sizes = [len(now) for _, now, _ in held for _ in range(2)]
        parts = moved.split(sizes)
        found: dict[tuple[int, int], TrainedRow] = {}
        for index, (micro, _, old) in enumerate(held):
            now, before = parts[2 * index], parts[2 * index + 1]
            lengths = torch.bincount(micro.row, minlength=max(len(micro.origins), micro.advantages.shape[1])).tolist()
            rows = zip(micro.origins, now.split(lengths), before.split(lengths), strict=False)     # a filler row has no origin
            for origin, mine, sampled in rows:
                found.setdefault(origin, TrainedRow(*origin, sampled.tolist(), [] if old is None else mine.tolist()))
        return list(found.values())
