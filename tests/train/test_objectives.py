"""The trainer's objective on packed rows: the readable loss in value, gradient and metrics, and what it costs."""
from __future__ import annotations

import pytest
import torch
from loss_cases import naive_log_probs, relative
from torch.utils._python_dispatch import TorchDispatchMode

from hdpo.config import HdpoConfig
from hdpo.losses import hdpo_loss
from hdpo.packing.batching import PackingSpec, pack
from hdpo.train.metrics import Metrics
from hdpo.train.objectives import HdpoObjective, LogProbs, SftObjective, gradient_scalars
from hdpo.types import MicroBatch, Sample

VOCABULARY, HIDDEN, BANNED, TEMPERATURE = 60, 8, (58, 59), 0.9
NORMS = torch.tensor([31.0, 17.0])


def micro_batch(hidden: torch.Tensor, weight: torch.Tensor) -> MicroBatch:
    """Three rows, 9, 1 and 14 trained tokens; the engine agrees within 1 % on rows 0 and 2 and is far off on row 1."""
    g = torch.Generator().manual_seed(3)
    rows = []
    for length, advantages in ((9, (0.8, -0.3)), (1, (-1.1, 0.0)), (14, (-0.4, 0.9))):
        ids = torch.randint(0, VOCABULARY - 2, (length + 4,), generator=g).tolist()
        mask = [0] * 4 + [1] * length
        rows.append(Sample(ids, mask, [0.0] * len(ids), advantages, (True, length > 1), None))
    micro = pack(rows, PackingSpec(None, 1, 1000, 0, Sample([1, 2], [0, 0], [0.0] * 2, (), (), None)), channels=2)
    exact = log_probs_of(hidden, weight, micro)
    off = 0.3 * torch.randn(len(exact), generator=g)
    for r in (0, 2):
        off[micro.row == r] -= off[micro.row == r].mean()
    off[micro.row == 1] = -0.9
    micro.rollout_log_probs.copy_(exact + off)
    return micro


def log_probs_of(hidden: torch.Tensor, weight: torch.Tensor, micro: MicroBatch) -> torch.Tensor:
    bias = torch.zeros(VOCABULARY)
    bias[list(BANNED)] = -100.0
    return naive_log_probs(hidden, weight, micro.targets, TEMPERATURE, bias)


@pytest.fixture
def case() -> tuple[torch.Tensor, torch.Tensor, MicroBatch]:
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(24, HIDDEN, generator=g), torch.randn(VOCABULARY, HIDDEN, generator=g)
    return hidden.requires_grad_(), weight.requires_grad_(), micro_batch(hidden.detach(), weight.detach())


class Products(TorchDispatchMode):
    """Counts matrix products, and names what would wait for a device."""

    def __init__(self):
        super().__init__()
        self.count, self.waits = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        self.count += name in ("mm", "addmm", "addmm_")
        if name in ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "_unique2", "bincount"):
            self.waits.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("on_policy", [True, False])
@pytest.mark.parametrize("importance, products", [("none", 3), ("token", 3), ("sequence", 4)])
def test_equals_the_readable_loss_in_one_pass_of_three_products_and_four_to_know_whole_rows_first(
        case, importance, products, on_policy):
    hidden, weight, micro = case
    config, metrics = HdpoConfig(importance=importance, importance_cap=1.2), Metrics()
    own = log_probs_of(hidden, weight, micro)
    old = own.detach()
    if not on_policy:
        old = old + 0.4 * torch.randn(24, generator=torch.Generator().manual_seed(1))
        for r in (0, 2):   # the rows' means are those of the old log-probs
            old[micro.row == r] += (micro.rollout_log_probs - old)[micro.row == r].mean()
    weights = torch.ones(24) if importance == "none" else (old - micro.rollout_log_probs).exp().clamp(max=1.2)
    if importance == "sequence":
        weights = weights * (micro.row != 1)
    expected, stats = hdpo_loss(own, None if on_policy else old, micro.advantages[:, micro.row], micro.weight,
                                member=micro.member[:, micro.row], norms=NORMS, rollout_weights=weights)
    with Products() as counted:
        (loss,) = HdpoObjective(config, BANNED, TEMPERATURE, metrics)(micro, NORMS, None if on_policy else old)(hidden, weight)
        gradients = torch.autograd.grad(loss, (hidden, weight))
    assert counted.count == (products if on_policy else 3) and counted.waits == []
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)
    for a, b in zip(gradients, torch.autograd.grad(expected, (hidden, weight))):
        assert relative(a, b) < 1e-5
    found, d = metrics.reduce_over_ranks(), old - micro.rollout_log_probs
    assert found["actor/pg_loss/tool"] == pytest.approx(stats["loss"][1].item(), rel=1e-4)
    assert found["actor/ratio_max"] == pytest.approx((own - old).exp().max().item(), rel=1e-4)
    assert found["mismatch/k1"] == pytest.approx(-d.mean().item(), abs=1e-5)
    assert found["mismatch/k3"] == pytest.approx((d.exp() - 1 - d).mean().item(), rel=1e-4)
    assert found.get("mismatch/rows_dropped") == (pytest.approx(1 / 3) if importance == "sequence" else None)
    if importance != "none":
        assert found["mismatch/importance_capped"] == pytest.approx((d.exp() >= 1.2).float().mean().item())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
