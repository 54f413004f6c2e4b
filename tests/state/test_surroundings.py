"""config.json of a saved folder says what the model is in the words of both generations of transformers."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hdpo.state.surroundings import config_text, read_side_files

PUBLISHED = {
    "model_type": "qwen3_vl", "tie_word_embeddings": False, "transformers_version": "4.57.0.dev0",
    "text_config": {"rope_theta": 5000000, "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20],
                                                            "rope_type": "default"}, "dtype": "bfloat16", "use_cache": True}}
ROPE = {"rope_type": "default", "rope_theta": 5000000, "mrope_section": [24, 20, 20], "mrope_interleaved": True}


def text_of(tmp_path: Path, source: dict[str, Any], saved: dict[str, Any], full: dict[str, Any]) -> dict[str, Any]:
    (tmp_path / "config.json").write_text(json.dumps(source))
    return json.loads(config_text(tmp_path, saved, full))


def test_the_sources_names_stay_beside_the_new_ones(tmp_path: Path) -> None:
    saved = {"model_type": "qwen3_vl", "dtype": "float32", "transformers_version": "5.19.0",
             "text_config": {"rope_parameters": ROPE, "dtype": "float32"}}
    text = text_of(tmp_path, PUBLISHED, saved, saved)
    assert text["text_config"]["rope_parameters"] == ROPE
    assert text["text_config"]["rope_theta"] == 5000000
    assert text["text_config"]["rope_scaling"] == PUBLISHED["text_config"]["rope_scaling"]      # type: ignore[index]
    assert text["transformers_version"] == "5.19.0" and text["text_config"]["dtype"] == "float32"


def test_a_source_that_knows_only_the_new_names_gets_the_old_ones_too(tmp_path: Path) -> None:
    saved = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "text_config": {"rope_parameters": ROPE}}
    text = text_of(tmp_path, saved, saved, saved)
    assert text["rope_theta"] == 1e6 and text["rope_scaling"] is None
    assert text["text_config"]["rope_scaling"] == {key: value for key, value in ROPE.items() if key != "rope_theta"}


def test_values_are_the_trained_models_and_never_the_sources(tmp_path: Path) -> None:
    source = {"torch_dtype": "bfloat16", "output_router_logits": True, "tie_word_embeddings": False, "kept": {"a": 1}}
    saved = {"dtype": "float32", "tie_word_embeddings": True}
    text = text_of(tmp_path, source, saved, {**saved, "output_router_logits": False})
    assert text == {"dtype": "float32", "torch_dtype": "float32", "output_router_logits": False, "tie_word_embeddings": True,
                    "kept": {"a": 1}}


@pytest.mark.parametrize("settings", ['{"do_sample": false, "temperature": 0.9}', '{"pad_token_id": 1}', "{ not even JSON"])
def test_side_files_are_the_sources_own_bytes_whatever_a_library_thinks_of_them(tmp_path: Path, settings: str) -> None:
    (tmp_path / "generation_config.json").write_text(settings)
    for name in ("config.json", "model.safetensors.index.json", "model.safetensors", "README.md", "chat_template.jinja"):
        (tmp_path / name).write_text(name)
    (tmp_path / "folder.json").mkdir()
    assert read_side_files(tmp_path) == {
        "generation_config.json": settings.encode(), "chat_template.jinja": b"chat_template.jinja"}
