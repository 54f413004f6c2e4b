"""Run under a launcher: optimizer steps on fixed rows, cut as told. Prints a JSON line on rank 0.

Two rounds of two mini-batches: one row, which leaves all other ranks with fillers, and the seven others.

Usage: update_once.py MODEL TOKENS_PER_MICRO_BATCH SHARE      SHARE: "even" deals rows round-robin, "first" gives all to rank 0
"""
import json
import sys

import torch

from hdpo.adapters.deepspeed_policy import DeepSpeedPolicy
from hdpo.config import HdpoConfig, ModelConfig, OptimConfig
from hdpo.packing.batching import PackingSpec, make_train_batch
from hdpo.train.metrics import Metrics
from hdpo.train.objectives import HdpoObjective
from hdpo.train.update import update
from hdpo.types import Sample, Vision

START, END, IMAGE = 259, 260, 261


def row(index: int, generator: torch.Generator) -> Sample:
    ids = torch.randint(0, 250, (14 + 5 * index,), generator=generator).tolist()
    vision = None
    if index % 2 == 0:
        ids = [START, *[IMAGE] * 4, END, *ids]
        vision = Vision((torch.randn(16, 384, generator=generator),), torch.tensor([[1, 4, 4]]))
    mask = [0] * (len(ids) - 10) + [1] * 10
    return Sample(ids, mask, [-5.5 * m for m in mask], ((-1.0) ** index * (1 + index / 3), 0.5 * index - 1.0),
                  (True, index % 3 > 0), vision)


def filler() -> Sample:
    """A row with nothing trained and one small image."""
    return Sample([START, IMAGE, END, 1], [0] * 4, [0.0] * 4, (), (), Vision((torch.zeros(4, 384),), torch.tensor([[1, 2, 2]])))


def main() -> None:
    folder, tokens, share = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    policy = DeepSpeedPolicy(ModelConfig(path=folder, dtype="float32"), OptimConfig(lr=1e-3), IMAGE, seed=0)
    world = policy.world
    generator = torch.Generator().manual_seed(0)
    rows = [row(i, generator) for i in range(8)]
    mine = set(range(8)[world.rank::world.size] if share == "even" else range(8) if world.is_main else [])
    spec = PackingSpec(IMAGE, 2, tokens, 10_000, filler())
    metrics = Metrics()
    objective = HdpoObjective(HdpoConfig(), (START, IMAGE), 1.0, metrics)
    norms, losses, micro_batches = [], [], 0
    minis = [[rows[i] for i in sorted(mine & part)] for part in ({7}, set(range(7)))]
    for _ in range(2):
        for mini in make_train_batch(minis, spec, world, channels=2).mini_batches:
            micro_batches = len(mini.micro_batches)
            norms.append(update(policy, mini, objective, 1e-3))
            losses.append(metrics.reduce_over_ranks(world.gather)["actor/pg_loss"])
    weights = {name: float(value.double().abs().sum()) for name, value in policy.iter_weights(50_000)}
    if world.is_main:
        print("RESULT " + json.dumps({"norms": norms, "losses": losses, "micro_batches": micro_batches, "weights": weights}))
    policy.close()


if __name__ == "__main__":
    main()
