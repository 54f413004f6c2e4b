"""What stands behind a path, as a short text: equal for the same content wherever it lies.

A run that goes on may find its model and its data on another mount, and must notice when what lies there is not the same.
Files of up to WHOLE bytes are read whole; of larger ones the size, the end (where Parquet keeps its offsets and safetensors
its last tensor) and blocks spread evenly over the file: seconds for hundreds of GB, and a file that was written again differs
in them.
"""
from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

WHOLE, BLOCK, BLOCKS = 64 << 20, 64 << 10, 128

MODEL_FILES = ("*.safetensors", "pytorch_model*.bin", "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template*",
               "preprocessor_config.json")
"""What makes a model folder the same model; generation settings and READMEs don't count."""


def of_file(path: Path) -> str:
    """Raises OSError."""
    size, digest = path.stat().st_size, hashlib.sha256()
    with path.open("rb") as file:
        if size <= WHOLE:
            while block := file.read(1 << 20):
                digest.update(block)
        else:
            for number in range(BLOCKS):
                file.seek((size - BLOCK) * number // (BLOCKS - 1))
                digest.update(file.read(BLOCK))
    return f"{size}-{digest.hexdigest()[:24]}"


def of_model(folder: str | os.PathLike[str]) -> str:
    """Raises OSError."""
    root = Path(folder)
    return _joined(sorted({path for pattern in MODEL_FILES for path in root.glob(pattern)}), root)


def of_data(path: str) -> str:
    """A file, a folder of files, or a pattern; what is neither (a data set's name) stands for itself. Raises OSError."""
    place = Path(path)
    if place.is_dir():
        return _joined(sorted(file for file in place.rglob("*") if file.is_file()), place)
    if place.exists():
        return of_file(place)
    return " ".join(of_file(Path(file)) for file in sorted(glob.glob(path))) or f"name {path}"


def _joined(files: Iterable[Path], root: Path) -> str:
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(root)} {of_file(path)}\n".encode())
    return digest.hexdigest()[:24]
