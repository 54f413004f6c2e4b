"""Memory changes hands on a device as the plan says: what is parked or asleep is really gone, and comes back whole."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import MAX_PIXELS, MIN_PIXELS, save_tiny_qwen3_vl

from hdpo.adapters import hf_engine
from hdpo.adapters.zero3 import Parking
from hdpo.checksums import bit_sum
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
    assert scratch.numel() == 1 << 26 and not scratch.any()


def test_a_checksum_needs_no_copy_of_the_tensor_on_a_device() -> None:
    tensor = torch.randn(1 << 28, device="cuda").bfloat16()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = bit_sum(tensor)
    assert torch.cuda.max_memory_allocated() - before < 300 << 20      # whole, it would be 2 GiB
    assert int(found) == int(bit_sum(tensor.cpu()))


def test_the_transformers_engines_head_keeps_fp32_logits_of_bf16_weights() -> None:
    head = torch.nn.Linear(512, 2048, bias=False, device="cuda", dtype=torch.bfloat16)
    hidden = torch.randn(2, 3, 512, device="cuda").bfloat16()
    logits = hf_engine._fp32_logits(head, hidden)
    assert logits.dtype == torch.float32 and logits.shape == (2, 3, 2048)
    assert torch.allclose(logits, hidden.float() @ head.weight.float().T, atol=1e-3)


@pytest.fixture(scope="module", params=[("drop", False), ("copy", True)], ids=["drop-graphs", "copy-eager"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from hdpo.adapters.vllm_engine import VllmEngine

    folder, (sleep, eager) = save_tiny_qwen3_vl(tmp_path_factory.mktemp("tiny")), request.param
    torch.manual_seed(5)
    state = torch.cuda.get_rng_state()
    config = RolloutConfig(max_num_seqs=16, max_batched_tokens=256, kv_cache_gib=KV_GIB, sleep=sleep, enforce_eager=eager)
    engine = VllmEngine(
        str(folder), config=config, max_model_len=256,
        stop_token_ids=(258,), tool_call_end_id=264, image_limit=4, min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS)
    assert torch.equal(torch.cuda.get_rng_state(), state)       # the trainer's generator is as it was
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
    vllm.load_weights(weights(folder), 0)
    before, awake = greedy(vllm), used()
    for round in range(3):
        vllm.sleep()
        asleep = used()
        assert awake - asleep > 0.9 * KV_GIB * 2**30
        vllm.wake()
        if vllm._forgets:
            with pytest.raises(RuntimeError, match="load_weights first"):
                greedy(vllm)
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


def test_the_engines_head_is_fp32_and_its_decode_steps_have_graphs_unless_told_not_to(engine: Any) -> None:
    _, vllm = engine
    assert vllm._engine.model_config.head_dtype == torch.float32
    sizes = vllm._engine.vllm_config.compilation_config.cudagraph_capture_sizes
    assert not sizes if vllm._engine.model_config.enforce_eager else sizes[-1] == 16


def test_what_sleep_drops_are_weights_and_the_deepstack_inputs_stay_zero(engine: Any) -> None:
    folder, vllm = engine
    vllm.sleep()
    vllm.wake()
    vllm.load_weights(weights(folder), 10)
    inputs = vllm._engine.collective_rpc(lambda worker: [bool(t.any()) for t in worker.get_model().deepstack_input_embeds])[0]
    assert inputs and not any(inputs)


def test_every_line_of_the_gpu_check_is_within_its_limit(tmp_path: Path) -> None:
    from hdpo.doctor.gpu_check import check

    told: list[str] = []
    assert check(told.append, tmp_path / "check.json"), "\n".join(told)
