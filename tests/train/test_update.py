"""A step with a loss or gradient that is not finite leaves no trace, is counted, and many in a row end the run."""
from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import accelerate
from tiny_models import save_tiny_qwen3_vl

from hdpo.config import Config, ModelConfig
from hdpo.doctor.memory_plan import plan
from hdpo.doctor.shapes import read_shapes
from hdpo.errors import NonFiniteError
from hdpo.ranks.world import World
from hdpo.train.update import StepGuard, update
from hdpo.types import MiniBatch


def run_steps(model: Path, *steps: str, ranks: int = 2) -> dict[str, Any]:
    done = accelerate("tests/support/ranks/skip_steps.py", [str(model), *steps], ranks=ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(next(line for line in done.stdout.splitlines() if "RESULT " in line).split("RESULT ", 1)[1])


@pytest.mark.engine
@pytest.mark.slow
def test_skipped_steps_and_parking_leave_no_trace_on_three_bf16_ranks_where_memory_comes_back_dirty(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three ranks divide almost no weight. DeepSpeed pads the shards of a gradient, never writes the padding, and counts it."""
    model = save_tiny_qwen3_vl(tmp_path)
    monkeypatch.setenv("MALLOC_PERTURB_", "188")     # glibc then hands out memory full of 0x43: 195.3 as fp32
    spoiled = run_steps(model, "good", "nan_loss", "infinite_loss", "infinite_gradient", "park", "good", ranks=3)
    clean = run_steps(model, "good", "good", ranks=3)
    assert spoiled["fresh"] > 100 and spoiled["saved"]     # what is parked is the state that a checkpoint would have copied
    start, first, *skipped, last = spoiled["hashes"]   # the one gathered while the optimizer's state is away is among them
    assert set(skipped) == {first} and len({start, first, last}) == 3
    assert [math.isfinite(norm) for norm in spoiled["norms"]] == [True, False, False, False, True]
    assert [start, first, last] == clean["hashes"]
    assert [spoiled["norms"][0], spoiled["norms"][-1]] == clean["norms"]
    assert spoiled["micro_batches"] > 1
    planned = plan(Config(), read_shapes(ModelConfig(path=str(model))), ranks=3, device=1, dtype_bytes=2).phases["update"]
    sums = planned["gradients, shard"] // 2    # the plan counts the copy that the step makes, too
    bucket = planned["gradient bucket"]
    assert spoiled["parked"] == [pytest.approx(planned["fp32 weights, moments"] + sums + bucket, rel=0.001), 0]
    assert spoiled["parked"][0] - bucket == pytest.approx(planned["fp32 weights, moments"] + sums, rel=0.01)   # padding
    assert spoiled["dtypes"] == {"weights": "torch.bfloat16", "master": "torch.float32", "moments": "torch.float32",
                                 "summed_gradients": "torch.float32", "reduced_gradients": "torch.float32"}


@pytest.mark.engine
@pytest.mark.slow
def test_an_optimizer_offloaded_for_good_takes_the_same_steps_and_skips_the_same(tmp_path: Path) -> None:
    model = save_tiny_qwen3_vl(tmp_path)
    run = run_steps(model, "offload", "good", "nan_loss", "good")
    start, first, skipped, last = run["hashes"]
    assert skipped == first and len({start, first, last}) == 3 and not math.isfinite(run["norms"][1])
    assert run["dtypes"]["master"] == run["dtypes"]["moments"] == "torch.float32"


class PlainPolicy:
    """One weight, no ranks: gradients are summed over micro-batches and the step reports their norm."""

    def __init__(self) -> None:
        self.weight, self.world = torch.ones(2, requires_grad=True), World()

    def run(self, micro: Any, job: Any) -> tuple[torch.Tensor, ...]:
        return job(self.weight, self.weight)

    def unpark(self) -> None:
        """Nothing is ever away."""

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        loss.backward()

    def step(self, lr: float) -> float:
        assert self.weight.grad is not None
        norm, self.weight.grad = float(self.weight.grad.norm()), None
        return norm


@pytest.mark.parametrize("losses", [(math.inf, 1.0), (1.0, -math.inf), (math.nan, 0.0), (0.0, math.nan, 1.0)])
def test_a_loss_that_is_not_finite_spoils_the_norm_wherever_it_stands(losses: tuple[float, ...]) -> None:
    values = iter(losses)

    def objective(micro: Any, norms: Any, old: Any) -> Any:
        value = next(values)
        return lambda hidden, weight: (weight.sum() + value,)   # its gradient is finite whatever the loss

    mini = MiniBatch([None] * len(losses), torch.ones(1))   # type: ignore[list-item]
    assert not math.isfinite(update(PlainPolicy(), mini, objective, 1e-3))   # type: ignore[arg-type]


def test_skipped_steps_are_counted_and_kept_out_of_the_mean_norm() -> None:
    guard = StepGuard(limit=3)
    for norm in (1.0, math.inf, 3.0, math.nan):
        guard.note(norm)
    assert guard.scalars() == {"actor/skipped_steps": 2, "actor/grad_norm": 2.0}
    assert guard.scalars() == {"actor/skipped_steps": 0}


def test_a_run_ends_after_saving_once_more_steps_in_a_row_are_skipped_than_allowed() -> None:
    guard, saved = StepGuard(limit=2), []
    for norm in (math.inf, math.inf, 1.0, math.inf, math.inf):
        guard.note(norm)
        guard.check(lambda: saved.append(1))
    guard.note(math.nan)
    with pytest.raises(NonFiniteError, match="3 optimizer steps in a row.*optim.max_skipped"):
        guard.check(lambda: saved.append(1))
    assert saved == [1]
