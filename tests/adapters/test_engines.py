"""The same properties for both engines; parity with a plain transformers forward, before and after a weight sync."""
from __future__ import annotations

import gc

import pytest
from tiny_models import MAX_PIXELS, MIN_PIXELS, save_tiny_qwen3_vl

from hdpo.config import RolloutConfig
from hdpo.errors import ModelError, RequestRefused
from hdpo.protocols import GenerateRequest
from hdpo.types import StopReason

START, END, VISION_START, VISION_END, IMAGE, TOOL_CALL_END = 257, 258, 259, 260, 261, 264
BANNED = (256, VISION_START, VISION_END, IMAGE, 262, 265, 266, 267, 268, 269, 270, 271)
ARGUMENTS = dict(max_model_len=256, stop_token_ids=(END, TOOL_CALL_END), tool_call_end_id=TOOL_CALL_END,
                 banned_token_ids=BANNED, image_limit=4, min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS, dtype="float32",
                 config=RolloutConfig(max_num_seqs=16, max_batched_tokens=256, kv_cache_gib=0.25))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save_tiny_qwen3_vl(tmp_path_factory.mktemp("tiny"), tied=True))


@pytest.fixture(scope="module", params=["hf", pytest.param("vllm", marks=pytest.mark.engine)])
def engine(request, folder):
    from hdpo.adapters.engines import make_engine

    engine = make_engine(request.param, folder, **ARGUMENTS)
    yield engine
    engine.close()
    gc.collect()


@pytest.fixture(scope="module")
def model(folder):
    from hdpo.adapters.torchvision_shim import activate

    activate()
    import torch
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


def restore(engine, model, version=0):
    engine.load_weights(model.state_dict().items(), version)


def picture(seed, size=(48, 32)):
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def text(seed=1, max_tokens=24, temperature=1.0, ids=(START, 10, 11, 12)):
    return GenerateRequest(list(ids), (), max_tokens, temperature, seed)


def with_images(seed=1, max_tokens=24, temperature=1.0):
    ids = [START, 20, VISION_START, IMAGE, VISION_END, 21, VISION_START, IMAGE, VISION_END, 22]
    return GenerateRequest(ids, (picture(1), picture(2, (64, 64))), max_tokens, temperature, seed, ("p1", "p2"))


def run(engine, requests):
    for key, request in requests.items():
        engine.add_request(key, request)
    results = {}
    while engine.num_unfinished():
        results.update(engine.step())
    return results