@pytest.mark.parametrize("importance", ["token", "sequence"])
def test_a_micro_batch_and_its_metrics_never_wait_for_the_device(case, importance):
    hidden, weight = (x.detach().cuda().requires_grad_() for x in case[:2])
    objective = HdpoObjective(HdpoConfig(importance=importance), BANNED, TEMPERATURE, Metrics())
    torch.cuda.set_sync_debug_mode("error")
    try:
        for old in (None, case[2].rollout_log_probs):
            objective(case[2], NORMS, old)(hidden, weight)[0].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_log_probs_are_one_product_without_a_graph(case):
    hidden, weight, micro = case
    with Products() as counted:
        (log_probs,) = LogProbs(BANNED, TEMPERATURE)(micro)(hidden, weight)
    assert counted.count == 1 and not log_probs.requires_grad
    torch.testing.assert_close(log_probs, log_probs_of(hidden, weight, micro).detach())


@pytest.mark.parametrize("importance", ["token", "sequence"])
def test_an_empty_micro_batch_gives_zero_and_no_numbers_of_its_own(importance):
    hidden, weight = torch.zeros(0, HIDDEN, requires_grad=True), torch.randn(VOCABULARY, HIDDEN, requires_grad=True)
    micro = pack([], PackingSpec(None, 1, 1000, 0, Sample([1, 2], [0, 0], [0.0] * 2, (), (), None)), channels=2)
    metrics = Metrics()
    (loss,) = HdpoObjective(HdpoConfig(importance=importance), BANNED, 1.0, metrics)(micro, NORMS, None)(hidden, weight)
    loss.backward()
    assert loss.item() == 0.0 and (weight.grad == 0).all()
    assert {name for name in metrics.reduce_over_ranks() if name.startswith("mismatch/")} == {"mismatch/ratio_max"}


def test_each_sources_sft_loss_is_over_its_own_tokens_for_any_split_into_micro_batches() -> None:
    g = torch.Generator().manual_seed(5)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=g)
    spec = PackingSpec(None, 1, 1000, 0, Sample([1, 2], [0, 0], [0.0] * 2, (), (), None))
    rows = [Sample(torch.randint(0, 50, (length + 2,), generator=g).tolist(), [0, 0] + [1] * length, [0.0] * (length + 2), (), (),
                   None, group=source) for length, source in ((3, 0), (9, 1), (5, 0), (1, 1), (7, 2))]
    states = [torch.randn(sum(row.mask), HIDDEN, generator=g) for row in rows]
    expected: dict[str, list[float]] = {}
    for row, hidden in zip(rows, states):
        logits = (hidden @ weight.T).log_softmax(-1)
        own = logits.gather(1, torch.tensor(row.token_ids[2:])[:, None])[:, 0]
        expected.setdefault(f"sft/loss/{'abc'[row.group]}", []).extend((-own).tolist())
    for split in ([[0, 1, 2, 3, 4]], [[0, 3], [1], [2, 4]], [[4, 1], [], [3, 2, 0]]):
        metrics = Metrics()
        objective = SftObjective(metrics, sources=["a", "b", "c"])
        for some in split:
            hidden = torch.cat([states[k] for k in some]) if some else torch.zeros(0, HIDDEN)
            objective(pack([rows[k] for k in some], spec), torch.tensor([25.0]))(
                hidden.requires_grad_(), weight.clone().requires_grad_())
        found = metrics.reduce_over_ranks()
        assert {name for name in found if name.startswith("sft/loss/")} == set(expected)
        for name, values in expected.items():
            assert found[name] == pytest.approx(sum(values) / len(values), rel=1e-5)


def test_the_share_of_a_channel_in_the_gradient_is_that_of_the_loss_itself_for_any_split():
    generator = torch.Generator().manual_seed(3)
    log_probs = -torch.rand(40, generator=generator)
    old = log_probs + 0.3 * torch.randn(40, generator=generator)
    advantages, mask = torch.randn(2, 40, generator=generator), torch.ones(40)
    norms = [40.0, 40.0]
    grads = []
    for channel in range(2):
        at = log_probs.clone().requires_grad_()
        weights = [0.0, 0.0]
        weights[channel] = (1.0, 0.15)[channel]
        hdpo_loss(at, old, advantages, mask, weights=weights, norms=norms)[0].backward()
        grads.append(at.grad)
    expected = torch.stack(grads) @ torch.stack(grads).T
    parts = [hdpo_loss(log_probs[part], old[part], advantages[:, part], mask[part], norms=norms)[1]["gradient_products"]
             for part in (slice(0, 0), slice(0, 13), slice(13, 40))]
    torch.testing.assert_close(sum(parts), expected)
    scalars = {"gradient/acc": float(expected[0, 0]), "gradient/tool": float(expected[1, 1]),
               "gradient/both": float(expected[0, 1])}
    share = grads[1].norm() / (grads[0].norm() + grads[1].norm())
    assert gradient_scalars(scalars)["hdpo/tool_gradient_share"] == pytest.approx(float(share), rel=1e-5)
    assert gradient_scalars({"gradient/acc": 0.0, "gradient/tool": 0.0, "gradient/both": 0.0}) == gradient_scalars({}) == {}
