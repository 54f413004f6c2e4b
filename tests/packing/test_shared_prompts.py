"""A prompt that rollouts share is computed once, and nothing else changes: loss, log-probs and gradients are the rows' own."""
from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import accelerate
from share_prompts import rollouts
from tiny_models import MAX_PIXELS, MIN_PIXELS, save_tiny
from torch import Tensor

from hdpo.adapters.packed_attention import PackLayout, attend_row, causal_lower_right, sdpa_attention_forward
from hdpo.adapters.policy_model import PolicyModel, load_policy_model, model_inputs
from hdpo.agent.chat import ChatFormat, load_chat_format
from hdpo.compose.policy import build_packing
from hdpo.config import Config, HdpoConfig, ModelConfig
from hdpo.packing.batching import PackingSpec, make_train_batch, pack
from hdpo.packing.exchange import to_rows, to_tensors
from hdpo.packing.prompts import sharing_rows
from hdpo.ranks.world import World
from hdpo.train.metrics import Metrics
from hdpo.train.objectives import HdpoObjective, LogProbs
from hdpo.types import MicroBatch, MiniBatch, Sample, Span, Vision

CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")])


@pytest.fixture(scope="module", params=["qwen3_vl", "qwen2_5_vl", "qwen3_vl_moe", "qwen3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def chat(folder: Path) -> ChatFormat:
    return load_chat_format(str(folder), MIN_PIXELS, MAX_PIXELS)


@pytest.fixture(scope="module")
def spec(chat: ChatFormat, folder: Path) -> PackingSpec:
    made = build_packing(Config.model_validate({"model": {"path": str(folder)}}), chat)
    assert made.share_prompts
    return made


@pytest.fixture(scope="module")
def model(folder: Path) -> PolicyModel:
    return load_policy_model(ModelConfig(path=str(folder), attention="sdpa", gradient_checkpointing=True), torch.float32)


@pytest.fixture(scope="module")
def rows(chat: ChatFormat) -> list[Sample]:
    """Two groups mixed, a group of one, a row of the first group whose prompt is another, and one in no group."""
    first, second = rollouts(chat, 0, 5), rollouts(chat, 1, 3)
    return [first[0], second[0], *first[1:3], second[1], first[3], *rollouts(chat, 2, 1),
            *(replace(row, group=0) for row in rollouts(chat, 0, 1, "otherwise: ")), second[2], first[4],
            replace(first[0], group=-1)]


def gradients(model: PolicyModel, mini: MiniBatch, spec: PackingSpec, device: str = "cpu") -> tuple[float, dict[str, Tensor]]:
    """(loss, gradients) of a mini-batch."""
    objective = HdpoObjective(HdpoConfig(), (), 1.0, Metrics())
    model.zero_grad()
    total = 0.0
    for micro in mini.micro_batches:
        inputs = model_inputs(micro, spec.image_token_id, torch.device(device), torch.float32)
        (loss,) = model(**inputs, job=objective(micro, mini.norms, None))
        loss.backward()
        total += float(loss.detach())
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@torch.no_grad()
def log_probs(model: PolicyModel, micro: MicroBatch, spec: PackingSpec) -> Tensor:
    inputs = model_inputs(micro, spec.image_token_id, torch.device("cpu"), torch.float32)
    return model(**inputs, job=LogProbs(())(micro))[0]


def tokens(mini: MiniBatch) -> int:
    return sum(micro.input_ids.shape[1] for micro in mini.micro_batches)


def test_a_pack_holds_each_shared_prompt_once_and_every_other_token_where_it_was(
        chat: ChatFormat, spec: PackingSpec, rows: list[Sample]) -> None:
    micro = pack(rows, spec, 2)
    assert sharing_rows(rows, spec.image_token_id, spec.merge_size) == [0, 1, 0, 0, 1, 0, -1, -1, 1, 0, -1]
    given, responses = rows[0].prompt_length, [len(row.token_ids) - row.prompt_length for row in rows]
    assert [span.prompt for span in micro.spans] == [-1, 0, -1, 2, 0, 0, 2, 0, -1, -1, 2, 0, -1]
    assert [span.length for span in micro.spans if span.prompt >= 0] == [responses[i] for i in (0, 1, 2, 3, 4, 5, 8, 9)]
    assert micro.spans[0] == Span(given) and micro.input_ids.shape[1] == sum(span.length for span in micro.spans)
    starts = [0]
    for span in micro.spans:
        starts.append(starts[-1] + span.length)
    for row, number in zip(rows, (1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12), strict=True):
        span, alone = micro.spans[number], pack([row], spec, 2)
        columns = [*range(starts[span.prompt], starts[span.prompt + 1])] if span.prompt >= 0 else []
        columns += range(starts[number], starts[number + 1])
        assert micro.input_ids[0, columns].tolist() == row.token_ids
        assert torch.equal(micro.position_ids[..., columns], alone.position_ids[..., :len(columns)])
    if chat.sees:
        assert micro.vision is not None
        shown = [row.vision for row in rows if row.vision is not None]
        assert len(micro.vision.pixels) == sum(len(vision.pixels) for vision in shown) - 2 * (4 + 2)
        ends = (micro.vision.grid_thw.prod(1) // spec.merge_size**2).sum()
        assert int((micro.input_ids == spec.image_token_id).sum()) == int(ends)


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_loss_and_gradients_are_those_of_the_rows_one_by_one(
        model: PolicyModel, spec: PackingSpec, rows: list[Sample], device: str) -> None:
    """Together, and with the rows of a group spread over micro-batches."""
    longest = max(len(row.token_ids) for row in rows) + 10
    packed = make_train_batch([rows], replace(spec, share_prompts=False), World(), 2).mini_batches[0]
    whole = make_train_batch([rows], spec, World(), 2).mini_batches[0]
    alone = MiniBatch([pack([row], spec, 2) for row in rows], whole.norms)
    spread = make_train_batch([rows], replace(spec, max_tokens=longest), World(), 2).mini_batches[0]
    assert len(whole.micro_batches) == 1 and len(spread.micro_batches) > 2
    assert tokens(whole) < tokens(spread) < tokens(packed)
    assert all(micro.input_ids.shape[1] <= longest for micro in spread.micro_batches)
    model.to(device)
    loss, expected = gradients(model, alone, spec, device)
    for mini in (whole, spread):
        found, grads = gradients(model, mini, spec, device)
        assert found == pytest.approx(loss, abs=1e-5 * (1 + abs(loss)))
        assert grads.keys() == expected.keys()
        for name, grad in grads.items():
            assert float((grad - expected[name]).norm()) <= 2e-5 * float(expected[name].norm() + 1e-3), name
    model.to("cpu")


def test_log_probs_are_those_of_the_rows_one_by_one_from_the_first_sampled_token_on(
        model: PolicyModel, spec: PackingSpec, rows: list[Sample]) -> None:
    micro = pack(rows, spec, 2)
    apart = torch.cat([log_probs(model, pack([row], spec, 2), spec) for row in rows])
    torch.testing.assert_close(log_probs(model, micro, spec), apart, atol=2e-5, rtol=0)
    firsts = [micro.trained[micro.row == i][0] for i in (0, 2, 3, 5, 9)]
    assert firsts == [rows[0].prompt_length - 1] * 5      # the prompt's last token predicts the first of each response


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[list[int], list[int]]]]:
    """All of transformers' FlashAttention path runs; only the CUDA kernels, which a CPU lacks, are written out here, with
    the causal mask aligned at the bottom right. What the varlen kernel was called with, when it was causal."""
    from transformers import modeling_flash_attention_utils
    calls: list[tuple[list[int], list[int]]] = []

    def plain(q: Tensor, k: Tensor, v: Tensor, softmax_scale: Any = None, causal: bool = False) -> Tensor:   # [B, L, heads, D]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2]) if causal else None
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=softmax_scale, enable_gqa=True).transpose(1, 2)

    def varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
               max_seqlen_k: int, softmax_scale: Any = None, causal: bool = False) -> Tensor:
        sizes = [bounds.diff().tolist() for bounds in (cu_seqlens_q, cu_seqlens_k)]
        assert (max_seqlen_q, max_seqlen_k) == (max(sizes[0]), max(sizes[1]))
        if causal:
            calls.append((sizes[0], sizes[1]))
        return torch.cat([plain(*(x[None] for x in row), softmax_scale, causal)[0]
                          for row in zip(q.split(sizes[0]), k.split(sizes[1]), v.split(sizes[1]))])

    monkeypatch.setattr(modeling_flash_attention_utils, "_lazy_imports", lambda *_, **__: (plain, varlen, None, None, None))
    monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)
    yield calls


