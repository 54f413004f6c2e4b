"""The starting policy, whose log-probs `hdpo.kl_coef` holds the trained one to.

With LoRA it is the policy without its adapters, whose weights are frozen. Otherwise it is a second model from model.path, sharded
over the ranks by ZeRO-3 as the policy is, without gradients or optimizer. It is on the device while it runs and sleeps in
host memory else: it runs before the update, while the optimizer's state is still there, and so adds nothing to the peak.

model.path holds the starting weights for a resumed run too, which takes those it goes on with from its checkpoint.
"""
from __future__ import annotations

import deepspeed
import torch
from torch import Tensor

from hdpo.adapters.deepspeed_policy import DeepSpeedPolicy
from hdpo.adapters.lora import adapters_off
from hdpo.adapters.policy_model import HeadJob, assert_rope_fp32, load_policy_model, model_inputs
from hdpo.adapters.zero3 import Parking, zero3_config
from hdpo.config import ModelConfig
from hdpo.protocols import Reference
from hdpo.types import MicroBatch


def open_reference(policy: DeepSpeedPolicy, model: ModelConfig) -> Reference:
    """For a policy that was just loaded from `model`. Collective."""
    return WithoutAdapters(policy) if model.lora_rank else FrozenCopy(policy, model)


class WithoutAdapters:
    def __init__(self, policy: DeepSpeedPolicy) -> None:
        self._policy = policy

    @torch.no_grad()
    def run(self, micro: MicroBatch, job: HeadJob) -> tuple[Tensor, ...]:
        with adapters_off(self._policy.engine.module.model):
            return self._policy.run(micro, job)

    def park(self) -> None:
        """There is nothing of its own."""


class FrozenCopy:
    def __init__(self, policy: DeepSpeedPolicy, model: ModelConfig) -> None:
        self._policy, self._parking, self.parks = policy, Parking(), policy.parks
        module = load_policy_model(model, policy.dtype, frozen=True)
        self.engine, *_ = deepspeed.initialize(model=module, config=zero3_config(policy.dtype, 0.0), dist_init_required=False)
        self.engine.eval()
        assert_rope_fp32(self.engine)
        self.park()

    @torch.no_grad()
    def run(self, micro: MicroBatch, job: HeadJob) -> tuple[Tensor, ...]:
        if self._parking.parked:      # waits for the device, so once a step and not once a micro-batch
            self._parking.unpark()
        policy = self._policy
        return self.engine(job=job, **model_inputs(micro, policy.image_token_id, policy.device, policy.dtype))

    def park(self) -> None:
        if self.parks and not self._parking.parked:
            self.engine.empty_partition_cache()
            self._parking.park([parameter.ds_tensor for parameter in self.engine.module.parameters()], [])
