"""Held-out questions answered during SFT, with RL's own engine, tools, rules and transfer of weights: what RL will start from."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hdpo.agent.rollout import Rollouts
from hdpo.config import Config
from hdpo.protocols import Engine, Flag
from hdpo.train.lifecycle import due
from hdpo.train.sync import WeightSync


@dataclass(frozen=True, slots=True)
class Sampled:
    """Greedy rollouts of eval.tasks when an evaluation is due: every eval.every_steps, and as eval.before and eval.after say.
    Every method is a collective."""

    config: Config
    engine: Engine
    rollouts: Rollouts
    evaluator: Callable[[str, int], Any]   # evaluate.Evaluator
    sync: WeightSync

    def open(self, start: int, stop: Flag) -> None:
        """Refuse to train where engine and trainer disagree, as RL does; an evaluation under way ends when `stop` is set."""
        self.rollouts.stop = stop
        self.sync.open(start, fresh=start == 0)

    def __call__(self, step: int) -> dict[str, float]:
        """The numbers to log after `step` steps, eval/*; nothing when none are due, or the run was asked to stop meanwhile."""
        settings, last = self.config.eval, self.config.optim.steps
        if not (step and due(step, settings.every_steps) or settings.before and step == 0 or settings.after and step == last):
            return {}
        self.sync.send(step)
        result = self.evaluator(f"step_{step:06d}", step)
        self.engine.sleep()
        return {} if result is None else result.scalars()
