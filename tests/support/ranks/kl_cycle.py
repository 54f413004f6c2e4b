"""Run under a launcher: two steps with hdpo.kl_coef through ZeRO-3. Rank 0 writes OUT.

Usage: kl_cycle.py MODEL OUT LORA_RANK     0 trains all weights beside a second copy, which is parked between its runs
"""
import sys

import torch
from update_once import IMAGE, START, filler, row

from hdpo.adapters.deepspeed_policy import DeepSpeedPolicy
from hdpo.adapters.reference import FrozenCopy, open_reference
from hdpo.config import HdpoConfig, ModelConfig, OptimConfig
from hdpo.packing.batching import PackingSpec, make_train_batch
from hdpo.train.metrics import Metrics
from hdpo.train.objectives import HdpoObjective
from hdpo.train.update import update, with_reference
from hdpo.types import Sample

KL = 0.5


def rows() -> list[Sample]:
    """Eight rows, one of which has no advantage in either channel."""
    generator = torch.Generator().manual_seed(0)
    found = [row(i, generator) for i in range(8)]
    last = found[3]
    found[3] = Sample(last.token_ids, last.mask, last.rollout_log_probs, (0.0, 0.0), (True, True), last.vision)
    return found


def held(reference: FrozenCopy) -> int:
    return sum(parameter.ds_tensor.untyped_storage().nbytes() for parameter in reference.engine.module.parameters())


def main() -> None:
    model = ModelConfig(path=sys.argv[1], dtype="float32", lora_rank=int(sys.argv[3]))
    policy = DeepSpeedPolicy(model, OptimConfig(lr=1e-2), IMAGE, seed=0)
    world, reference = policy.world, open_reference(policy, model)
    result: dict = {"kl": [], "norms": [], "held": []}
    if isinstance(reference, FrozenCopy):
        result["held"].append(held(reference))
        reference.parks = True      # as on CUDA
    reference.park()
    spec, metrics = PackingSpec(IMAGE, 2, 70, 10_000, filler(), every_row=True), Metrics()
    objective = HdpoObjective(HdpoConfig(kl_coef=KL), (START, IMAGE), 1.0, metrics)
    for _ in range(2):
        result["weights"] = {name: value.clone() for name, value in policy.iter_weights(50_000)}
        batch = make_train_batch([rows()[world.rank::world.size]], spec, world, channels=2)
        batch = with_reference(reference, batch, objective.log_probs)
        if isinstance(reference, FrozenCopy):
            result["held"].append(held(reference))
        result["norms"].append(update(policy, batch.mini_batches[0], objective, 1e-2))
        result["kl"].append(metrics.reduce_over_ranks(world.gather)["hdpo/kl"])
    if world.is_main:
        torch.save(result, sys.argv[2])
    policy.close()


if __name__ == "__main__":
    main()
