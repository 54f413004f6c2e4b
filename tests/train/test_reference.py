"""hdpo.kl_coef: the pull to the starting policy, from its log-probs to the gradient."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from kl_cycle import KL, rows
from launching import accelerate
from loss_cases import naive_log_probs, relative
from tiny_models import save_tiny_qwen3_vl
from update_once import IMAGE, START, filler

from hdpo.adapters.policy_model import PolicyModel, load_policy_model, model_inputs
from hdpo.config import HdpoConfig, ModelConfig
from hdpo.losses import hdpo_loss
from hdpo.packing.batching import PackingSpec, make_train_batch, pack
from hdpo.ranks.world import World
from hdpo.train.metrics import Metrics
from hdpo.train.objectives import HdpoObjective
from hdpo.train.update import update, with_reference
from hdpo.types import MicroBatch, Sample


class Linear:
    """A policy of one float64 matrix, whose hidden states are its tokens' rows of another; its reference is another matrix."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight, self.world, self.runs, self.parked = weight.clone().requires_grad_(), World(), 0, 0

    def run(self, micro: MicroBatch, job: Any) -> tuple[torch.Tensor, ...]:
        self.runs += 1
        hidden = torch.randn(40, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        return job(hidden[micro.input_ids[0][micro.trained]], self.weight)

    def park(self) -> None:
        self.parked += 1

    def unpark(self) -> None:
        """Nothing is ever away."""

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        loss.backward()

    def step(self, lr: float) -> float:
        assert self.weight.grad is not None
        return float(self.weight.grad.norm())


def text_row(seed: int, advantages: tuple[float, float], member: tuple[bool, bool] = (True, True)) -> Sample:
    ids = torch.randint(0, 40, (12,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Sample(ids, [0] * 5 + [1] * 7, [-3.0] * 12, advantages, member, None)


ROWS = [text_row(0, (0.7, -0.2)), text_row(1, (0.0, 0.0)), text_row(2, (-0.4, 0.0), (True, False)), text_row(3, (0.0, 0.0))]


def spec(tokens: int, every_row: bool = True) -> PackingSpec:
    return PackingSpec(None, 1, tokens, 1, Sample([1, 2], [0, 0], [0.0] * 2, (), (), None), every_row=every_row)


@pytest.mark.parametrize("tokens", [12, 1000])
def test_every_row_is_pulled_to_the_starting_policy_by_the_readable_loss_in_float64_however_it_is_cut(tokens: int) -> None:
    draw = torch.Generator().manual_seed(2)
    start = torch.randn(40, 6, generator=draw, dtype=torch.float64)
    policy, reference = Linear(start + 0.3 * torch.randn(40, 6, generator=draw, dtype=torch.float64)), Linear(start)
    metrics, config = Metrics(), HdpoConfig(kl_coef=0.7, entropy_coef=0.2)
    objective = HdpoObjective(config, (), 1.0, metrics)
    batch = with_reference(reference, make_train_batch([ROWS], spec(tokens), World(), 2), objective.log_probs)  # type: ignore
    norm = update(policy, batch.mini_batches[0], objective, 1e-3)    # type: ignore[arg-type]
    assert reference.runs == policy.runs == (4 if tokens == 12 else 1) and reference.parked == 1
    assert reference.weight.grad is None

    micro = pack(ROWS, spec(1000), 2)
    weight = policy.weight.detach().clone().requires_grad_()

    def log_softmax(x: torch.Tensor) -> torch.Tensor:
        hidden = torch.randn(40, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        return (hidden[micro.input_ids[0][micro.trained]] @ x.T).log_softmax(-1)

    def at(x: torch.Tensor) -> torch.Tensor:
        return log_softmax(x).gather(-1, micro.targets[:, None])[:, 0]
    away = at(start) - at(weight)
    everything, entropy = log_softmax(weight), -(log_softmax(weight).exp() * log_softmax(weight)).sum(-1)
    assert everything.dtype == torch.float64
    loss, _ = hdpo_loss(at(weight), None, micro.advantages[:, micro.row], micro.weight, member=micro.member[:, micro.row],
                        norms=batch.mini_batches[0].norms, rollout_log_probs=micro.rollout_log_probs)
    loss = loss + (0.7 * (away.exp() - away - 1) - 0.2 * entropy).sum() / 28
    (gradient,) = torch.autograd.grad(loss, weight)
    assert policy.weight.grad is not None
    assert relative(policy.weight.grad, gradient) < 1e-7 and norm == pytest.approx(float(gradient.norm()), rel=1e-7)
    scalars = metrics.reduce_over_ranks()
    assert scalars["hdpo/kl"] == pytest.approx(float((away.exp() - away - 1).mean()), rel=1e-5)
    assert scalars["actor/pg_loss"] == pytest.approx(float(loss), rel=1e-5)


def test_without_it_rows_without_advantage_are_not_computed_and_nothing_is_logged() -> None:
    assert not HdpoConfig().every_row and HdpoConfig(kl_coef=0.1).every_row and HdpoConfig(entropy_coef=0.1).every_row
    metrics, policy = Metrics(), Linear(torch.zeros(40, 6, dtype=torch.float64))
    (mini,) = make_train_batch([ROWS], spec(12, every_row=False), World(), 2).mini_batches
    assert len(mini.micro_batches) == 2 and mini.norms.tolist() == [28.0, 21.0]
    update(policy, mini, HdpoObjective(HdpoConfig(), (), 1.0, metrics), 1e-3)   # type: ignore[arg-type]
    assert policy.runs == 2 and "hdpo/kl" not in metrics.reduce_over_ranks()


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize("lora_rank", [0, 4])
def test_on_two_zero3_ranks_it_is_zero_at_the_start_and_then_pulls_as_one_process_would(tmp_path: Path, lora_rank: int) -> None:
    folder = save_tiny_qwen3_vl(tmp_path / "model")
    done = accelerate("tests/support/ranks/kl_cycle.py", [str(folder), str(tmp_path / "out.pt"), str(lora_rank)])
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "out.pt")
    assert found["kl"][0] == pytest.approx(0, abs=1e-9) and found["kl"][1] > 1e-4
    if not lora_rank:
        assert found["held"][0] > 0 and found["held"][1:] == [0, 0], "between its runs the copy is in host memory"

    def model() -> PolicyModel:
        return load_policy_model(ModelConfig(path=str(folder), gradient_checkpointing=False), torch.float32)
    (mini,) = make_train_batch([rows()], PackingSpec(IMAGE, 2, 10_000, 10_000, filler(), every_row=True), World(), 2).mini_batches
    (micro,) = mini.micro_batches
    inputs = model_inputs(micro, IMAGE, torch.device("cpu"), torch.float32)

    def log_probs(hidden: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        bias = torch.zeros(len(weight))
        bias[[START, IMAGE]] = -100.0
        return (naive_log_probs(hidden, weight, micro.targets, 1.0, bias),)
    with torch.no_grad():
        reference = model()(job=log_probs, **inputs)[0]
    moved = model()
    moved.model.load_state_dict(found["weights"])
    (own,) = moved(job=log_probs, **inputs)
    away = (reference - own).detach().double()
    assert found["kl"][1] == pytest.approx(float((away.exp() - away - 1).mean()), rel=1e-3)
    loss, _ = hdpo_loss(own, None, micro.advantages[:, micro.row], micro.weight, member=micro.member[:, micro.row],
                        norms=mini.norms, rollout_log_probs=micro.rollout_log_probs, reference_log_probs=reference, kl_coef=KL)
    loss.backward()
    if not lora_rank:
        norm = torch.stack([p.grad.norm() for p in moved.parameters() if p.grad is not None]).norm()
        assert found["norms"][1] == pytest.approx(float(norm), rel=1e-3)
