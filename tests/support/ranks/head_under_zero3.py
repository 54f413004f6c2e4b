"""Run under a launcher: gradients of the fused loss under ZeRO-3, in full, written by rank 0 as FOLDER/{variant}.pt.

Usage: head_under_zero3.py FOLDER VARIANT...     FOLDER/model_tied, FOLDER/model_untied hold models; a VARIANT is tied,
untied or untied_frozen_head. Activation checkpointing is on. Every rank has its share of the rows in several micro-batches.
"""
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from deepspeed.utils import safe_get_full_grad
from update_once import IMAGE, START, filler, row

from hdpo.adapters import deepspeed_policy
from hdpo.config import HdpoConfig, ModelConfig, OptimConfig
from hdpo.packing.batching import PackingSpec, make_train_batch
from hdpo.train.metrics import Metrics
from hdpo.train.objectives import HdpoObjective

load = deepspeed_policy.load_policy_model


def load_with_frozen_head(*args):
    module = load(*args)
    module.model.lm_head.weight.requires_grad_(False)
    return module


def main() -> None:
    folder = Path(sys.argv[1])
    for variant in sys.argv[2:]:
        deepspeed_policy.load_policy_model = load_with_frozen_head if "frozen" in variant else load
        model = ModelConfig(path=str(folder / f"model_{variant.split('_')[0]}"), dtype="float32", gradient_checkpointing=True)
        policy = deepspeed_policy.DeepSpeedPolicy(model, OptimConfig(), IMAGE, seed=0)
        generator = torch.Generator().manual_seed(0)
        mine = [row(i, generator) for i in range(8)][policy.world.rank::policy.world.size]
        spec = PackingSpec(IMAGE, 2, 70, 10_000, filler())
        mini = make_train_batch([mine], spec, policy.world, channels=2).mini_batches[0]
        assert len(mini.micro_batches) > 1
        objective = HdpoObjective(HdpoConfig(importance="none"), (START, IMAGE), 1.0, Metrics(), chunk_tokens=7)
        for micro in mini.micro_batches:
            (loss,) = policy.run(micro, objective(micro, mini.norms, None))
            policy.backward(loss, last=micro is mini.micro_batches[-1])
        gradients = {name: safe_get_full_grad(parameter) for name, parameter in policy.engine.module.named_parameters()
                     if parameter.requires_grad}
        if policy.world.is_main:
            torch.save(gradients, folder / f"{variant}.pt")
        AcceleratorState._reset_state()   # the next variant has its own
    policy.close()


if __name__ == "__main__":
    main()
