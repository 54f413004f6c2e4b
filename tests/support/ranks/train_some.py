"""Run under a launcher: optimizer steps on fixed rows with a checkpoint after each, from wherever the folder stands.

Usage: train_some.py MODEL FOLDER STEPS DTYPE      Prints a JSON line on rank 0: first step and the loss of every step
"""
import json
import sys

import torch
from update_once import IMAGE, START, row

from hdpo.adapters.deepspeed_policy import DeepSpeedPolicy
from hdpo.config import Config, HdpoConfig, ModelConfig, OptimConfig
from hdpo.packing.batching import PackingSpec, make_train_batch
from hdpo.state.checkpoint import Checkpoints
from hdpo.train.metrics import Metrics
from hdpo.train.objectives import HdpoObjective
from hdpo.train.update import update
from hdpo.types import Sample, Vision


def main() -> None:
    model, folder, steps, dtype = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
    policy = DeepSpeedPolicy(ModelConfig(path=model, dtype=dtype), OptimConfig(lr=1e-3), IMAGE, seed=0)
    world = policy.world
    generator = torch.Generator().manual_seed(0)
    rows = [row(i, generator) for i in range(8)]
    filler = Sample([START, IMAGE, START + 1, 1], [0] * 4, [0.0] * 4, (), (),
                    Vision((torch.zeros(4, 384),), torch.tensor([[1, 2, 2]])))
    spec = PackingSpec(IMAGE, 2, 100, 10_000, filler)
    metrics = Metrics()
    objective = HdpoObjective(HdpoConfig(), (START, IMAGE), 1.0, metrics)
    losses = []
    with Checkpoints(policy, Config.model_validate({"run": {"folder": folder}, "checkpoint": {"keep": 0}})) as checkpoints:
        start, _ = checkpoints.resume()
        for step in range(start, steps):
            checkpoints.check()
            mini = make_train_batch([rows[world.rank::world.size]], spec, world, channels=2).mini_batches[0]
            update(policy, mini, objective, 1e-3)
            losses.append(metrics.reduce_over_ranks(world.gather)["actor/pg_loss"])
            checkpoints.save(step + 1, {})
        checkpoints.finish()
    if world.is_main:
        print("RESULT " + json.dumps({"start": start, "losses": losses, "draw": float(torch.rand(()))}))
    policy.close()


if __name__ == "__main__":
    main()