def test_with_flash_attention_each_span_is_a_sequence_of_the_varlen_kernel_after_its_prompts_keys(
        model: PolicyModel, folder: Path, spec: PackingSpec, rows: list[Sample], flash: list[tuple[list[int], list[int]]],
        monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make_train_batch([rows], spec, World(), 2).mini_batches[0]
    (micro,) = whole.micro_batches
    loss, expected = gradients(model, whole, spec)
    config = model.model.config
    for part in {id(c): c for c in (config, config.get_text_config(), getattr(config, "vision_config", config))}.values():
        monkeypatch.setattr(part, "_attn_implementation_internal", "flash_attention_2")
    found, grads = gradients(model, whole, spec)
    queries = [span.length for span in micro.spans]
    keys = [span.length + (queries[span.prompt] if span.prompt >= 0 else 0) for span in micro.spans]
    assert flash and all(call == (queries, keys) for call in flash)
    assert found == pytest.approx(loss, abs=1e-5)
    for name, grad in grads.items():
        assert float((grad - expected[name]).norm()) <= 2e-5 * float(expected[name].norm() + 1e-3), name


@pytest.mark.engine
@pytest.mark.slow
def test_two_zero3_ranks_step_to_the_same_weights_with_shared_prompts_and_without(tmp_path: Path) -> None:
    """Rows move between ranks, groups are spread over micro-batches, the second step has old log-probs."""
    folder = save_tiny("qwen3_vl", tmp_path)
    done = accelerate("tests/support/ranks/share_prompts.py", [str(folder)])
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(next(line for line in done.stdout.splitlines() if "RESULT " in line).split("RESULT ", 1)[1])
    apart, shared = result["False"], result["True"]
    assert apart["packs_that_share"] == 0 and shared["packs_that_share"] >= 4
    assert shared["tokens"] < 0.6 * apart["tokens"] and shared["patches"] < 0.5 * apart["patches"]
    for figure in ("norms", "loss", "entropy", "kl"):
        assert shared[figure] == pytest.approx(apart[figure], rel=1e-4), figure
    start, without, with_ = (torch.load(folder / f"{name}.pt") for name in ("start", False, True))
    assert start.keys() == without.keys() == with_.keys()
    for name, before in start.items():     # a step of Adam turns any gradient, however small, into one of the learning rate
        step = (without[name] - before).norm()
        assert step > 0 and (with_[name] - without[name]).norm() <= 1e-3 * step, name


def test_gradients_of_a_shared_prompts_keys_are_added_up_in_fp32() -> None:
    spans = [Span(3), *[Span(1, 0)] * 64]
    layout = PackLayout(spans, torch.device("cpu"))
    states = torch.randn(1, 2, 67, 4, dtype=torch.bfloat16, requires_grad=True)
    torch.cat(layout.rows(states)[1:], dim=2).backward(grad := torch.rand(1, 2, 64 * 4, 4, dtype=torch.bfloat16))
    exact = grad.double().reshape(1, 2, 64, 4, 4)[..., :3, :].sum(dim=2)
    assert states.grad is not None and torch.equal(states.grad[:, :, :3], exact.to(torch.bfloat16))


@pytest.mark.parametrize(("before", "length"), [(5, 1), (3, 40), (300, 700)])
def test_the_masks_written_out_on_a_cpu_are_the_bias_that_a_device_is_given(before: int, length: int) -> None:
    """Aligned at the bottom right, whichever way it is said, with grouped keys, more than one block, a single token."""
    module = torch.nn.Module()
    module.num_key_value_groups = 2   # type: ignore[assignment]
    query = torch.randn(1, 4, length, 8, dtype=torch.float64)
    key, value = torch.randn(2, 1, 2, before + length, 8, dtype=torch.float64)
    bias = causal_lower_right(length, before + length)
    expected, _ = sdpa_attention_forward(module, query, key, value, bias, scaling=0.3)
    torch.testing.assert_close(attend_row(module, query, key, value, {"scaling": 0.3}), expected)


@pytest.mark.parametrize(("change", "shares"), [
    ({}, True), ({"group": 3}, False), ({"prompt_length": 3}, False), ({"token_ids": [9, 261, 260, 4, 5, 6]}, False),
    ({"token_ids": [259, 261, 260, 4]}, False), ({"vision": None}, False), ({"token_ids": [259, 261, 260, 4, *[5] * 32]}, True),
    ({"token_ids": [259, 261, 260, 4, *[5] * 33]}, False)])
def test_rows_share_only_what_is_identical(change: dict[str, Any], shares: bool) -> None:
    """Of one group, the same ids, the very same pictures, something after it, but not so much that it does not pay."""
    picture = Vision((torch.zeros(4, 8),), torch.tensor([[1, 2, 2]]))
    row = Sample([259, 261, 260, 4, 5, 6], [0] * 4 + [1] * 2, [0.0] * 6, (), (), picture, 4, 0)
    other = replace(row, token_ids=[259, 261, 260, 4, 7, 8], **change) if "token_ids" not in change else replace(row, **change)
    assert sharing_rows([row, other], 261, 2) == ([0, 0] if shares else [-1, -1])
    copy = replace(picture, pixels=(picture.pixels[0].clone(),))
    assert sharing_rows([row, replace(row, vision=copy)], 261, 2) == [-1, -1]


def test_rows_share_their_prompt_on_the_rank_they_have_moved_to(rows: list[Sample]) -> None:
    arrived = to_rows([tensor.clone() for tensor in to_tensors(rows)])
    assert sharing_rows(arrived, 261, 2) == sharing_rows(rows, 261, 2) != [-1] * len(rows)
