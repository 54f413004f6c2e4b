"""Packing is exact, plans honour their budgets, and norms do not depend on how a batch is cut."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hdpo.config import ModelConfig
from hdpo.packing.batching import PackingSpec, make_train_batch, multimodal_positions, pack
from hdpo.ranks.world import World
from hdpo.types import Sample, Vision

IMAGE = 261   # <|image_pad|> of tests/support/tiny_models.py
START, END = 259, 260


def make_vision(grids: list[tuple[int, int]], seed: int = 0) -> Vision:
    generator = torch.Generator().manual_seed(seed)
    return Vision(tuple(torch.randn(h * w, 384, generator=generator) for h, w in grids),
                  torch.tensor([[1, h, w] for h, w in grids]))


def make_sample(length: int, grids: list[tuple[int, int]], advantages: tuple[float, ...] = (), seed: int = 0,
                member: tuple[bool, ...] | None = None) -> Sample:
    """Images first, then `length` tokens of which the last half is trained."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    for h, w in grids:
        ids += [START, *[IMAGE] * (h * w // 4), END]
    given_ = len(ids) + length // 2
    ids += torch.randint(0, 250, (length,), generator=generator).tolist()
    mask = [0] * given_ + [1] * (len(ids) - given_)
    log_probs = [-1.0 * m for m in mask]
    return Sample(ids, mask, log_probs, advantages, tuple(True for _ in advantages) if member is None else member,
                  make_vision(grids, seed) if grids else None)


FILLER = Sample([START, IMAGE, END, 1], [0] * 4, [0.0] * 4, (), (), make_vision([(2, 2)]))


def spec(max_tokens: int = 1000, aggregation: str = "token_mean") -> PackingSpec:
    return PackingSpec(IMAGE, 2, max_tokens, 10_000, FILLER, aggregation, response_budget=64)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> torch.nn.Module:
    from tiny_models import save_tiny_qwen3_vl
    from transformers import AutoModelForImageTextToText

    folder: Path = save_tiny_qwen3_vl(tmp_path_factory.mktemp("model"))
    return AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="sdpa").eval()


ROWS = [make_sample(9, [(4, 4), (2, 6)], seed=1), make_sample(12, [], seed=2), make_sample(7, [(6, 4)], seed=3)]


def test_positions_equal_those_of_the_model(model: torch.nn.Module) -> None:
    for row in ROWS:
        ids = torch.tensor([row.token_ids])
        grid = row.vision.grid_thw if row.vision else None
        expected, _ = model.model.get_rope_index(ids, mm_token_type_ids=(ids == IMAGE).int(), image_grid_thw=grid)
        assert torch.equal(multimodal_positions(ids[0], grid, IMAGE, 2)[1:], expected[:, 0])


def test_positions_refuse_a_grid_that_does_not_fit_the_tokens() -> None:
    with pytest.raises(ValueError, match="disagree"):
        multimodal_positions(torch.tensor([START, IMAGE, END]), torch.tensor([[1, 4, 4]]), IMAGE, 2)


@torch.no_grad()
def logits(model: torch.nn.Module, samples: list[Sample]) -> torch.Tensor:
    """[M, V] of the samples' trained positions, packed into one micro-batch."""
    micro = pack(samples, spec())
    assert micro.vision is not None
    hidden = model.model(
        input_ids=micro.input_ids, position_ids=micro.position_ids, use_cache=False,
        pixel_values=micro.vision.pixel_values, image_grid_thw=micro.vision.grid_thw,
        mm_token_type_ids=(micro.input_ids == IMAGE).int()).last_hidden_state[0]
    return model.lm_head(hidden[micro.trained])


def test_packed_rows_give_the_logits_of_separate_forwards(model: torch.nn.Module) -> None:
    apart = torch.cat([logits(model, [row]) for row in ROWS])
    torch.testing.assert_close(logits(model, ROWS), apart, atol=2e-5, rtol=0)


def test_row_by_row_attention_gives_the_gradients_of_separate_forwards_without_a_mask(
        model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    from hdpo.adapters import packed_attention
    from hdpo.adapters.policy_model import load_policy_model, model_inputs
    policy = load_policy_model(ModelConfig(path=model.name_or_path, attention="sdpa", gradient_checkpointing=True), torch.float32)
    lengths: list[int] = []
    plain = packed_attention.sdpa_attention_forward

    def seen(module, query, key, value, mask, **kwargs):   # type: ignore[no-untyped-def]
        assert mask is None
        if kwargs.get("is_causal") is not False:     # not the vision tower
            lengths.append(query.shape[2])
        return plain(module, query, key, value, mask, **kwargs)
    monkeypatch.setattr(packed_attention, "sdpa_attention_forward", seen)

    def gradients(packs: list[list[Sample]]) -> list[torch.Tensor]:
        policy.zero_grad()
        for rows in packs:
            micro = pack(rows, spec())
            (scores,) = policy(**model_inputs(micro, IMAGE, torch.device("cpu"), torch.float32),
                               job=lambda hidden, weight: (hidden @ weight.T,))
            torch.log_softmax(scores, -1).gather(1, micro.targets[:, None]).sum().backward()
        return [p.grad.clone() for p in policy.parameters() if p.grad is not None]

    together = gradients([ROWS])
    assert lengths == [len(row.token_ids) for row in ROWS] * (len(lengths) // 3)
    apart = gradients([[row] for row in ROWS])
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5 * float(b.abs().max() + 1), rtol=1e-4)


def test_a_trained_token_is_predicted_from_the_position_before_it() -> None:
    micro = pack(ROWS, spec())
    ids = torch.cat([torch.tensor(row.token_ids) for row in ROWS])
    assert torch.equal(micro.targets, ids[micro.trained + 1])
    assert len(micro.targets) == sum(sum(row.mask) for row in ROWS)


def test_a_micro_batch_without_images_gets_the_filler_and_one_with_images_does_not() -> None:
    assert pack([ROWS[1]], spec()).input_ids.shape[1] == len(ROWS[1].token_ids) + 4
    assert pack(ROWS, spec()).input_ids.shape[1] == sum(len(row.token_ids) for row in ROWS)
    empty = pack([], spec(), channels=2)
    assert empty.num_rows == 0 and len(empty.trained) == 0 and empty.advantages.shape == (2, 1)


def test_norms_do_not_depend_on_the_budget_and_count_rows_whose_advantage_is_zero() -> None:
    rows = [make_sample(10, [], (1.0, 0.0), 1), make_sample(14, [], (0.0, 0.0), 2),
            make_sample(6, [(2, 2)], (-1.0, 0.5), 3, member=(True, False))]
    for budget in (40, 1000):
        batch = make_train_batch([rows], spec(budget), World(), 2)
        assert batch.mini_batches[0].norms.tolist() == [15.0, 12.0]
        assert sum(m.num_rows for m in batch.mini_batches[0].micro_batches) == 2   # the zero row is not computed


@pytest.mark.parametrize(("aggregation", "norms", "weight"), [
    ("token_mean", [8.0], 1.0), ("sequence_mean", [2.0], 1 / 4), ("dr_grpo", [128.0], 1.0)])
def test_aggregation_is_a_choice_of_token_weights_and_norms(aggregation: str, norms: list[float], weight: float) -> None:
    rows = [make_sample(8, [], (1.0,), 1), make_sample(8, [], (-1.0,), 2)]
    mini = make_train_batch([rows], spec(1000, aggregation), World(), 1).mini_batches[0]
    assert mini.norms.tolist() == norms
    assert mini.micro_batches[0].weight.tolist() == pytest.approx([weight] * 8)
