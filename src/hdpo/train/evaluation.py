"""Evaluations of a run: greedy rollouts of the held-out rows, their dump, and summary.json."""
from __future__ import annotations

import json
from collections.abc import Sequence

from hdpo.agent.rollout import Rollouts
from hdpo.config import Config
from hdpo.evaluate import EvalResult, evaluate, write_summary
from hdpo.reward.scoring import Scorer
from hdpo.train.dump import write_rollouts
from hdpo.train.world import World
from hdpo.types import Task


class Evaluator:
    """Holds what an evaluation needs. The engine must carry the weights to be judged when it is called."""

    def __init__(self, config: Config, rollouts: Rollouts, scorer: Scorer, tasks: Sequence[Task], world: World) -> None:
        self.config, self.rollouts, self.scorer, self.tasks, self.world = config, rollouts, scorer, tasks, world

    def __call__(self, label: str, step: int) -> EvalResult:
        """Evaluate, dump to eval/{label}.parquet (a part per rank) and enter the figures into summary.json. Collective."""
        world, run = self.world, self.config.run.path
        result = evaluate(self.rollouts, self.scorer, self.tasks, gather=world.gather, rank=world.rank, world=world.size,
                          step=step, weight_version=step)
        write_rollouts(run / "eval" / f"{label}.parquet", result.groups, step=step, rank=world.rank, world=world.size)
        if world.is_main:
            path = run / "summary.json"
            known = json.loads(path.read_text()) if path.is_file() else {}
            write_summary(path, {**known, label: result.summary})
        world.barrier()
        return result
