"""`hdpo eval-demo`: three benchmarks in miniature, in published layouts, answered by the demo's checkpoint in both arms.

The rows are held-out puzzles of the embedded world, so that a model that has learned it can answer them: numbers read from
pictures as MathVista, sums and products as DynaMath, codes and badges as LogicVista. Nothing of the real benchmarks is used.
"""
from __future__ import annotations

import argparse
import base64
import csv
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hdpo.data.store import open_rows
from hdpo.errors import UserError
from hdpo.state.checkpoint import step_folders
from hdpo.toyworld import words
from hdpo.toyworld.demo import launch

NAMES = ("mathvista", "dynamath", "logicvista")
_FAMILIES = {"mathvista": ("perception", "fine"), "dynamath": ("arithmetic",), "logicvista": ("search", "identity")}
_FILES = {"mathvista": "MathVista_MINI.tsv", "dynamath": "DynaMath.tsv", "logicvista": "LogicVista.tsv"}
VARIANTS = 10


def main(argv: Sequence[str]) -> int:
    """Raises UserError where there is no demo to evaluate."""
    parser = argparse.ArgumentParser(prog="hdpo eval-demo", description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="folder of the demo (%(default)s)")
    parser.add_argument("--model", type=Path, help="model folder (default: the demo's last checkpoint)")
    parser.add_argument("--rows", type=int, default=40, help="questions of each benchmark (%(default)s)")
    parser.add_argument("--samples", type=int, default=4, help="answers per question and arm (%(default)s)")
    parser.add_argument("--ranks", type=int, default=2, help="processes, each with an engine (%(default)s)")
    parser.add_argument("--name", default="eval-demo", help="name of the run inside the demo's folder (%(default)s)")
    options = parser.parse_args(argv)
    world, checkpoints = options.run / "world", step_folders(options.run)
    if not (world / "val.parquet").is_file():
        raise UserError(f"{options.run} holds no demo: `make demo` first, or name its folder with --run")
    if options.model is None and not checkpoints:
        raise UserError(f"{options.run} holds no checkpoint: `make demo` first, or name a model folder with --model")
    started = time.monotonic()
    folder = options.run / options.name
    data = folder / "data"
    write_miniatures(world, data, options.rows)
    texts = {"--system": words.SYSTEM, "--system-plain": words.PLAIN_SYSTEM}
    extra = ["--benchmarks", ",".join(NAMES), "--data", str(data), "--samples", str(options.samples), "--arms", "tools,no_tools",
             "--bare"]
    for flag, text in texts.items():
        path = data / f"{flag.removeprefix('--')}.txt"
        path.write_text(text)
        extra += [flag, str(path)]
    launch("eval", "demo_rl.yaml", options.ranks, [
        f"run.folder={options.run}", f"run.name={options.name}", f"model.path={options.model or checkpoints[-1]}",
        f"tools.text_index={world / 'facts.sqlite'}", f"tools.image_index={world / 'badges'}"], extra)
    print(f"\n{(time.monotonic() - started) / 60:.1f} minutes")
    return 0


def write_miniatures(world: Path, data: Path, rows: int) -> None:
    """NAME/FILE.tsv of each benchmark, `rows` questions each, from the demo's held-out rows."""
    held: dict[str, list[dict[str, Any]]] = {name: [] for name in NAMES}
    for row in open_rows([str(world / "val.parquet")]):
        family = row["data_source"].removeprefix("toy/")
        name = next((name for name in NAMES if family in _FAMILIES[name]), None)
        if name is not None and len(held[name]) < rows:
            held[name].append(_published(name, len(held[name]), family, row))
    for name, found in held.items():
        path = data / name / _FILES[name]
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(found[0]), delimiter="\t")
            writer.writeheader()
            writer.writerows(found)


def _published(name: str, number: int, family: str, row: dict[str, Any]) -> dict[str, Any]:
    question = row["prompt"][-1]["content"].replace("<image>", "").strip()
    picture = base64.b64encode(row["images"][0]["bytes"]).decode() if row["images"] else ""
    shown: dict[str, Any] = {"index": number, "question": question, "answer": row["reward_model"]["ground_truth"],
                             "image": picture}
    if name == "mathvista":
        return shown | {"answer_type": "integer", "precision": "", "choices": "", "unit": "", "task": family}
    if name == "dynamath":
        return shown | {"qid": number // VARIANTS, "varid": number % VARIANTS + 1, "answer_type": "float",
                        "subject": "arithmetic",
                        "knowledge_level": "needs a tool" if row["extra_info"]["tool_needed"] else "needs none"}
    return shown | {"skill": family}
