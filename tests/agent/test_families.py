"""Every family passes the same tests, on a tiny model of its own: rendering, positions, packing, sync and parity."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from launching import accelerate
from PIL import Image
from safetensors import safe_open
from tiny_models import CHAT_TEMPLATE, MAX_PIXELS, MIN_PIXELS, TINY, save_tiny

from hdpo.adapters.policy_model import PolicyModel, load_policy_model, model_inputs
from hdpo.agent.chat import ChatFormat, load_chat_format
from hdpo.agent.families import FAMILIES
from hdpo.compose.policy import build_packing
from hdpo.config import Config, ModelConfig, RolloutConfig
from hdpo.errors import DataError
from hdpo.packing.batching import PackingSpec, pack
from hdpo.protocols import GenerateRequest
from hdpo.train.canary import canary_prompts
from hdpo.types import Sample

UNTIED = ("qwen2_5_vl", "qwen3_vl_moe")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {name: save_tiny(name, root / name, tied=name not in UNTIED) for name in TINY}


@pytest.fixture(scope="module", params=sorted(TINY))
def folder(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Path:
    return folders[request.param]


@pytest.fixture(scope="module")
def chat(folder: Path) -> ChatFormat:
    return load_chat_format(str(folder), MIN_PIXELS, MAX_PIXELS)


@pytest.fixture(scope="module")
def spec(chat: ChatFormat, folder: Path) -> PackingSpec:
    return build_packing(Config.model_validate({"model": {"path": str(folder)}}), chat)


@pytest.fixture(scope="module")
def model(folder: Path) -> PolicyModel:
    config = ModelConfig(path=str(folder), attention="sdpa", gradient_checkpointing=False)
    return load_policy_model(config, torch.float32).eval()


def picture(width: int, height: int) -> Image.Image:
    return Image.effect_noise((width, height), 60).convert("RGB")


def rows(chat: ChatFormat) -> list[Sample]:
    """Three rows of other lengths; the last two with one and two images where the model sees."""
    made = []
    for shapes in ([], [(64, 32)], [(48, 80), (96, 64)]):
        images = [picture(*shape) for shape in shapes] if chat.sees else []
        prompt = chat.prompt([{"role": "user", "content": "Look: " + "<image>and " * len(images) + "?" * len(shapes)}], images)
        answer = chat.encode_turn("It is " + "so " * (2 + len(shapes))) + [chat.end_of_turn_id]
        ids, given = prompt.expanded_ids + answer, len(prompt.expanded_ids)
        made.append(Sample(ids, [0] * given + [1] * len(answer), [0.0] * len(ids), (), (), chat.vision(prompt.images)))
    return made


@torch.no_grad()
def logits(model: PolicyModel, samples: list[Sample], spec: PackingSpec) -> torch.Tensor:
    """[M, V] of the trained tokens of one pack."""
    micro = pack(samples, spec)
    inputs = model_inputs(micro, spec.image_token_id, torch.device("cpu"), torch.float32)
    return model(**inputs, job=lambda hidden, weight: (hidden @ weight.T,))[0]


def test_every_family_is_tested() -> None:
    assert set(TINY) == set(FAMILIES)


def test_a_prompt_is_token_for_token_what_the_models_own_processor_makes_of_it(chat: ChatFormat, folder: Path) -> None:
    from transformers import AutoProcessor, AutoTokenizer

    images = [picture(70, 50), picture(300, 200)] if chat.sees else []
    text = "Compare " + "<image> with " * len(images) + "care."
    segment = chat.prompt([{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}], images)
    marked = text.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": marked}]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, chat_template=CHAT_TEMPLATE)
    if not images:
        assert segment.compact_ids == segment.expanded_ids == tokenizer(rendered)["input_ids"]
        return
    own = AutoProcessor.from_pretrained(folder)(text=[rendered], images=images, return_tensors="pt")
    vision = chat.vision(segment.images)
    assert vision is not None
    assert segment.expanded_ids == own["input_ids"][0].tolist()
    assert torch.equal(vision.grid_thw, own["image_grid_thw"])
    assert segment.compact_ids.count(chat.image_token_id) == 2


def test_a_text_only_model_is_shown_no_image_and_told_so(chat: ChatFormat) -> None:
    observation = chat.observation("Found it: <image>", [picture(64, 64)], 200)
    if chat.sees:
        assert len(observation.images) == 1 and observation.expanded_ids.count(chat.image_token_id) == 16
        return
    assert observation.images == () and "1 of 1 images are not shown" in chat.decode(observation.expanded_ids)
    assert chat.vision(observation.images) is None
    with pytest.raises(DataError, match="see no images"):
        chat.prompt([{"role": "user", "content": "<image>What?"}], [picture(32, 32)])


def test_positions_equal_those_of_the_model(chat: ChatFormat, spec: PackingSpec, model: PolicyModel) -> None:
    for row in rows(chat):
        ids = torch.tensor([row.token_ids])
        grid = row.vision.grid_thw if row.vision else None
        positions = spec.positions(ids[0], grid, spec.image_token_id, spec.merge_size)
        assert positions[0].tolist() == list(range(len(row.token_ids)))
        if chat.sees:
            token_types = (ids == chat.image_token_id).int()
            expected, _ = model.model.model.get_rope_index(ids, mm_token_type_ids=token_types, image_grid_thw=grid)
            assert torch.equal(positions[1:], expected[:, 0])


def test_packed_rows_give_the_logits_of_separate_forwards(chat: ChatFormat, spec: PackingSpec, model: PolicyModel) -> None:
    samples = rows(chat)
    apart = torch.cat([logits(model, [sample], spec) for sample in samples])
    torch.testing.assert_close(logits(model, samples, spec), apart, atol=2e-5, rtol=0)


def test_a_pack_equals_the_whole_model_on_its_own_inputs(
        chat: ChatFormat, spec: PackingSpec, model: PolicyModel, folder: Path) -> None:
    """The model with its own positions and its own head, given one unpacked row."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    whole = (AutoModelForImageTextToText if chat.sees else AutoModelForCausalLM).from_pretrained(folder).eval()
    row = rows(chat)[-1]
    ids = torch.tensor([row.token_ids])
    vision = {} if row.vision is None else {
        "pixel_values": row.vision.pixel_values, "image_grid_thw": row.vision.grid_thw,
        "mm_token_type_ids": (ids == chat.image_token_id).int()}
    with torch.no_grad():
        expected = whole(input_ids=ids, **vision).logits[0][:-1][torch.tensor(row.mask[1:], dtype=torch.bool)]
    torch.testing.assert_close(logits(model, [row], spec), expected, atol=2e-5, rtol=0)


