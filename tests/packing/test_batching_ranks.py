"""Real gloo ranks: rows reach the rank that computes them, straight and unchanged, and no split changes the gradient."""
from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_batching import make_sample, spec
from torch import Tensor

from hdpo.config import HdpoConfig
from hdpo.packing.batching import make_train_batch
from hdpo.ranks import world as world_module
from hdpo.ranks.world import World
from hdpo.train.metrics import Metrics
from hdpo.train.objectives import HdpoObjective
from hdpo.types import MicroBatch, Sample

RANKS = 3
VOCABULARY, WIDTH = 300, 8


def rows() -> list[Sample]:
    """Thirteen rows of two channels, long and short, with and without images; the last two show the same image."""
    made = [make_sample(10 + 7 * i % 40, [(4, 4)] if i % 3 == 0 else [], ((-1.0) ** i * (1 + i / 7), 0.3 * i - 1.7), i,
                        (True, i % 4 > 0)) for i in range(12)]
    made[5] = make_sample(30, [], (0.0, 0.0), 5)     # counts in the norms, is not computed
    return [*made, Sample(made[9].token_ids, made[9].mask, made[9].rollout_log_probs, (0.25, 0.0), (True, True), made[9].vision)]


def owned(rank: int, size: int) -> list[list[Sample]]:
    """Two mini-batches: of the first, rank 0 has nearly all rows and rank 1 none; the second is a single row of rank 1."""
    everything = rows()
    if size == 1:
        return [everything[:12], everything[12:]]
    first = {0: everything[:10], 1: [], 2: everything[10:12]}[rank]
    return [first, everything[12:] if rank == 1 else []]


def gradients(mini_batches: list[Any]) -> list[Tensor]:
    """Of a head on an embedding, float64: one [2, V, H] tensor per mini-batch, this rank's part."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(2, VOCABULARY, WIDTH, generator=generator, dtype=torch.float64)
    objective = HdpoObjective(HdpoConfig(importance="none"), (), 1.0, Metrics())
    found = []
    for mini in mini_batches:
        weights = start.clone().requires_grad_()
        for micro in mini.micro_batches:
            hidden = weights[0][micro.input_ids[0]].index_select(0, micro.trained)
            old = micro.rollout_log_probs.double() - 4.5
            (loss,) = objective(micro, mini.norms, old)(hidden, weights[1])
            loss.backward()
        assert weights.grad is not None
        found.append(weights.grad)
    return found


def contents(micro: MicroBatch) -> list[tuple[Any, ...]]:
    """What identifies each row of a micro-batch."""
    bounds = [*(micro.position_ids[0, 0] == 0).nonzero()[:, 0].tolist(), micro.input_ids.shape[1]]
    parts = []
    pixels = iter(micro.vision.pixels if micro.vision is not None else ())
    for row in range(micro.num_rows):
        ids = micro.input_ids[0, bounds[row]:bounds[row + 1]].tolist()
        shown = round(float(next(pixels).double().sum()), 9) if 261 in ids else 0.0
        mine = micro.row == row
        parts.append((*ids, *micro.rollout_log_probs[mine].tolist(), *micro.targets[mine].tolist(),
                      *micro.advantages[:, row].tolist(), *micro.member[:, row].tolist(), shown))
    return parts


def rank_main(rank: int, folder: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(RANKS), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    world_module.MESSAGE_BYTES = 1000
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    world = World().connect()
    messages: list[tuple[int, int]] = []
    send = dist.isend

    def counted(tensor: Tensor, target: int, *rest: Any) -> Any:
        messages.append((target, tensor.numel()))
        return send(tensor, target, *rest)

    dist.isend = counted
    tensors = [torch.arange(2000).reshape(40, 50).T, torch.zeros(0, 3), torch.tensor([True, False]), torch.tensor(2.5),
               torch.randn(700, generator=torch.Generator().manual_seed(1), dtype=torch.bfloat16)]
    exchanged = world.exchange([tensors if (rank, target) == (1, 2) else [] for target in range(RANKS)])
    straight, messages[:] = list(messages), []
    batch = make_train_batch(owned(rank, RANKS), spec(120), world, 2)
    grads = gradients(batch.mini_batches)
    for grad in grads:
        dist.all_reduce(grad)
    torch.save({
        "sent": straight, "exchanged": [[t.clone() for t in some] for some in exchanged], "moved": len(messages),
        "norms": [mini.norms.tolist() for mini in batch.mini_batches],
        "tokens": [[micro.input_ids.shape[1] for micro in mini.micro_batches] for mini in batch.mini_batches],
        "rows": [[row for micro in mini.micro_batches for row in contents(micro)] for mini in batch.mini_batches],
        "shared": [len({id(p) for micro in mini.micro_batches if micro.vision for p in micro.vision.pixels})
                   for mini in batch.mini_batches],
        "gradients": grads}, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(rank_main, (str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


@pytest.fixture(scope="module")
def alone() -> Any:
    return make_train_batch(owned(0, 1), spec(10_000), World(), 2)


def test_tensors_of_any_shape_and_type_go_straight_from_rank_to_rank_in_bounded_messages(ranks: list[dict[str, Any]]) -> None:
    generator = torch.Generator().manual_seed(1)
    expected = [torch.arange(2000).reshape(40, 50).T, torch.zeros(0, 3), torch.tensor([True, False]), torch.tensor(2.5),
                torch.randn(700, generator=generator, dtype=torch.bfloat16)]
    got = ranks[2]["exchanged"][1]
    assert [t.dtype for t in got] == [t.dtype for t in expected]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert ranks[0]["sent"] == ranks[2]["sent"] == []
    assert {target for target, _ in ranks[1]["sent"]} == {2}
    assert max(size for _, size in ranks[1]["sent"]) == 1000


def test_every_row_is_computed_once_by_some_rank_unchanged(ranks: list[dict[str, Any]], alone: Any) -> None:
    for index, mini in enumerate(alone.mini_batches):
        expected = sorted(row for micro in mini.micro_batches for row in contents(micro))
        assert sorted(row for rank in ranks for row in rank["rows"][index]) == expected
    assert len(expected) == 1 and sum(len(rank["rows"][0]) for rank in ranks) == 11
    assert ranks[0]["moved"] > 0 and all(rank["rows"][0] for rank in ranks)    # rank 1 had none of its own


def test_ranks_have_equally_many_micro_batches_within_the_budget_and_the_norms_of_the_whole(
        ranks: list[dict[str, Any]], alone: Any) -> None:
    for index, mini in enumerate(alone.mini_batches):
        assert len({len(rank["tokens"][index]) for rank in ranks}) == 1
        assert all(rank["norms"][index] == mini.norms.tolist() for rank in ranks)
    assert all(tokens <= 120 for rank in ranks for tokens in rank["tokens"][0])


def test_the_gradient_is_that_of_one_rank_and_one_micro_batch(ranks: list[dict[str, Any]], alone: Any) -> None:
    assert [len(mini.micro_batches) for mini in alone.mini_batches] == [1, 1]
    for index, expected in enumerate(gradients(alone.mini_batches)):
        assert expected.abs().max() > 0
        for rank in ranks:
            error = (rank["gradients"][index] - expected).norm() / expected.norm()
            assert error <= 1e-12
