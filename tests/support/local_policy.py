"""`protocols.Policy` in one process without ZeRO: for tests whose subject is what surrounds the policy."""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hdpo.adapters.policy_model import model_inputs
from hdpo.adapters.torchvision_shim import activate
from hdpo.ranks.world import World


class LocalPolicy:
    """A transformers model with its own gradients; no optimizer state to park."""

    def __init__(self, folder: Path, image_token_id: int) -> None:
        activate()
        from transformers import AutoModelForImageTextToText

        from hdpo.adapters.policy_model import PolicyModel

        self.dtype, self.world, self.image_token_id = torch.float32, World(), image_token_id
        self.module = PolicyModel(AutoModelForImageTextToText.from_pretrained(folder, dtype=self.dtype))
        self.calls: list[str] = []

    def run(self, micro: Any, job: Any) -> tuple[Tensor, ...]:
        return self.module(job=job, **model_inputs(micro, self.image_token_id, torch.device("cpu"), self.dtype))

    def backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()

    def step(self, lr: float) -> float:
        norm = float(torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0))
        with torch.no_grad():
            for parameter in self.module.parameters():
                if parameter.grad is not None:
                    parameter -= lr * parameter.grad
                    parameter.grad = None
        return norm

    def iter_weights(self, group_bytes: int) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            yield name.removeprefix("model."), parameter.detach()

    def park(self) -> None:
        self.calls.append("park")

    def unpark(self) -> None:
        self.calls.append("unpark")
