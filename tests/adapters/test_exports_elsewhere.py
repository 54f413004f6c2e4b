"""Folders that a run saves mean the same model to the transformers that Qwen3-VL was published with, to today's, and to vLLM."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from launching import ROOT
from tiny_models import save_tiny

pytestmark = [pytest.mark.engine, pytest.mark.slow]

OLD = ["transformers==4.57.6", "tokenizers==0.22.2", "huggingface_hub==0.36.0"]
THETA = 1_000_000


@pytest.fixture(scope="module")
def old_transformers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The old packages in a folder that goes before the environment's own."""
    folder = tmp_path_factory.mktemp("transformers4")
    done = subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *OLD],
                          capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"transformers 4.57.6 can't be installed here: {(done.stderr.splitlines() or [''])[-1]}")
    return folder


def published(kind: str, folder: Path, form: str) -> Path:
    """A tiny model whose config.json is in the words of transformers 4 (as on the hub) or 5."""
    save_tiny(kind, folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for section in (config, config.get("text_config", {})):
        if rope := section.get("rope_parameters"):
            rope["rope_theta"] = THETA
            if form == "4":
                del section["rope_parameters"]
                section["rope_theta"] = rope.pop("rope_theta")
                section["rope_scaling"] = rope if len(rope) > 1 else None
    path.write_text(json.dumps(config))
    return folder


def log_probs(folder: Path, packages: Path | None = None) -> tuple[str, list[float]]:
    environment = os.environ | ({"PYTHONPATH": str(packages)} if packages else {})
    done = subprocess.run([sys.executable, str(ROOT / "tests/support/folder_log_probs.py"), str(folder)], env=environment,
                          capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.split("RESULT ", 1)[1])
    return result["version"], result["log_probs"]


@pytest.mark.long
@pytest.mark.parametrize("form", ["4", "5"])
@pytest.mark.parametrize("kind", ["qwen3_vl", "qwen3", "qwen2_5_vl"])
def test_a_saved_folder_has_the_same_log_probs_in_both_generations_of_transformers(
        tmp_path: Path, old_transformers: Path, kind: str, form: str) -> None:
    source, saved = published(kind, tmp_path / "source", form), tmp_path / "saved"
    done = subprocess.run([sys.executable, str(ROOT / "tests/support/ranks/export_once.py"), str(source), str(saved)],
                          capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    (new, expected), (new_again, seen), (old, seen_by_old) = (
        log_probs(source), log_probs(saved), log_probs(saved, old_transformers))
    assert new == new_again and new.startswith("5.") and old == "4.57.6"
    assert seen == pytest.approx(expected, abs=1e-5)
    assert seen_by_old == pytest.approx(expected, abs=1e-4)
