"""The fused loss inside two ZeRO-3 ranks: every parameter's gradient is the naive one of a single process."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from launching import accelerate
from loss_cases import naive_log_probs, relative
from tiny_models import save_tiny_qwen3_vl
from update_once import IMAGE, START, filler, row

from hdpo.adapters.policy_model import load_policy_model, model_inputs
from hdpo.config import ModelConfig
from hdpo.losses import hdpo_loss
from hdpo.packing.batching import PackingSpec, make_train_batch
from hdpo.ranks.world import World

pytestmark = [pytest.mark.engine, pytest.mark.slow]

VARIANTS = ("tied", "untied", "untied_frozen_head")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zero3")
    for tied in (True, False):
        save_tiny_qwen3_vl(folder / f"model_{'tied' if tied else 'untied'}", tied=tied)
    done = accelerate("tests/support/ranks/head_under_zero3.py", [str(folder), *VARIANTS])
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_with_checkpointed_layers_are_the_naive_ones_reduced_once(variant: str, folder: Path) -> None:
    """A weight gathered too late has no rows; a gradient reduced twice, or not, is off by the number of ranks."""
    config = ModelConfig(path=str(folder / f"model_{variant.split('_')[0]}"), attention="sdpa", gradient_checkpointing=False)
    module = load_policy_model(config, torch.float32)
    if "frozen" in variant:
        module.model.lm_head.weight.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    rows = [row(i, generator) for i in range(8)]
    spec = PackingSpec(IMAGE, 2, 10_000, 10_000, filler())
    mini = make_train_batch([rows], spec, World(), channels=2).mini_batches[0]
    (micro,) = mini.micro_batches

    def naive(hidden: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        bias = torch.zeros(len(weight))
        bias[[START, IMAGE]] = -100.0
        log_probs = naive_log_probs(hidden, weight, micro.targets, 1.0, bias)
        return hdpo_loss(log_probs, None, micro.advantages[:, micro.row], micro.weight, member=micro.member[:, micro.row],
                         norms=mini.norms)[:1]

    (loss,) = module(job=naive, **model_inputs(micro, IMAGE, torch.device("cpu"), torch.float32))
    loss.backward()
    expected = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
    found = torch.load(folder / f"{variant}.pt")
    assert found.keys() == expected.keys()
    assert ("model.lm_head.weight" in found) == (variant == "untied")
    for name, gradient in found.items():
        if expected[name] is None:   # the embedding's padding or an unused part
            assert gradient is None or not gradient.any(), name
        else:
            assert relative(gradient, expected[name]) < 1e-4, name
