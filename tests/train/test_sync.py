"""Weights arrive whole or the run stops by name: checksums, the canary, and the order in which memory changes hands."""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from local_policy import LocalPolicy
from tiny_models import MAX_PIXELS, MIN_PIXELS, save_tiny_qwen3_vl

from hdpo.adapters.engines import make_engine
from hdpo.agent.chat import ChatFormat, load_chat_format
from hdpo.checksums import Watch, compare
from hdpo.config import Config
from hdpo.errors import ParityError
from hdpo.packing.batching import PackingSpec
from hdpo.train.canary import Difference, ParityReport, canary, check_parity
from hdpo.train.metrics import Metrics
from hdpo.train.rl import send_weights
from hdpo.train.sync import WeightSync
from hdpo.types import Sample

# -- checksums ---------------------------------------------------------------------------------------------------------


def sums(tensors: dict[str, torch.Tensor]) -> Any:
    watch = Watch()
    assert [name for name, _ in watch.passing(tensors.items())] == list(tensors)
    return watch.sums()


@given(st.integers(0, 2**31), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 79))
def test_a_checksum_ignores_order_and_notices_any_single_bit(seed: int, dtype: torch.dtype, position: int) -> None:
    tensor = torch.randn(8, 10, generator=torch.Generator().manual_seed(seed)).to(dtype)
    sent = sums({"w": tensor})
    assert compare(sent, {"w": tensor.T[:, torch.randperm(8)]}.items()) == ([], 1.0)
    damaged = tensor.clone()
    damaged.view(torch.int16 if dtype == torch.bfloat16 else torch.int32).view(-1)[position] ^= 1
    assert compare(sent, {"w": damaged}.items()) == (["w"], 1.0)


def test_fused_parts_are_compared_as_one_and_what_an_engine_packed_away_is_left_out() -> None:
    q, k, gone = torch.randn(4, 3), torch.randn(2, 3), torch.randn(5, 6)
    sent = sums({"a.q": q, "a.k": k, "b.w": gone})
    held = {"a.qk": torch.cat([q, k]), "b.w": torch.empty(0)}
    found = compare(sent, held.items(), key=lambda name: name.replace(".q", ".qk").replace(".k", ".qk").replace(".qkk", ".qk"))
    assert found.wrong == [] and found.share == pytest.approx(18 / 48)
    padded = {"a.q": torch.cat([q, torch.zeros(3, 3)])}
    assert compare(sums({"a.q": q}), padded.items()) == ([], 1.0)


# -- canary ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_qwen3_vl(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def chat(folder: Path) -> ChatFormat:
    return load_chat_format(str(folder), MIN_PIXELS, MAX_PIXELS)


def test_the_canary_holds_a_long_text_and_a_tool_turn_with_several_images_and_keeps_to_its_room(chat: ChatFormat) -> None:
    asked = canary(chat, room=4000, max_images=4)
    kinds = dict(asked)
    assert set(kinds) == {"text", "long", "images", "tool_images"}
    assert 1500 < len(kinds["long"].expanded_ids) <= 2000
    assert len(kinds["tool_images"].images) == 4
    assert kinds["tool_images"].compact_ids.count(chat.tool_call_end_id) == 1
    assert len(dict(canary(chat, 10**6, 4))["long"].expanded_ids) <= 8192
    small = canary(chat, room=300, max_images=1)
    assert small and all(len(p.expanded_ids) <= 300 and len(p.images) <= 1 for _, p in small)


# -- the gates over a real engine --------------------------------------------------------------------------------------


class Notes(Metrics):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture()
def sync(folder: Path, chat: ChatFormat) -> Iterator[WeightSync]:
    config = Config.model_validate({"rollout": {"engine": "hf", "max_images": 4, "max_num_seqs": 16},
                                    "sync": {"canary_every": 2, "checksum_every": 2}})
    engine = make_engine(
        "hf", str(folder), config=config.rollout, max_model_len=1024, stop_token_ids=chat.stop_ids,
        tool_call_end_id=chat.tool_call_end_id, banned_token_ids=chat.banned_ids, image_limit=4, min_pixels=chat.min_pixels,
        max_pixels=chat.max_pixels, dtype="float32")
    assert chat.image_token_id is not None
    policy = LocalPolicy(folder, chat.image_token_id)
    filler = Sample([1, 2], [0, 0], [0.0, 0.0], (), (), None)
    spec = PackingSpec(image_token_id=chat.image_token_id, merge_size=chat.merge_size, max_tokens=4096, max_patches=4096,
                       filler=filler)
    yield WeightSync(policy, engine, chat, spec, config, Notes())   # type: ignore[arg-type]
    engine.close()


def test_a_healthy_pair_passes_every_gate_and_reports_its_figures(sync: WeightSync) -> None:
    sync.open(version=0, fresh=True)
    assert [line.split(":")[0] for line in sync.log.lines] == [   # type: ignore[attr-defined]
        "parity before the first step", "parity after sync"]
    scalars = sync.log.reduce_over_ranks()
    assert scalars["mismatch/canary_max"] < 1e-4 and scalars["sync/verified_share"] == 1.0
    assert {f"mismatch/canary_mean/{kind}" for kind in ("text", "long", "images", "tool_images")} <= set(scalars)
    sync.send(1)
    sync.watch(1)
    assert set(sync.log.reduce_over_ranks()) == {"sync/gb", "sync/verified_share"}     # not due: no canary
    sync.watch(2)
    assert "mismatch/canary_mean" in sync.log.reduce_over_ranks()


