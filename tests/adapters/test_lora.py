"""Low-rank adapters and frozen parts: only what is trained moves, and nobody outside the trainer knows that they exist."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import accelerate
from safetensors.torch import load_file
from tiny_models import MAX_PIXELS, MIN_PIXELS, save_tiny

from hdpo.adapters.lora import adapter_parameters, choose_trainable, merged_parameters, write_adapter
from hdpo.adapters.policy_model import load_policy_model, model_inputs
from hdpo.agent.chat import load_chat_format
from hdpo.compose.policy import build_packing
from hdpo.config import Config, ModelConfig
from hdpo.errors import ConfigError
from hdpo.packing.batching import pack
from hdpo.train.objectives import LogProbs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("qwen3_vl", tmp_path_factory.mktemp("lora") / "model", tied=True)


def trained(folder: Path, **settings: Any) -> list[str]:
    model = load_policy_model(ModelConfig(path=str(folder), dtype="float32", **settings), torch.float32).model
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def test_a_pattern_freezes_parameters_by_any_of_their_names(folder: Path) -> None:
    everything = trained(folder)
    assert trained(folder, freeze=["model.visual.*"]) == [n for n in everything if ".visual." not in n]
    tied = "model.language_model.embed_tokens.weight"
    assert trained(folder, freeze=["lm_head.*"]) == [n for n in everything if n != tied]


def test_adapters_stand_beside_the_language_models_linear_layers_only_and_not_beside_frozen_ones(folder: Path) -> None:
    names = trained(folder, lora_rank=2)
    assert len(names) == 2 * 7 * 2 and all(".lora_A." in n or ".lora_B." in n for n in names)
    assert all("language_model.layers" in n for n in names)
    assert not any("layers.0" in n for n in trained(folder, lora_rank=2, freeze=["*layers.0.*"]))
    assert any("visual" in n for n in trained(folder, lora_rank=2, lora_targets=["*"]))
    assert not any("lm_head" in n for n in trained(folder, lora_rank=2, lora_targets=["*"]))


@pytest.mark.parametrize(("settings", "message"), [
    ({"freeze": ["model.vision.*"]}, "model.freeze: model.vision.* matches nothing; names are like model.visual"),
    ({"freeze": ["*"]}, "leaves nothing to train"),
    ({"lora_rank": 2, "freeze": ["*"]}, "leaves nothing to train"),
    ({"lora_rank": 2, "lora_targets": ["q_proj"]}, "model.lora_targets: q_proj matches nothing"),
])
def test_a_pattern_that_cannot_be_meant_is_one_clear_line(folder: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        trained(folder, **settings)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_merging_adds_the_scaled_product_in_float32_and_leaves_the_base_as_it_is() -> None:
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(6, 5, dtype=torch.bfloat16), "b": torch.nn.Linear(5, 3)})
    model.get_output_embeddings = lambda: None   # type: ignore[assignment]
    choose_trainable(model, ModelConfig(lora_rank=2, lora_alpha=6, lora_targets=["a"]))
    with torch.no_grad():
        model["a"].lora_B["default"].weight.normal_()
    base = model["a"].base_layer.weight.detach().clone()
    merged = {item.name: item.value() for item in merged_parameters(model)}
    product = 3.0 * model["a"].lora_B["default"].weight.float() @ model["a"].lora_A["default"].weight.float()
    assert list(merged) == ["a.weight", "a.bias", "b.weight", "b.bias"]
    assert torch.equal(merged["a.weight"], (base.float() + product).bfloat16())
    assert torch.equal(model["a"].base_layer.weight, base) and merged["b.weight"] is not None


def test_peft_loads_an_adapters_folder_to_the_same_logits(folder: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText
    settings: Any = {"lora_rank": 4, "lora_alpha": 12, "freeze": ["*layers.1.mlp.*"]}
    model = load_policy_model(ModelConfig(path=str(folder), dtype="float32", attention="sdpa", **settings), torch.float32).model
    held = adapter_parameters(model)
    with torch.no_grad():
        for parameter in held.values():
            parameter.normal_(std=0.2)
    write_adapter(tmp_path / "adapter", model, {name: p.detach().clone() for name, p in held.items()}, str(folder))
    ids = torch.arange(5, 17).unsqueeze(0)
    base = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        plain = base(input_ids=ids).logits
        loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(input_ids=ids).logits
        own = model.eval()(input_ids=ids).logits
    torch.testing.assert_close(loaded, own, atol=1e-5, rtol=0)
    assert (loaded - plain).abs().max() > 0.01, "the adapter does something"


@pytest.mark.engine
@pytest.mark.slow
def test_two_zero3_ranks_train_adapters_alone_send_and_export_them_merged_and_resume(folder: Path, tmp_path: Path) -> None:
    done = accelerate("tests/support/ranks/lora_cycle.py", [str(folder), str(tmp_path)])
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(next(line for line in done.stdout.splitlines() if "RESULT " in line).split("RESULT ", 1)[1])
    seen = torch.load(tmp_path / "seen.pt")
    sent, raw = seen["sent"], seen["raw"]

    assert result["adapters"] and not any("layers.1.mlp" in name for name in result["adapters"])
    assert result["sft_moved"] == result["moved"] == result["adapters"]
    assert result["optimized"] == result["adapter_numel"]         # only adapters have optimizer state
    assert result["sft_norm"] > 0 and result["rl_norm"] > 0
    assert result["kept"] == [] and result["resumed_differently"] == []

    for name, value in sent.items():
        inside = name.removesuffix(".weight") + ".base_layer.weight"
        if inside in raw:
            a, b = (raw[name.removesuffix("weight") + f"lora_{x}.default.weight"] for x in "AB")
            torch.testing.assert_close(value, raw[inside] + 2.0 * b @ a, atol=1e-6, rtol=0)
        elif name != "lm_head.weight":
            assert torch.equal(value, raw[name])
    assert torch.equal(sent["lm_head.weight"], sent["model.language_model.embed_tokens.weight"])
    assert result["parity"] < 1e-4
    check_export(tmp_path / "model", folder, sent, seen["log_probs"])
    adapter = load_file(tmp_path / "model" / "adapter" / "adapter_model.safetensors")
    names = {name: f"base_model.model.{name.replace('.default.', '.')}" for name in raw if ".lora_" in name}
    assert set(adapter) == set(names.values()) and all(torch.equal(adapter[peft], raw[name]) for name, peft in names.items())

    assert result["frozen_norm"] > 0
    free = [n for n in result["all"] if ".visual." not in n and "embed_tokens" not in n]
    assert result["frozen_moved"] == free


def check_export(exported: Path, folder: Path, sent: dict[str, torch.Tensor], log_probs: torch.Tensor) -> None:
    """An ordinary folder: plain names, what was sent, and the policy's log-probs."""

    from family_cycle import rows
    from safetensors import safe_open

    with safe_open(exported / "model.safetensors", "pt") as file:
        assert all(torch.equal(file.get_tensor(name), sent[name]) for name in file.keys())
        assert set(file.keys()) == set(sent) - {"lm_head.weight"}
    chat = load_chat_format(str(exported), MIN_PIXELS, MAX_PIXELS)
    spec = build_packing(Config.model_validate({"model": {"path": str(exported)}}), chat)
    plain = load_policy_model(ModelConfig(path=str(exported), attention="sdpa"), torch.float32).eval()
    micro = pack(rows(chat, 0), spec)
    with torch.no_grad():
        inputs = model_inputs(micro, chat.image_token_id, torch.device("cpu"), torch.float32)
        again = plain(**inputs, job=LogProbs(())(micro))[0]
    torch.testing.assert_close(again, log_probs, atol=1e-5, rtol=0)