def test_an_empty_micro_batch_visits_the_same_modules_as_a_full_one(
        chat: ChatFormat, spec: PackingSpec, model: PolicyModel) -> None:
    """Under ZeRO-3 every rank must gather the same modules in the same order."""
    def visited(samples: list[Sample]) -> list[str]:
        order: list[str] = []
        hooks = [module.register_forward_hook(lambda *_, name=name: order.append(name))
                 for name, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))]
        logits(model, samples, spec)
        for hook in hooks:
            hook.remove()
        return order
    assert visited([]) == visited(rows(chat)[:1]) == visited(rows(chat))


def test_the_transformers_engine_samples_with_the_log_probs_of_the_model(
        chat: ChatFormat, spec: PackingSpec, model: PolicyModel, folder: Path) -> None:
    from hdpo.adapters.engines import make_engine

    engine = make_engine(
        "hf", str(folder), config=RolloutConfig(max_num_seqs=8), max_model_len=1024, stop_token_ids=chat.stop_ids,
        tool_call_end_id=chat.tool_call_end_id, banned_token_ids=chat.banned_ids, image_limit=4, dtype="float32",
        min_pixels=chat.min_pixels, max_pixels=chat.max_pixels)
    prompts = [chat.prompt(messages, images) for messages, images in canary_prompts(chat)]
    assert len(prompts) == (4 if chat.sees else 2)
    for index, prompt in enumerate(prompts):
        engine.add_request(str(index), GenerateRequest(prompt.compact_ids, prompt.images, 12, 1.0, index))
    done = {}
    while engine.num_unfinished():
        done.update(engine.step())
    for index, prompt in enumerate(prompts):
        sampled = done[str(index)].token_ids
        ids, given = prompt.expanded_ids + sampled, len(prompt.expanded_ids)
        sample = Sample(ids, [0] * given + [1] * len(sampled), [0.0] * len(ids), (), (), chat.vision(prompt.images))
        scores = logits(model, [sample], spec).index_fill(1, torch.tensor(chat.banned_ids), float("-inf")).log_softmax(-1)
        expected = scores.gather(1, torch.tensor(sampled)[:, None])[:, 0].tolist()
        assert done[str(index)].log_probs == pytest.approx(expected, abs=2e-5)


@pytest.mark.engine
@pytest.mark.long
def test_every_family_trains_under_zero3_on_two_ranks_and_vllm_samples_with_the_weights_it_is_sent(
        folders: dict[str, Path]) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    done = accelerate("tests/support/ranks/family_cycle.py", [str(folder) for folder in folders.values()])
    assert done.returncode == 0, done.stderr[-3000:]
    results = [json.loads(line.split("RESULT ", 1)[1]) for line in done.stdout.splitlines() if "RESULT " in line]
    assert [result["family"] for result in results] == list(folders)
    for result in results:
        assert result["before"] < 1e-4 and result["after"] < 1e-4, result
        assert result["micro_batches"] > 1 and result["norm"] > 0 and result["unchanged"] == [], result
        check_shards(*result["shards"])
    for name, folder in folders.items():
        saved = folder.with_name(folder.name + "-saved")
        sent = torch.load(saved / "sent.pt")
        auto = AutoModelForCausalLM if FAMILIES[name].image_words is None else AutoModelForImageTextToText
        plain = dict(auto.from_pretrained(saved).named_parameters(remove_duplicate=False))
        assert plain.keys() == sent.keys()
        assert all(torch.equal(plain[key], sent[key]) for key in sent), name
        assert shapes(saved) == shapes(folder)   # published folders and ours hold experts alike


def check_shards(first: list[str], second: list[str]) -> None:
    """Both ranks wrote their share of the files."""
    files = sorted(first + second)
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert 0 <= len(first) - len(second) <= 1 and len(files) > 3


def shapes(folder: Path) -> dict[str, list[int]]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {key: file.get_slice(key).get_shape() for key in file.keys()}
    return found
