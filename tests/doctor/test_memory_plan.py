"""The memory plan counts what real models hold, makes sense at full size, and names a setting that really fits."""
from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from tiny_models import save_tiny_qwen3_vl

from hdpo.config import Config, ModelConfig
from hdpo.config.file import load_config
from hdpo.doctor.doctor import main as doctor
from hdpo.doctor.host_plan import machine_memory, pinned
from hdpo.doctor.memory_plan import GIB, check, plan
from hdpo.doctor.shapes import Shapes, read_shapes, shapes_of
from hdpo.errors import ConfigError

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
        engine = sum(size for part, size in made.phases["rollout"].items() if part.startswith(("engine", "KV")))
        assert engine == pytest.approx(0.7 * device) and made.total("sync") < made.total("rollout") < device
        assert 45 * GIB < made.total("update") < 75 * GIB
        assert made.sequences > 5


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


@pytest.mark.parametrize(("ranks", "device", "rollout", "kv", "host"), [
    (8, 79.1, 59.7, (35, 37), 241), (8, 178.4, 129.3, (104, 106), 241), (4, 139.8, 104.4, (77, 79), 213)])
def test_the_shipped_run_holds_what_first_principles_say_within_a_twentieth(
        shapes: Shapes, ranks: int, device: float, rollout: float, kv: tuple[int, int], host: int) -> None:
    """vLLM takes 0.7 of the device, and of that its weights, a step's tensors and its graphs before the KV cache; the trainer's
    shard and what CUDA and NCCL hold are beside it. A node holds 12 bytes a parameter of parked state, 2 of a checkpoint under
    way, 4 GiB of processed images and 3 of its own a rank, 596 megapixels of pictures eight times over in three forms, and
    1,536 live sessions with seven processes of a tool server and its store."""
    made = check(configured(), shapes, ranks, int(device * GIB), 2)
    assert made.total("rollout") / GIB == pytest.approx(rollout, rel=0.05)
    assert 0.95 * kv[0] < made.kv_bytes / GIB < 1.05 * kv[1]
    parameters, megapixels = 8.767, 8 * (256 * 2 + 16 * 5.24)
    node = (12 + 2) * parameters / 1.0737 + ranks * (4 + 3) + megapixels * 7e6 / GIB + 1536 * 24.25 / 1024 + 1 + 1 + 2.5
    assert node == pytest.approx(host, rel=0.05)
    assert made.host_total("rollout") / GIB == pytest.approx(node, rel=0.05)
    assert max(map(made.host_total, made.host)) < 256 * GIB


def test_a_sleeping_engine_that_is_copied_takes_pinned_blocks_of_powers_of_two(shapes: Shapes) -> None:
    """23 GiB for 16.3 of weights: 192 MiB of gate and up take 256, 1.16 GiB of an embedding 2."""
    copied = plan(configured(rollout__sleep="copy"), shapes, 8, H100, 2).host["update"]["sleeping engine"]
    dropped = plan(configured(), shapes, 8, H100, 2).host["update"]["sleeping engine"]
    assert (copied - dropped) / 8 / GIB == pytest.approx(23, rel=0.05)
    assert [pinned(n) for n in (1, 192, 256, 257)] == [1, 256, 256, 512]


@pytest.mark.parametrize(("values", "gib"), [({"rollout__sleep": "copy"}, 300), ({}, 230), ({"rollout__sleep": "copy"}, 210)])
def test_a_node_without_the_memory_is_refused_with_a_setting_that_fits(shapes: Shapes, values: Any, gib: int) -> None:
    check(configured(**values), shapes, 8, H100, 2, node=410 * GIB)
    with pytest.raises(ConfigError, match=f"host memory: the .* phase needs .* which has {gib} GiB; it fits with") as refused:
        check(configured(**values), shapes, 8, H100, 2, node=gib * GIB)
    named = dict(re.findall(r"([a-z_]+\.[a-z_]+)=([\w.]+)", str(refused.value).split("it fits with")[1]))
    check(configured(**values | {field.replace(".", "__"): value for field, value in named.items()}), shapes, 8, H100, 2,
          node=gib * GIB)
    with pytest.raises(ConfigError, match="tool server on another machine"):
        check(configured(**values), shapes, 8, H100, 2, node=100 * GIB)


def test_vllms_share_that_leaves_the_trainer_no_room_is_refused_with_a_smaller_one(shapes: Shapes) -> None:
    """vLLM itself would refuse to start: it asks for 0.95 of the device, and the trainer holds 4.5 GiB already."""
    with pytest.raises(ConfigError, match=r"more than the device .* it fits with rollout.gpu_memory=0.9$"):
        check(configured(rollout__gpu_memory=0.95), shapes, 8, H100, 2)


