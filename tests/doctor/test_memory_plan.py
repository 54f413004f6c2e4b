"""The memory plan counts what real models hold, makes sense at full size, and names a setting that really fits."""
from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from tiny_models import save_tiny_qwen3_vl

from hdpo.config import Config, ModelConfig
from hdpo.config_file import load_config
from hdpo.doctor.doctor import main as doctor
from hdpo.doctor.memory_plan import GIB, Shapes, check, plan, read_shapes, shapes_of
from hdpo.errors import ConfigError, ModelError

ROOT = Path(__file__).resolve().parents[2]
H100, H200 = int(79.1 * GIB), int(139.8 * GIB)


def configured(**values: Any) -> Config:
    overrides = [f"{key.replace('__', '.')}={value}" for key, value in values.items()]
    return load_config(ROOT / "launch/configs/metis_8b_rl.yaml", ["model.attention=flash_attention_2", *overrides],
                       environment={})


@pytest.fixture(scope="module")
def shapes() -> Shapes:
    """Qwen3-VL-8B's."""
    from transformers import Qwen3VLConfig

    text = dict(hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32, head_dim=128,
                num_key_value_heads=8, vocab_size=151936, max_position_embeddings=262144)
    vision = dict(depth=27, hidden_size=1152, intermediate_size=4304, num_heads=16, patch_size=16, spatial_merge_size=2,
                  temporal_patch_size=2, out_hidden_size=4096, num_position_embeddings=2304,
                  deepstack_visual_indexes=[8, 16, 24])
    return shapes_of(Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False), ModelConfig())


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_counted_exactly_without_weights(tmp_path: Path, tied: bool) -> None:
    from safetensors import safe_open

    folder = save_tiny_qwen3_vl(tmp_path, tied=tied)
    with safe_open(folder / "model.safetensors", "pt") as weights:
        sizes = {name: weights.get_tensor(name).numel() for name in weights.keys()}
    (folder / "model.safetensors").unlink()
    found = read_shapes(ModelConfig(path=str(folder)))
    assert found.parameters == found.trained == sum(sizes.values())
    assert found.largest_layer == sum(size for name, size in sizes.items() if "deepstack_merger_list.0." in name)
    frozen = read_shapes(ModelConfig(path=str(folder), freeze=["*visual*"]))
    assert frozen.trained == sum(size for name, size in sizes.items() if "visual" not in name)


def test_qwen3_vl_8b_on_eight_devices_makes_sense(shapes: Shapes) -> None:
    assert shapes.parameters == 8_767_123_696
    for device in (H100, H200):
        made = check(configured(), shapes, 8, device, 2)
        assert made.kv_bytes_per_token == 2 * 36 * 8 * 128 * 2
        assert made.phases["update"]["fp32 weights, moments"] == 12 * -(-shapes.parameters // 8)
        assert made.phases["sync"]["engine weights"] == 2 * shapes.parameters
        assert made.total("sync") < made.total("rollout") <= 0.7 * device + 1
        assert 45 * GIB < made.total("update") < 75 * GIB
        assert made.sequences > 5
    assert made.host["sleeping engine"] == 2 * shapes.parameters


def test_ranks_that_share_an_engine_hold_parts_of_its_language_model_and_cache(shapes: Shapes) -> None:
    one, four = (plan(configured(rollout__tensor_parallel=n), shapes, 8, H200, 2) for n in (1, 4))
    vision = shapes.vision_parameters
    assert 0.5e9 < vision < 0.7e9
    assert four.phases["sync"]["engine weights"] == 2 * (-(-(shapes.parameters - vision) // 4) + vision)
    assert four.kv_bytes_per_token == one.kv_bytes_per_token // 4 and four.sequences > 4 * one.sequences
    assert four.phases["rollout"]["engine workspace"] > one.phases["rollout"]["engine workspace"]   # four times the sequences


def test_the_head_of_full_logits_is_never_in_the_plan(shapes: Shapes) -> None:
    logits = 4 * 40960 * shapes.vocabulary
    assert plan(configured(), shapes, 8, H200, 2).phases["update"]["loss chunk, dW"] < logits / 4


@pytest.mark.parametrize(("ranks", "device", "values"), [
    (1, H200, {}), (4, H100, {}), (2, H100, {}), (8, H100, {"rollout__kv_cache_gib": 70}),
    (8, H100, {"rollout__gpu_memory": 0.3}),
    (8, H100, {"batch__tokens_per_micro_batch": 163840}), (8, H100, {"model__gradient_checkpointing": "false"}),
    (8, 40 * GIB, {"data__max_prompt_tokens": 4096, "rollout__max_response_tokens": 4096}),
    (8, H100, {"rollout__kv_cache_gib": 2})])
def test_a_refusal_is_one_line_and_names_settings_that_fit(shapes: Shapes, ranks: int, device: int, values: Any) -> None:
    with pytest.raises(ConfigError) as refused:
        check(configured(**values), shapes, ranks, device, 2)
    message = str(refused.value)
    assert "\n" not in message and "GiB" in message
    named = re.findall(r"([a-z_]+\.[a-z_]+)=([\w.]+)", message.split("it fits with")[1])
    assert named, message
    check(configured(**values | {field.replace(".", "__"): value for field, value in named}), shapes, ranks, device, 2)


def test_a_model_that_no_setting_can_place_is_told_so(shapes: Shapes) -> None:
    with pytest.raises(ConfigError, match="more GPUs"):
        check(configured(), shapes, 1, 24 * GIB, 2)


def test_doctor_prints_the_plan_of_a_configuration_for_devices_elsewhere(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_tiny_qwen3_vl(tmp_path)
    arguments = ["--config", str(ROOT / "launch/configs/demo_rl.yaml"), "--set", f"model.path={folder}", "--gpus", "2"]
    assert doctor([*arguments, "--gpu-gib", "80"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("2 ranks", "rollout", "sync", "update", "KV cache", "total of 80.0"))
    assert max(map(len, out.splitlines())) < 120
    with pytest.raises(ConfigError, match="memory: the"):
        doctor([*arguments, "--gpu-gib", "2"])
    with pytest.raises(ModelError, match="config.json"):
        doctor(["--set", f"model.path={tmp_path / 'nothing'}"])
