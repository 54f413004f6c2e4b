"""What a model folder holds besides its weights: read and tried when a run starts, so that no save can fail because of it.

Tokenizer, templates and generation settings are the source folder's own bytes. config.json says what the trained model is
twice: as transformers 5 writes it, and under the names that the source folder and transformers 4 use, because the versions a
family was published with, evaluation kits and older servers read only those.
"""
from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken")


def read_side_files(source: Path) -> dict[str, bytes]:
    """Name -> contents of what stands beside the weights, but for config.json and indices. Raises OSError."""
    return {file.name: file.read_bytes() for file in sorted(source.iterdir())
            if file.is_file() and file.suffix in SUFFIXES and file.name != "config.json"
            and not file.name.endswith(".index.json")}


def config_text(source: Path, saved: Mapping[str, Any], full: Mapping[str, Any]) -> str:
    """config.json of the trained model. `saved`: what transformers would write; `full`: every value it holds. Raises OSError,
    ValueError."""
    merged = _legacy(_merged(json.loads((source / "config.json").read_text()), saved, full))
    return json.dumps(merged, indent=2, sort_keys=True, default=str) + "\n"


def _merged(source: Mapping[str, Any], saved: Mapping[str, Any], full: Mapping[str, Any]) -> dict[str, Any]:
    """What is saved, and the source's keys that it lacks with the values the model has for them now, sections within too."""
    merged = dict(saved)
    for key, value in source.items():
        now = full.get(key, value)
        if isinstance(value, Mapping) and isinstance(saved.get(key), Mapping):
            merged[key] = _merged(value, saved[key], now if isinstance(now, Mapping) else {})
        elif key not in saved:
            merged[key] = now
    if "torch_dtype" in merged and merged.get("dtype"):
        merged["torch_dtype"] = merged["dtype"]
    return merged


def _legacy(config: dict[str, Any]) -> dict[str, Any]:
    """With rope_theta and rope_scaling where only transformers 5's rope_parameters says them, sections within too."""
    rope = config.get("rope_parameters")
    if isinstance(rope, Mapping) and "rope_theta" in rope:
        rest = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
        config["rope_theta"] = rope["rope_theta"]
        if not config.get("rope_scaling"):
            config["rope_scaling"] = rest if rest.get("rope_type", "default") != "default" or len(rest) > 1 else None
    for section in config.values():
        if isinstance(section, dict):
            _legacy(section)
    return config
