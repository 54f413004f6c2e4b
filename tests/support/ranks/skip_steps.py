"""Run under a launcher: optimizer steps in bf16, some of them spoiled as told. Prints a JSON line on rank 0.

Usage: skip_steps.py MODEL [offload] STEPS...     each of STEPS: good | nan_loss | infinite_loss | infinite_gradient | park

Only the last rank's second micro-batch is spoiled. `infinite_loss` has the gradients of a good step, `infinite_gradient`
the loss of one. `park` takes no step: it gathers the weights while what an update needs is away, as CUDA devices do.
`fresh` is the largest number in memory that was just allocated: above zero where the C library fills it (MALLOC_PERTURB_).
"""
from __future__ import annotations

import hashlib
import json
import sys
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from update_once import IMAGE, START, row

from hdpo.adapters.deepspeed_policy import DeepSpeedPolicy
from hdpo.adapters.zero3 import optimizer_tensors
from hdpo.config import HdpoConfig, ModelConfig, OptimConfig
from hdpo.packing.batching import PackingSpec, make_train_batch
from hdpo.train.metrics import Metrics
from hdpo.train.objectives import HdpoObjective
from hdpo.train.update import update
from hdpo.types import MicroBatch, Sample, Vision


class Spoiled:
    """The objective, with one micro-batch's loss or gradient spoiled."""

    def __init__(self, objective: HdpoObjective, how: str) -> None:
        self.objective, self.how, self.seen = objective, how, 0

    def __call__(self, micro: MicroBatch, norms: Tensor, old: Tensor | None) -> Any:
        self.seen += 1
        job = self.objective(micro, norms, old)
        if self.how == "good" or self.seen != 2:
            return job

        def spoiled(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
            (loss,) = job(hidden, weight)
            if self.how == "nan_loss":
                return (loss * float("nan"),)
            if self.how == "infinite_loss":
                return (loss + torch.full_like(loss, float("inf")).detach(),)
            return (loss + 0.0 * (weight * 1e38 * 1e38).sum().clamp(max=1.0),)
        return spoiled


def weights_hash(policy: DeepSpeedPolicy) -> str:
    digest = hashlib.sha256()
    for name, value in policy.iter_weights(50_000):
        digest.update(name.encode() + value.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def main() -> None:
    folder, *steps = sys.argv[1:]
    offload = steps[:1] == ["offload"]
    steps = steps[offload:]
    policy = DeepSpeedPolicy(ModelConfig(path=folder, dtype="bfloat16"), OptimConfig(lr=1e-3, offload=offload), IMAGE, seed=0)
    world = policy.world
    generator = torch.Generator().manual_seed(0)
    mine = [row(i, generator) for i in range(8)][world.rank::world.size]
    filler = Sample([START, IMAGE, 260, 1], [0] * 4, [0.0] * 4, (), (), Vision((torch.zeros(4, 384),), torch.tensor([[1, 2, 2]])))
    spec = PackingSpec(IMAGE, 2, 70, 10_000, filler)
    objective = HdpoObjective(HdpoConfig(), (START, IMAGE), 1.0, Metrics())
    norms, hashes, micro_batches, parked, saved = [], [weights_hash(policy)], 0, [0, 0], False
    for how in steps:
        if how == "park":
            tensors = [*chain(*optimizer_tensors(policy.engine.optimizer))]
            before = sum(t.untyped_storage().nbytes() for t in tensors)
            copied = policy.snapshot_state().tensors
            policy.parks = True
            policy.park()
            lent = policy.snapshot_state().tensors
            saved = lent.keys() == copied.keys() and all(torch.equal(lent[name], copied[name]) for name in copied)
            parked = [before, sum(t.untyped_storage().nbytes() for t in tensors)]
            hashes.append(weights_hash(policy))
            continue
        mini = make_train_batch([mine], spec, world, channels=2).mini_batches[0]
        micro_batches = len(mini.micro_batches)
        job: Any = Spoiled(objective, how if world.rank == world.size - 1 else "good")
        norms.append(update(policy, mini, job, 1e-3))
        hashes.append(weights_hash(policy))
    inner = policy.engine.optimizer
    dtypes = {"weights": policy.engine.module.model.lm_head.weight.dtype, "master": inner.fp32_partitioned_groups_flat[0].dtype,
              "moments": inner.optimizer.state[inner.fp32_partitioned_groups_flat[0]]["exp_avg"].dtype,
              "summed_gradients": inner.gradient_accumulation_dtype, "reduced_gradients": next(iter(inner.ipg_buckets))}
    fresh = float(torch.empty(1 << 20).abs().max())
    if world.is_main:
        print("RESULT " + json.dumps({"norms": norms, "hashes": hashes, "micro_batches": micro_batches, "parked": parked,
                                      "fresh": fresh, "saved": saved,
                                      "dtypes": {name: str(dtype) for name, dtype in dtypes.items()}}))
    policy.close()


if __name__ == "__main__":
    main()
