"""Model folders as people have them: whatever is wrong is one line that names folder and file or tensor, before any loading."""
from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import TINY, save_tiny

from hdpo.adapters.chat_format import open_chat
from hdpo.adapters.model_folder import INDEX, check_model_folder, find_model, read_config
from hdpo.config import Config, ModelConfig
from hdpo.doctor.doctor import check_model
from hdpo.errors import ModelError

SINGLE = "model.safetensors"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], Path]:
    made: dict[tuple[str, bool], Path] = {}

    def folder(kind: str, tied: bool) -> Path:
        if (kind, tied) not in made:
            made[kind, tied] = save_tiny(kind, tmp_path_factory.mktemp(f"{kind}_{tied}"), tied=tied)
        return made[kind, tied]
    return folder


@pytest.fixture
def copy(folders: Callable[[str, bool], Path], tmp_path: Path) -> Path:
    """A Qwen3-VL with a head of its own, in two shards and an index."""
    folder = tmp_path / "model"
    shutil.copytree(folders("qwen3_vl", False), folder)
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, held in shards.items():
        save_file({name: tensors[name] for name in held}, folder / file, {"format": "pt"})
    places = {name: file for file, held in shards.items() for name in held}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change tensors, in whichever file they are."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, {"format": "pt"})


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as error:
        check_model_folder(str(folder))
    line = str(error.value)
    assert "\n" not in line and str(folder) in line
    with pytest.raises(ModelError, match="model.path"):      # `--dry-run` says the same
        check_model(Config.model_validate({"model": {"path": str(folder)}}))
    return line


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", sorted(TINY))
def test_a_whole_folder_of_every_family_passes_and_one_without_any_tensor_is_told_which(
        folders: Callable[[str, bool], Path], tmp_path: Path, kind: str, tied: bool) -> None:
    folder = folders(kind, tied)
    assert check_model_folder(str(folder)).model_type == kind
    lacking = tmp_path / "lacking"
    shutil.copytree(folder, lacking)
    tensors = load_file(lacking / SINGLE)
    for name in [next(n for n in tensors if "mlp.down_proj" in n or "experts.down_proj" in n), "model.norm.weight"]:
        name = next(n for n in tensors if n.endswith(name.removeprefix("model.")))
        save_file({key: value for key, value in tensors.items() if key != name}, lacking / SINGLE, {"format": "pt"})
        assert "lacks" in refusal(lacking) and name.rsplit(".", 2)[-2] in refusal(lacking)


@pytest.mark.parametrize("part", ["visual.blocks.0.mlp", "language_model.layers.1.mlp.up_proj", "lm_head"])
def test_a_tensor_that_no_shard_holds_is_named(copy: Path, part: str) -> None:
    edit(copy, lambda tensors: [tensors.pop(name) for name in list(tensors) if part in name])
    line = refusal(copy)
    assert "lacks" in line and part in line
    assert ("tie_word_embeddings" in line) == (part == "lm_head")


def test_a_shard_that_the_index_names_and_is_not_there_is_named(copy: Path) -> None:
    (copy / "model-00002-of-00002.safetensors").unlink()
    assert "lacks model-00002-of-00002.safetensors, which model.safetensors.index.json names" in refusal(copy)