def test_memory_changes_hands_in_order_the_optimizer_leaves_before_the_engine_wakes(
        sync: WeightSync, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = sync.policy.calls   # type: ignore[attr-defined]
    for name in ("wake", "load_weights", "sleep"):
        real = getattr(sync.engine, name)
        monkeypatch.setattr(sync.engine, name, lambda *args, _n=name, _r=real: (calls.append(_n), _r(*args))[1])
    sync.send(1)
    assert calls == ["park", "wake", "load_weights"]
    calls.clear()
    sync.open(0, fresh=True)
    assert calls == ["park", "wake", "sleep", "park", "wake", "load_weights", "sleep"]


def test_a_weight_that_an_engine_holds_differently_stops_the_run_by_name(
        sync: WeightSync, monkeypatch: pytest.MonkeyPatch) -> None:
    sync.send(0)
    real = sync.engine.load_weights

    def stale(weights: Any, version: int) -> None:
        real(weights, version)
        with torch.no_grad():
            sync.engine._model.model.visual.blocks[1].attn.proj.bias[3] += 1e-3   # type: ignore[attr-defined]

    monkeypatch.setattr(sync.engine, "load_weights", stale)
    with pytest.raises(ParityError, match=r"differ.*visual\.blocks\.1\.attn\.proj\.bias"):
        sync.send(1)


@pytest.mark.parametrize(("part", "cause"), [("visual", "only prompts with images differ"), ("language", "did not arrive whole")])
def test_a_drifted_engine_fails_the_canary_with_its_likely_cause_and_is_asleep(
        sync: WeightSync, monkeypatch: pytest.MonkeyPatch, part: str, cause: str) -> None:
    model = sync.engine._model.model   # type: ignore[attr-defined]
    weight = model.visual.merger.linear_fc2.weight if part == "visual" else model.language_model.norm.weight
    asleep: list[bool] = []
    monkeypatch.setattr(sync.engine, "sleep", lambda: asleep.append(True))
    with torch.no_grad():
        weight.mul_(1.01)
    with pytest.raises(ParityError, match=cause):
        sync.watch(2)
    assert asleep == [True]


def reports(monkeypatch: pytest.MonkeyPatch, *sure: float) -> None:
    """What the canary will find, in turn: text that differs by so much in bf16."""
    queue = iter(sure)
    monkeypatch.setattr("hdpo.train.sync.measure", lambda *_: ParityReport({"text": Difference(*[next(queue)] * 3)}))


def test_a_first_failure_during_a_run_is_a_warning_that_the_next_step_looks_into(
        sync: WeightSync, monkeypatch: pytest.MonkeyPatch) -> None:
    sync.policy.dtype = torch.bfloat16
    reports(monkeypatch, 0.07, 0.05, 0.09, 0.07)
    sync.watch(2)
    assert ["warning: trainer and engine disagree at step 2" in line and "sync.parity_tolerance=0.084" in line
            for line in sync.log.lines] == [True]   # type: ignore[attr-defined]
    assert sync.log.reduce_over_ranks()["mismatch/canary_failed"] == 1.0
    sync.watch(3)       # not due, but on probation: all is well again
    sync.watch(5)       # so nothing is measured here
    sync.watch(6)
    with pytest.raises(ParityError, match="at step 7.*sync.parity_tolerance 0.06"):
        sync.watch(7)


def test_what_no_noise_can_reach_stops_a_run_at_once_and_a_start_allows_no_warning(
        sync: WeightSync, monkeypatch: pytest.MonkeyPatch) -> None:
    sync.policy.dtype = torch.bfloat16
    reports(monkeypatch, 0.31, 0.07, float("inf"))
    with pytest.raises(ParityError, match="at step 2"):
        sync.watch(2)
    with pytest.raises(ParityError, match="before the first step"):
        sync.check("before the first step")
    with pytest.raises(ParityError, match="another folder$"):      # no tolerance lets a NaN pass
        sync.check("before the first step")


def test_new_weights_move_the_engines_log_probs(sync: WeightSync, chat: ChatFormat) -> None:
    sync.send(0)
    with torch.no_grad():
        for parameter in sync.policy.module.parameters():   # type: ignore[attr-defined]
            parameter.mul_(1.01)
    with pytest.raises(ParityError):
        check_parity(sync.policy, sync.engine, chat, sync.spec, stage="with old weights")
    sync.send(1)
    assert check_parity(sync.policy, sync.engine, chat, sync.spec, stage="after sync").max < 1e-4


def test_a_run_that_fails_its_canary_is_saved_before_it_stops(sync: WeightSync) -> None:
    saved: list[tuple[int, dict[str, int]]] = []
    checkpoints = SimpleNamespace(save_last=lambda step, position: saved.append((step, position)))
    parts: Any = SimpleNamespace(sync=sync, checkpoints=checkpoints)
    send_weights(parts, 2, {"row": 7})
    assert not saved
    sync.engine.load_weights = lambda weights, version: list(weights)   # type: ignore[assignment, method-assign]
    with torch.no_grad():
        sync.policy.module.model.lm_head.weight.mul_(1.1)   # type: ignore[attr-defined]
    with pytest.raises(ParityError):
        send_weights(parts, 4, {"row": 9})
    assert saved == [(4, {"row": 9})]