def reference_log_probs(model, folder, request, token_ids):
    """One fp32 forward over prompt and completion, banned ids removed, at the sampling temperature."""
    import torch
    from transformers import AutoImageProcessor

    extra, runs = {}, iter(())
    if request.images:
        processor = AutoImageProcessor.from_pretrained(folder)
        extra = dict(processor(images=list(request.images), return_tensors="pt"))
        runs = iter((extra["image_grid_thw"].prod(-1) // 4).tolist())
    prompt = [t for token in request.token_ids for t in [token] * (next(runs) if token == IMAGE else 1)]
    ids = torch.tensor([prompt + token_ids])
    with torch.no_grad():
        logits = model(input_ids=ids, mm_token_type_ids=(ids == IMAGE).int(), use_cache=False, **extra).logits[0]
    logits = logits[len(prompt) - 1:-1] / (request.temperature or 1.0)
    log_probs = logits.index_fill(1, torch.tensor(BANNED), float("-inf")).log_softmax(-1)
    return log_probs.gather(1, torch.tensor(token_ids)[:, None])[:, 0].tolist()


def assert_parity(engine, model, folder):
    requests = {"text": text(3), "hot": text(4, temperature=1.3), "images": with_images(5),
                "greedy": text(6, temperature=0.0)}
    for key, completion in run(engine, requests).items():
        expected = reference_log_probs(model, folder, requests[key], completion.token_ids)
        assert completion.log_probs == pytest.approx(expected, abs=1e-5), key


def test_log_probs_equal_a_plain_forward_before_and_after_new_weights_with_tied_embeddings(engine, model, folder):
    import copy

    import torch

    restore(engine, model)
    assert_parity(engine, model, folder)
    changed = copy.deepcopy(model)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)

    def vanishing():   # as gathered parameters do: gone when the iterator advances
        for name, parameter in changed.named_parameters():   # leaves the tied lm_head out
            gathered = parameter.detach().clone()
            yield name, gathered
            gathered.fill_(float("nan"))

    engine.load_weights(vanishing(), version=7)
    assert_parity(engine, changed, folder)
    assert run(engine, {"a": text()})["a"].weight_version == 7
    restore(engine, model)


def test_a_groups_rollouts_share_the_cache_of_their_prompt_by_image_content_until_the_weights_change(engine, model):
    def request(seed, image, key):
        ids = [START, VISION_START, IMAGE, VISION_END, *(10 + n % 90 for n in range(190))]
        return GenerateRequest(ids, (picture(image),), 4, 1.0, seed, (key,))

    def num_cached(*some):
        return [run(engine, {"a": one})["a"].num_cached for one in some]
    restore(engine, model)
    first, second, again, other = num_cached(request(1, 7, "p7"), request(2, 7, "p7"), request(3, 7, "p7"), request(1, 8, "p8"))
    restore(engine, model, version=3)
    (after,) = num_cached(request(4, 7, "p7"))
    if type(engine).__name__ == "HfEngine":
        assert first == second == after == 0, "it has no such cache"
        return
    assert first == other == after == 0 and second == again >= 128
    restore(engine, model)


def test_a_picture_is_processed_once_however_often_weights_change_or_the_engine_sleeps(engine, model, monkeypatch):
    if type(engine).__name__ == "HfEngine":
        pytest.skip("it keeps no pictures")
    core, cache = engine._engine.engine_core.engine_core, engine._engine.renderer.mm_processor_cache

    def processed(number):
        """How many pictures were not found; and a completion from what was found is a whole one."""
        ids = [START, VISION_START, IMAGE, VISION_END, 20, 21]
        before = cache.make_stats()
        completion = run(engine, {"a": GenerateRequest(ids, (picture(number),), 4, 1.0, 1, (f"kept{number}",))})["a"]
        after = cache.make_stats()
        assert len(completion.token_ids) >= 1
        return (after.total - before.total) - (after.hits - before.hits)
    restore(engine, model)
    assert [processed(31), processed(31), processed(32)] == [1, 0, 1]
    restore(engine, model, version=3)
    assert [processed(31), processed(32)] == [0, 0]
    monkeypatch.setattr(engine, "_cuda", True)       # all of a device's sleep but the device
    monkeypatch.setattr(core.model_executor, "sleep", lambda level: None)
    monkeypatch.setattr(core.model_executor, "wake_up", lambda tags: None)
    engine.sleep()
    assert core.is_sleeping()
    engine.wake()
    restore(engine, model, version=4)
    assert not core.is_sleeping() and [processed(31), processed(32), processed(33)] == [0, 0, 1]
    engine._engine.reset_mm_cache()
    assert processed(31) == 1, "elsewhere vLLM forgets as it is told"
    restore(engine, model)


def test_checksums_agree_with_what_was_sent_and_name_what_was_not(engine, model):
    import torch

    from hdpo.checksums import Watch

    def sums(state):
        watch = Watch()
        assert list(watch.passing(state.items()))
        return watch.sums()

    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    restore(engine, model)
    found = engine.compare_weights(sums(state))
    assert found.wrong == [] and found.share > 0.2   # vLLM on CPU packs linear layers and keeps no copy to compare
    norm = next(name for name in state if name.endswith("layers.1.input_layernorm.weight"))
    bias = next(name for name in state if name.endswith("blocks.0.attn.qkv.bias"))
    with torch.no_grad():
        state[norm][0] += 1e-3
        state[bias][1] += 1e-3
        state["lm_head.weight"] = state["lm_head.weight"] + 1e-3
    endings = {name.rsplit(".", 3)[-2] for name in engine.compare_weights(sums(state)).wrong}
    assert {"input_layernorm", "qkv"} <= endings <= {"input_layernorm", "qkv", "lm_head"}   # the tied head is packed, too
    assert "lm_head" in endings or found.share < 1


def test_the_memory_plans_bytes_of_a_cached_token_are_vllms_own(engine, folder):
    from hdpo.config import Config, ModelConfig
    from hdpo.doctor.memory_plan import plan, read_shapes

    if type(engine).__name__ == "HfEngine":
        pytest.skip("it allocates as it goes")
    made = plan(Config(), read_shapes(ModelConfig(path=folder)), ranks=1, device=None, dtype_bytes=4)
    cache = engine._engine.vllm_config.cache_config
    assert cache.num_gpu_blocks * cache.block_size == pytest.approx(0.25 * 2**30 / made.kv_bytes_per_token, rel=0.01)


def test_same_seed_gives_the_same_tokens_whatever_the_batch_mates(engine):
    alone = run(engine, {"a": with_images(3)})["a"]
    crowd = run(engine, {"x": text(8), "a": with_images(3), "y": text(9, ids=(START,) + tuple(range(30, 60)))})["a"]
    other = run(engine, {"a": with_images(4)})["a"]
    assert alone.token_ids == crowd.token_ids != other.token_ids
    assert alone.log_probs == pytest.approx(crowd.log_probs, abs=1e-5)


def test_the_images_decide_what_is_sampled(engine):
    request = with_images(3, temperature=0.0)
    other = GenerateRequest(request.token_ids, (picture(7), picture(8, (64, 64))), 24, 0.0, 3, ("q1", "q2"))
    results = run(engine, {"a": request, "b": other})
    assert results["a"].log_probs != pytest.approx(results["b"].log_probs, abs=1e-4)


def test_a_spent_budget_is_length_and_short_requests_return_while_long_ones_run(engine):
    engine.add_request("long", text(3, max_tokens=40))
    engine.add_request("short", text(3, max_tokens=2))
    finished = {}
    while "short" not in finished:
        finished.update(engine.step())
    assert "long" not in finished and engine.num_unfinished() == 1
    assert finished["short"].stop is StopReason.LENGTH and len(finished["short"].token_ids) == 2
    while engine.num_unfinished():
        finished.update(engine.step())
    assert finished["long"].token_ids[:2] == finished["short"].token_ids


def test_a_new_request_is_served_while_another_runs(engine):
    engine.add_request("long", text(3, max_tokens=60))
    engine.step()
    engine.add_request("late", text(4, max_tokens=1))
    finished = {}
    while "late" not in finished:
        finished.update(engine.step())
    assert "long" not in finished
    engine.abort(["long"])


def test_an_aborted_request_is_never_returned(engine):
    engine.add_request("a", text(3, max_tokens=30))
    engine.add_request("b", text(4, max_tokens=5))
    engine.step()
    engine.abort(["a", "unknown"])
    assert engine.num_unfinished() == 1
    finished = {}
    while engine.num_unfinished():
        finished.update(engine.step())
    assert set(finished) == {"b"}


def test_stop_tokens_are_part_of_the_completion_and_name_the_reason(engine):
    results = run(engine, {str(seed): text(seed, max_tokens=200) for seed in range(16)})
    reasons = {END: StopReason.END_OF_TURN, TOOL_CALL_END: StopReason.TOOL_CALL}
    ended = [c for c in results.values() if c.stop is not StopReason.LENGTH]
    assert {c.stop for c in ended} == set(reasons.values())
    for completion in ended:
        assert reasons[completion.token_ids[-1]] is completion.stop
        assert not set(completion.token_ids[:-1]) & set(reasons)


def test_a_later_turn_continues_from_the_sampled_ids_verbatim(engine, model, folder):
    first = text(3, max_tokens=6)
    sampled = run(engine, {"a": first})["a"].token_ids
    second = text(4, max_tokens=6, ids=tuple(first.token_ids + sampled + [30, 31]))
    completion = run(engine, {"a": second})["a"]
    assert completion.log_probs == pytest.approx(
        reference_log_probs(model, folder, second, completion.token_ids), abs=1e-5)


def test_banned_ids_are_never_sampled_even_with_the_largest_logits(engine, model):
    import torch

    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():   # the logits of all banned ids get a large multiple of what the last hidden state holds
        norm = next(name for name in state if name.endswith("language_model.norm.weight"))
        embedding = next(name for name in state if name.endswith("embed_tokens.weight"))
        hidden = torch.nn.functional.normalize(state[embedding][list(range(30, 60))].mean(0), dim=0)
        state[embedding][list(BANNED)] = 3.0 * hidden
        state[norm].fill_(2.0)
        state["lm_head.weight"] = state[embedding]
    engine.load_weights(state.items(), 1)
    results = run(engine, {str(seed): text(seed) for seed in range(16)})
    assert not set(BANNED) & {token for completion in results.values() for token in completion.token_ids}
    restore(engine, model)


def test_a_generation_ends_with_the_token_that_completes_the_closing_tag_wherever_that_is_cut(engine, monkeypatch):
    from hdpo.agent.spelled import SpelledTag

    tag = SpelledTag("a>b", ["a", ">", "xa>", "b", "a>b!", "", ">ba", "aa"] * 34)
    free = run(engine, {str(seed): text(seed, max_tokens=60) for seed in range(12)})
    monkeypatch.setattr(engine, "_spelled_end", tag)
    stopped = run(engine, {str(seed): text(seed, max_tokens=60) for seed in range(12)})
    assert engine.num_unfinished() == 0
    ended = 0
    for name, completion in free.items():
        said, ids = "", []
        for token in completion.token_ids:
            ids.append(token)
            said += tag._texts[token] if token not in (END, TOOL_CALL_END) else ""
            if "a>b" in said:
                break
        assert stopped[name].token_ids == ids and len(stopped[name].log_probs) == len(ids)
        if "a>b" in said:
            ended += 1
            assert stopped[name].stop is StopReason.TOOL_CALL
        else:
            assert stopped[name].stop is completion.stop
    assert ended > 6


def test_log_probs_of_a_peaked_row_over_a_real_vocabulary_are_exact():
    import torch

    from hdpo.adapters.vllm_sampling import normalised

    logits = torch.randn(4, 151_936, generator=torch.Generator().manual_seed(0)) * 2
    logits[:, 7] += torch.tensor([14.0, 18.0, 22.0, 26.0])
    exact = logits.double().log_softmax(-1)
    assert (normalised(logits) - exact).abs().max() < 1e-5


def test_incomplete_or_unknown_weights_are_refused(engine, model):
    state = model.state_dict()
    dropped = next(name for name in state if name.endswith("layers.1.mlp.down_proj.weight"))
    with pytest.raises(ModelError, match="missing"):
        engine.load_weights(((n, t) for n, t in state.items() if n != dropped), 1)
    restore(engine, model)
    assert len(run(engine, {"a": text(max_tokens=3)})["a"].token_ids) <= 3


def test_weights_are_not_swapped_under_running_requests(engine, model):
    engine.add_request("a", text(max_tokens=50))
    with pytest.raises(RuntimeError, match="running"):
        restore(engine, model)
    engine.abort(["a"])


def test_what_an_engine_cannot_take_is_refused_and_the_others_go_on(engine):
    """Too long a prompt, too many pictures, one without its picture, one that no processor takes, an unknown token."""
    alone = run(engine, {"a": text(3, max_tokens=8)})["a"]
    engine.add_request("a", text(3, max_tokens=8))
    one = [START, VISION_START, IMAGE, VISION_END]
    thin = picture(1, (1000, 2))
    for number, (ids, images) in enumerate([
            ([START] * 300, ()), (one * 5, (picture(1),) * 5), (one, ()), (one, (thin,)), ([START, 10**6], ())]):
        with pytest.raises(RequestRefused) as refused:
            engine.add_request(f"bad {number}", GenerateRequest(ids, images, 8, 1.0, 1))
        assert refused.value.request_id == f"bad {number}" and "\n" not in str(refused.value)
    done = {}
    while engine.num_unfinished():
        done.update(engine.step())
    assert {name: completion.token_ids for name, completion in done.items()} == {"a": alone.token_ids}


def test_a_folder_without_a_model_is_one_clear_error(tmp_path):
    from hdpo.adapters.engines import make_engine

    with pytest.raises(ModelError, match="config.json"):
        make_engine("hf", str(tmp_path), **ARGUMENTS)
