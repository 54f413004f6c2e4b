"""A Hugging Face model folder before anything is loaded from it: what is missing, cut off, of another shape or not there at all.

Everything is read from config.json and the headers of the safetensors files, so that a folder of any size is judged in seconds.
Which tensor a model needs, and under which names a folder may hold it, transformers itself says: it loads tensors that have a
shape and no contents (the meta device) by the rules it loads real ones by, and reports what it missed.
"""
from __future__ import annotations

import fnmatch
import json
import os
import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from hdpo.adapters import torchvision_shim
from hdpo.errors import ModelError

torchvision_shim.activate()

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText  # noqa: E402

INDEX = "model.safetensors.index.json"
TOKENIZERS = ("tokenizer.json", "vocab.json", "tokenizer.model")
BENIGN = {
    "": ("*.rotary_emb.inv_freq", "*.masked_bias", "*.position_ids", "*.num_batches_tracked"),   # buffers of older versions
    "qwen3_vl_moe": ("mtp.*", "*.mtp.*"),
    "qwen3": ("mtp.*", "*.mtp.*"),
}
"""Tensors that a folder may hold beyond its model, by model_type (empty: any): loading leaves them out, and nothing is lost."""

_POINTER = b"version https://git-lfs"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
           "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
           "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


def find_model(path: str) -> str:
    """The folder that model.path means: itself, or what the hub's cache on this machine holds under that id.

    Raises ModelError that says how to get it.
    """
    if not path:
        raise ModelError("model.path is not set: give --set model.path=FOLDER or MODEL_PATH=FOLDER")
    if Path(path).is_dir():
        return path
    if not _HUB_ID.fullmatch(path):
        raise ModelError(f"model.path: no such folder: {path}")
    from huggingface_hub import snapshot_download
    try:
        return snapshot_download(path, local_files_only=True)
    except (OSError, ValueError):
        raise ModelError(f"model.path: no such folder: {path}, nor is that in the hub's cache here: `hf download {path} "
                         f"--local-dir FOLDER` gets it, then set model.path=FOLDER") from None


def read_config(path: str) -> Any:
    """The configuration, with ties where only text_config names them. Raises ModelError, one line, for what is no model."""
    folder = Path(find_model(path))
    if not (folder / "config.json").is_file():
        raise ModelError(f"model.path: {folder} holds no config.json: not a Hugging Face model folder")
    _no_pointer(folder / "config.json")
    try:
        found = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise ModelError(f"model.path: {folder}/config.json can't be read: {' '.join(str(exc).split())}") from exc
    if getattr(found.get_text_config(), "tie_word_embeddings", False):
        found.tie_word_embeddings = True
    return found


def check_files(path: str) -> Any:
    """The configuration of a folder with a tokenizer, whose files are all themselves. Raises ModelError."""
    found = read_config(path)
    folder = Path(find_model(path))
    for file in sorted(folder.iterdir()):
        if file.is_file():
            _no_pointer(file)
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise ModelError(f"model.path: {folder} lacks tokenizer.json: download it again, with all its files")
    return found


def check_model_folder(path: str) -> Any:
    """The configuration of a folder whose tensors are all there, each of its shape, and no others. Raises ModelError with one
    line that names the folder and the file or tensor."""
    found = check_files(path)
    folder = Path(find_model(path))
    files = _weight_files(folder)
    if files:      # older .bin files say what they hold only when they are loaded
        check_tensors(folder, found, _headers(folder, files))
    return found


def check_tensors(folder: Path, config: Any, held: Mapping[str, tuple[str, list[int]]]) -> None:
    """`held`: name -> (dtype, shape) as the files say. Raises ModelError."""
    from transformers.utils import logging
    tensors = {name: torch.empty(shape, dtype=_DTYPES.get(dtype, torch.uint8), device="meta")
               for name, (dtype, shape) in held.items()}
    auto: Any = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    model_class = auto._model_mapping[type(config)]
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        _, info = model_class.from_pretrained(None, config=config, state_dict=tensors, output_loading_info=True,
                                              device_map={"": "meta"}, ignore_mismatched_sizes=True)
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    kind = getattr(config, "model_type", "")
    unexpected = [name for name in info["unexpected_keys"]
                  if not any(fnmatch.fnmatch(name, pattern) for pattern in (*BENIGN[""], *BENIGN.get(kind, ())))]
    raise_for(folder, info["missing_keys"], unexpected, info["mismatched_keys"])


def raise_for(folder: Path, missing: Iterable[str], unexpected: Iterable[str], mismatched: Iterable[Any]) -> None:
    """What transformers' report says, as a ModelError; nothing when it is empty."""
    wrong = sorted((name, tuple(has), tuple(needs)) for name, has, needs in mismatched)
    if names := sorted(missing):
        hint = ("if it is the embeddings again, set tie_word_embeddings to true in config.json" if names == ["lm_head.weight"]
                else "what is missing would be random; download it again")
        raise ModelError(f"model.path: {folder} lacks {_named(names)}, which its config.json asks for: {hint}")
    if names := sorted(unexpected):
        raise ModelError(f"model.path: {folder} holds {_named(names)}, for which its config.json has no place: these are not the "
                         "weights of this config.json")
    if wrong:
        name, has, needs = wrong[0]
        raise ModelError(f"model.path: {folder}: {name} has shape {list(has)}, config.json asks for {list(needs)}"
                         f"{f', and {len(wrong) - 1} more tensors differ' if len(wrong) > 1 else ''}")


def _named(names: list[str], what: str = "tensor") -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more {what}{'s' if len(names) > 2 else ''}"


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files, those the index names where there is one. Empty for a folder of older .bin files."""
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError) as exc:
            raise ModelError(f"model.path: {index} can't be read: {' '.join(str(exc).split())}") from exc
        if absent := [name for name in names if not (folder / name).is_file()]:
            raise ModelError(f"model.path: {folder} lacks {_named(absent, 'file')}, which {INDEX} names: "
                             "download it again")
        return [folder / name for name in names]
    if found := sorted(folder.glob("*.safetensors")):
        return found
    if not list(folder.glob("pytorch_model*.bin")):
        raise ModelError(f"model.path: {folder} holds no weights (*.safetensors)")
    return []


def _headers(folder: Path, files: Iterable[Path]) -> dict[str, tuple[str, list[int]]]:
    """Name -> (dtype, shape) of all tensors. Raises ModelError for a file that is no safetensors file or is cut off."""
    held: dict[str, tuple[str, list[int]]] = {}
    for path in files:
        size = path.stat().st_size
        try:
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(min(length, size)))
            header.pop("__metadata__", None)
            end = 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
            held |= {name: (tensor["dtype"], tensor["shape"]) for name, tensor in header.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as exc:
            raise ModelError(f"model.path: {path} is not a safetensors file, or cut off ({' '.join(str(exc).split())}): download "
                             "it again") from exc
        if end != size:
            raise ModelError(f"model.path: {path} has {size} bytes and should have {end}: download it again")
    return held


def _no_pointer(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise ModelError(f"model.path: {path} is a git-lfs pointer, not the file: `git lfs pull` in {path.parent} gets it "
                             f"({os.path.getsize(path)} bytes are here)")