def test_a_starting_policy_beside_the_trained_one_is_on_the_device_before_the_update_and_on_the_host_else(shapes: Shapes) -> None:
    plain, pulled = (plan(configured(hdpo__kl_coef=k), shapes, 8, H100, 2) for k in (0, 0.01))
    shard = 2 * -(-shapes.parameters // 8)
    assert list(plain.phases) == ["rollout", "sync", "update"] and "reference" not in plain.host["update"]
    assert pulled.phases["reference"]["reference, shard"] == pulled.phases["reference"]["weights, shard"] == shard
    assert pulled.total("reference") < pulled.total("update") == plain.total("update")
    for phase in ("rollout", "update", "save"):
        assert pulled.host_total(phase) - plain.host_total(phase) == 8 * shard
    adapted = plan(configured(hdpo__kl_coef=0.01, model__lora_rank=8), shapes, 8, H100, 2)
    assert "reference" not in {*adapted.phases, *adapted.host["update"]}
    gib = int(plain.host_total("rollout") / GIB) + 4
    check(configured(rollout__image_cache_gib=0.5), shapes, 8, H100, 2, node=gib * GIB)
    with pytest.raises(ConfigError, match="host memory: .* it fits with"):
        check(configured(hdpo__kl_coef=0.01), shapes, 8, H100, 2, node=gib * GIB)
    with pytest.raises(ConfigError, match="it fits with hdpo.kl_coef=0$"):
        check(configured(hdpo__kl_coef=0.01, rollout__image_cache_gib=0.5, rollout__max_num_seqs=32), shapes, 8, H100, 2,
              node=int(plan(configured(rollout__image_cache_gib=0.5, rollout__max_num_seqs=32), shapes, 8, H100, 2).host_total(
                  "rollout")) + GIB)


def test_an_sft_run_is_planned_too(shapes: Shapes) -> None:
    made = check(configured(), shapes, 8, H100, 2, sft=True)
    assert list(made.phases) == ["update"] and list(made.host) == ["update", "save"]
    assert "sleeping engine" not in made.host["update"] and made.lines()
    for values in ({}, {"rollout__kv_cache_gib": 2}):      # no setting of an engine that it doesn't have
        with pytest.raises(ConfigError, match="the update phase .* it fits with") as refused:
            check(configured(**values), shapes, 4, H100, 2, sft=True)
        assert "rollout." not in str(refused.value)


def test_a_model_that_no_setting_can_place_is_told_so(shapes: Shapes) -> None:
    with pytest.raises(ConfigError, match="more GPUs"):
        check(configured(), shapes, 1, 24 * GIB, 2)


def test_doctor_prints_the_plan_of_a_configuration_for_devices_elsewhere(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from deepspeed.accelerator import get_accelerator
    get_accelerator()      # says once in a process which it takes
    capsys.readouterr()
    folder = save_tiny_qwen3_vl(tmp_path)
    arguments = ["--config", str(ROOT / "launch/configs/demo_rl.yaml"), "--set", f"model.path={folder}", "--gpus", "2"]
    assert doctor([*arguments, "--gpu-gib", "80"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("2 ranks", "rollout", "sync", "update", "KV cache", "total of 80.0"))
    assert max(map(len, out.splitlines())) < 120
    assert doctor([*arguments, "--gpu-gib", "2"]) == 1
    assert re.search("^memory +MISSING +memory: the", capsys.readouterr().out, re.MULTILINE)
    assert doctor(["--set", f"model.path={tmp_path / 'nothing'}"]) == 1
    assert re.search("^memory +MISSING .*config.json", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize(("own", "file"), [
    ("0::/slurm/job_7/step_0/task_1", "slurm/job_7/memory.max"), ("0::/", "memory.max"),
    ("3:cpu:/x\n4:memory:/slurm/uid_0/job_7\n0::/", "memory/slurm/uid_0/memory.limit_in_bytes"),
    ("4:memory:/docker/not_seen_from_inside", "memory/memory.limit_in_bytes")])
def test_the_memory_of_a_node_is_what_the_groups_around_this_process_allow(tmp_path: Path, own: str, file: str) -> None:
    (tmp_path / "own").write_text(own + "\n")
    limit, inside = tmp_path / "root" / file, tmp_path / "root/slurm/job_7/step_0/memory.max"
    for path, said in ((limit, f"{3 << 20}\n"), (inside, "max\n")):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(said)
    assert machine_memory(str(tmp_path / "root"), str(tmp_path / "own")) == 3 << 20
    limit.unlink()
    assert machine_memory(str(tmp_path / "root"), str(tmp_path / "own")) > 3 << 20