def test_a_tensor_of_another_shape_is_named_with_both(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 96
    (copy / "config.json").write_text(json.dumps(config))
    line = refusal(copy)
    assert "mlp" in line and "128" in line and "96" in line and "more tensors differ" in line


def test_a_tensor_without_a_place_is_named_but_known_leftovers_are_not(copy: Path) -> None:
    edit(copy, lambda tensors: tensors.update({"model.language_model.rotary_emb.inv_freq": torch.ones(4)}))
    check_model_folder(str(copy))
    edit(copy, lambda tensors: tensors.update({"v_head.weight": torch.ones(4)}))
    assert "holds v_head.weight, for which its config.json has no place" in refusal(copy)


def test_ties_that_text_config_alone_names_are_understood(folders: Callable[[str, bool], Path], tmp_path: Path) -> None:
    folder = tmp_path / "tied"
    shutil.copytree(folders("qwen3_vl", True), folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("tie_word_embeddings", None)
    config["text_config"]["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(config))
    assert "lm_head.weight" not in load_file(folder / SINGLE)
    assert check_model_folder(str(folder)).tie_word_embeddings
    from hdpo.adapters.policy_model import load_policy_model
    model = load_policy_model(ModelConfig(path=str(folder)), torch.float32).model
    assert model.lm_head.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("file", ["model-00001-of-00002.safetensors", "tokenizer.json", "config.json"])
def test_a_git_lfs_pointer_is_said_to_be_one(copy: Path, file: str) -> None:
    (copy / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4967215360\n")
    line = refusal(copy)
    assert f"{copy}/{file} is a git-lfs pointer" in line and "git lfs pull" in line


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def cut_in_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


def web_page(path: Path) -> None:
    path.write_text("<!doctype html><html>401 Unauthorized</html>")


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("harm", [cut, cut_in_header, web_page, empty])
def test_a_shard_that_is_cut_off_or_something_else_is_named(copy: Path, harm: Callable[[Path], None]) -> None:
    harm(copy / "model-00001-of-00002.safetensors")
    line = refusal(copy)
    assert "model-00001-of-00002.safetensors" in line and "download it again" in line


@pytest.mark.parametrize("left", [(), ("vocab.json", "merges.txt")])
def test_a_missing_tokenizer_json_names_folder_and_file(copy: Path, left: tuple[str, ...]) -> None:
    vocabulary = json.loads((copy / "tokenizer.json").read_text())["model"]["vocab"]
    (copy / "tokenizer.json").unlink()
    for name in left:
        (copy / name).write_text(json.dumps(vocabulary) if name.endswith("json") else "#version: 0.2\n")
    with pytest.raises(ModelError) as error:
        open_chat(ModelConfig(path=str(copy)))
    assert str(copy) in str(error.value) and "tokenizer.json" in str(error.value) and "\n" not in str(error.value)


def test_a_hub_id_says_how_to_get_it_and_is_taken_when_the_cache_has_it(
        copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(ModelError, match="no such folder: Qwen/Tiny-VL, .*`hf download Qwen/Tiny-VL --local-dir FOLDER`"):
        find_model("Qwen/Tiny-VL")
    root = tmp_path / "hub" / "models--Qwen--Tiny-VL"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("0" * 40)
    shutil.copytree(copy, root / "snapshots" / ("0" * 40))
    assert check_model_folder("Qwen/Tiny-VL").model_type == "qwen3_vl"
    with pytest.raises(ModelError, match="no such folder: ./nowhere/at/all"):
        find_model("./nowhere/at/all")


def test_a_config_that_is_no_json_is_one_line(copy: Path) -> None:
    (copy / "config.json").write_text("{")
    with pytest.raises(ModelError, match="config.json can't be read") as error:
        read_config(str(copy))
    assert "\n" not in str(error.value)


def test_a_folder_of_tens_of_gigabytes_is_judged_without_reading_it(copy: Path) -> None:
    """A sparse file of 40 GB: an embedding table and a head nobody would want to read."""
    config = json.loads((copy / "config.json").read_text())
    config["text_config"]["vocab_size"] = rows = 80_000_000
    (copy / "config.json").write_text(json.dumps(config))
    places = {}
    for path in copy.glob("*.safetensors"):
        tensors = load_file(path)
        header, offset = {}, 0
        for name, tensor in tensors.items():
            shape = [rows, tensor.shape[1]] if tensor.shape[0] == 272 else list(tensor.shape)
            end = offset + 4 * torch.Size(shape).numel()
            header[name], offset = {"dtype": "F32", "shape": shape, "data_offsets": [offset, end]}, end
            places[name] = path.name
        text = json.dumps(header).encode()
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + offset)
    started = time.process_time()
    assert check_model_folder(str(copy)).model_type == "qwen3_vl"
    assert time.process_time() - started < 20
    assert sum(path.stat().st_size for path in copy.glob("*.safetensors")) > 40e9
