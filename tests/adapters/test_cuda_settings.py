"""What only a CUDA device runs is chosen by arithmetic and settings that any machine can check."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from hdpo import checksums
from hdpo.adapters import hf_engine
from hdpo.adapters.policy_model import load_policy_model, model_inputs
from hdpo.adapters.vllm_engine import graph_sizes
from hdpo.adapters.vllm_worker import droppable
from hdpo.config import ModelConfig, RolloutConfig
from hdpo.packing.batching import PackingSpec, pack
from hdpo.ranks.world import local_device
from hdpo.types import Sample, Vision


class Longest(TorchDispatchMode):
    """Elements of the longest tensor that was summed."""

    longest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__.startswith("sum"):
            self.longest = max(self.longest, args[0].numel())
        return func(*args, **(kwargs or {}))


def segment(address: int, *blocks: tuple[int, str]) -> dict[str, Any]:
    return {"address": address, "blocks": [{"size": size, "state": state} for size, state in blocks]}


def test_sleep_forgets_a_segment_only_where_resent_weights_are_all_that_lives_in_it() -> None:
    segments = [
        segment(0, (100, "active_allocated"), (28, "inactive")),                        # a weight
        segment(1000, (64, "active_allocated"), (64, "active_allocated")),              # a weight, and a tensor nobody sends
        segment(2000, (16, "inactive"), (64, "active_allocated")),                      # a weight behind a gap
        segment(3000, (64, "active_allocated"), (64, "active_awaiting_free")),          # a weight, and what is being freed
        segment(4000, (64, "inactive")),                                                # nothing
    ]
    assert droppable(segments, {0, 1000, 2016, 3000}) == [0, 2000]
    assert droppable(segments, set()) == []


@given(st.integers(1, 1024))
def test_every_batch_of_decode_steps_has_a_graph_at_most_a_sixteenth_or_eight_larger(most: int) -> None:
    sizes = graph_sizes(most)
    assert sizes == sorted(set(sizes)) and sizes[-1] == most and len(sizes) < 100
    for batch in range(1, most + 1):
        padded = next(size for size in sizes if size >= batch)
        assert padded - batch < max(8, batch / 16 + 1)


@pytest.mark.parametrize("eager", [False, True])
def test_vllm_takes_the_execution_settings_of_a_device(eager: bool) -> None:
    pytest.importorskip("vllm")
    from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode

    from hdpo.adapters.vllm_engine import _execution

    options = _execution(RolloutConfig(enforce_eager=eager, max_num_seqs=100, tensor_parallel=2), cuda=True)
    assert options["hf_overrides"] == {"head_dtype": "float32"} and options["enforce_eager"] is eager
    assert ("compilation_config" in options) is not eager
    if not eager:
        taken = CompilationConfig(**options["compilation_config"])
        assert taken.mode == CompilationMode.NONE and taken.cudagraph_mode == CUDAGraphMode.FULL_DECODE_ONLY
        assert taken.cudagraph_capture_sizes[-1] == 200


def test_each_rank_of_a_node_has_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert local_device() == torch.device("cpu") or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert local_device() == torch.device("cuda", 3)


def test_cudnn_attention_is_off_once_a_model_is_loaded(tiny_folder: Path) -> None:
    for load in (lambda: load_policy_model(ModelConfig(path=str(tiny_folder)), torch.float32),
                 lambda: hf_engine._load(str(tiny_folder), "auto", torch.device("cpu"))):
        torch.backends.cuda.enable_cudnn_sdp(True)
        load()
        assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_pixels_reach_the_model_in_its_precision_and_in_order() -> None:
    pixels = tuple(torch.randn(count, 24) for count in (16, 4))
    vision = Vision(pixels, torch.tensor([[1, 4, 4], [1, 2, 2]]))
    row = Sample([9, 9, 9, 9, 1, 9, 2], [0] * 6 + [1], [0.0] * 7, (1.0,), (True,), vision)
    micro = pack([row], PackingSpec(9, 2, 8, 100, row))
    seen = model_inputs(micro, 9, torch.device("cpu"), torch.bfloat16)["vision"]["pixel_values"]
    assert seen.dtype == torch.bfloat16 and torch.equal(seen, torch.cat(pixels).bfloat16())


def test_a_checksum_in_slices_is_the_whole_checksum_and_needs_no_copy_of_the_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    for tensor in (torch.randn(37, 11), torch.randn(11, 37).T, torch.randn(5, 6, 7).bfloat16().transpose(0, 2),
                   torch.randn(()), torch.randn(0, 3), torch.randn(3, 0)):
        whole = checksums.bit_sum(tensor)
        for size in (1, 7, 100):
            with monkeypatch.context() as patched:
                patched.setattr(checksums, "_SLICE", size)
                assert torch.equal(checksums.bit_sum(tensor), whole)
        bits = tensor.contiguous().view(-1).view({4: torch.int32, 2: torch.int16}[tensor.element_size()])
        assert int(whole) == sum(bits.tolist())
    with monkeypatch.context() as patched, Longest() as sums:
        patched.setattr(checksums, "_SLICE", 100)
        checksums.bit_sum(torch.randn(1000, 3))
        checksums.bit_sum(torch.randn(3, 1000).T)
    assert 0 < sums.longest <= 100
