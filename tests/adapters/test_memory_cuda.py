"""Memory changes hands on a device as the plan says: what is parked or asleep is really gone, and comes back whole."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import MAX_PIXELS, MIN_PIXELS, save_tiny_qwen3_vl

from hdpo.adapters.zero3 import Parking
from hdpo.config import RolloutConfig
from hdpo.protocols import GenerateRequest

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

KV_GIB = 2.0


def used() -> int:
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return total - free


def test_parked_tensors_leave_the_device_and_return_bit_for_bit_under_their_views() -> None:
    kept = [torch.randn(1 << 26, device="cuda") for _ in range(3)]
    scratch = torch.ones(1 << 26, device="cuda")
    copies, view, before = [t.cpu() for t in kept], kept[1][5:9], used()
    parking = Parking()
    for _ in range(2):     # the second time the host buffers are there
        parking.park(kept, [scratch])
        assert before - used() >= 4 * (1 << 28)
        parking.unpark()
        assert all(torch.equal(t.cpu(), copy) for t, copy in zip(kept, copies))
        assert torch.equal(view.cpu(), copies[1][5:9])
    assert scratch.numel() == 1 << 26


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from hdpo.adapters.vllm_engine import VllmEngine

    folder = save_tiny_qwen3_vl(tmp_path_factory.mktemp("tiny"))
    engine = VllmEngine(
        str(folder), config=RolloutConfig(max_num_seqs=16, max_batched_tokens=256, kv_cache_gib=KV_GIB), max_model_len=256,
        stop_token_ids=(258,), tool_call_end_id=264, image_limit=4, min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS)
    yield folder, engine
    engine.close()


def greedy(engine: Any) -> list[int]:
    engine.add_request("a", GenerateRequest([257, 10, 11, 12], (), 12, 0.0, 1))
    done: dict[str, Any] = {}
    while engine.num_unfinished():
        done.update(engine.step())
    return done["a"].token_ids


def weights(folder: Path) -> Any:
    from safetensors.torch import load_file

    return [(name, tensor.bfloat16().cuda()) for name, tensor in load_file(folder / "model.safetensors").items()]


def test_a_sleeping_engine_gives_its_cache_back_and_the_cache_returns_only_after_the_weights(engine: Any) -> None:
    folder, vllm = engine
    before, awake = greedy(vllm), used()
    for round in range(3):
        vllm.sleep()
        asleep = used()
        assert awake - asleep > 0.9 * KV_GIB * 2**30
        vllm.wake()
        assert used() - asleep < 0.2 * KV_GIB * 2**30      # the weights alone: room for what is gathered
        vllm.load_weights(weights(folder), round)
        assert used() - asleep > 0.9 * KV_GIB * 2**30
        assert greedy(vllm) == before
    assert used() - awake < 64 * 2**20


def test_every_linear_weight_can_be_compared_on_a_device(engine: Any) -> None:
    from hdpo.checksums import Watch

    folder, vllm = engine
    watch = Watch()
    vllm.load_weights(watch.passing(weights(folder)), 9)
    found = vllm.compare_weights(watch.sums())
    assert found.wrong == [] and found.share > 0.99
