"""The model folder that is asked: with its run's settings, tools and system prompt, where it is a run's."""
from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hdpo.compose.own_tools import with_mcp_tools
from hdpo.config import Config
from hdpo.config.file import add_config_options, load_config
from hdpo.errors import InfrastructureError, ModelError, UserError

if TYPE_CHECKING:
    from hdpo.assistant.session import Question


@dataclass(frozen=True, slots=True)
class Asked:
    """`system` is one message, or none for an empty system prompt."""

    config: Config
    system: list[dict[str, str]]
    temperature: float

    def question(self, messages: list[dict[str, str]], images: Sequence[bytes], temperature: float | None = None,
                 max_tokens: int = 0, seed: int | None = None) -> Question:
        from hdpo.assistant.session import Question
        return Question(messages, tuple(images), self.temperature if temperature is None else temperature, max_tokens,
                        random.getrandbits(31) if seed is None else seed)


@contextmanager
def scratch_folder(prefix: str) -> Iterator[Path]:
    """For the logs of what is started. They go at the end, but for an error of the world, which names one of them."""
    folder, kept = Path(tempfile.mkdtemp(prefix=prefix)), False
    try:
        yield folder
    except InfrastructureError:
        kept = True
        raise
    finally:
        if not kept:
            shutil.rmtree(folder, ignore_errors=True)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, type=Path, metavar="FOLDER",
                        help="model folder; a run's checkpoint brings that run's settings, tools and system prompt")
    parser.add_argument("--system", type=Path, metavar="FILE", help="system prompt, instead of the run's or hdpo's own")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="from 0 (%(default)s: greedy) to 2")
    add_config_options(parser)


def read_model(options: argparse.Namespace, scratch: Path) -> Asked:
    """Raises UserError, one line, before anything is loaded. `scratch` holds the tool server's log."""
    if not (options.model / "config.json").is_file():
        raise ModelError(f"--model {options.model}: no config.json there, so it is no model folder")
    if not 0 <= options.temperature <= 2:
        raise UserError(f"--temperature {options.temperature}: from 0 to 2")
    run = _run_of(options.model)
    own = [str(run / "config.yaml")] if run else []
    ours = [f"model.path={options.model}", "rollout.tensor_parallel=1", f"run.folder={scratch}", "run.name=ask"]
    said = load_config(options.config, [*ours, *options.overrides])      # by who asks, not by the run
    config = _within_context(load_config([*own, *options.config], [*ours, *options.overrides]), said)
    config = _beside_the_run(config, said, run) if run else config
    config = config if config.tools.url or "allowed" in said.tools.model_fields_set else _with_sources(config)
    config = with_mcp_tools(config)
    return Asked(config, _system(options, config, run), options.temperature)


def _run_of(model: Path) -> Path | None:
    """The folder of the run that wrote this checkpoint."""
    run = model.absolute().parent.parent
    return run if model.absolute().parent.name in ("checkpoints", "weights") and (run / "config.yaml").is_file() else None


def _beside_the_run(config: Config, said: Config, run: Path) -> Config:
    """The run names its files from the folder that it was started in; those that lie with it are found wherever it lies now.

    An index that is nowhere any more is left out, and said.
    """
    tools = {}
    for field in {"text_index", "image_index", "image_cache"} - said.tools.model_fields_set:
        if path := getattr(config.tools, field):
            tools[field] = found if Path(found := beside(run, path)).exists() else ""
            if not tools[field]:
                print(f"hdpo: tools.{field}: no such file or folder any more: {path}", file=sys.stderr)
    data = {} if "train" in said.data.model_fields_set else {"train": [beside(run, path) for path in config.data.train]}
    return config.model_copy(update={"tools": config.tools.model_copy(update=tools),
                                     "data": config.data.model_copy(update=data)})


def beside(run: Path, path: str) -> str:
    """A file or folder of a run's settings, where it lies with the run now; `path` as it is where it does not."""
    told = load_config([str(run / "config.yaml")], []).run
    moved = run / os.path.relpath(path, Path(told.folder) / told.name)
    return path if Path(path).is_absolute() and Path(path).exists() or not moved.exists() else str(moved)


def _within_context(config: Config, said: Config) -> Config:
    """Budgets that nobody set are no larger than the positions of the model."""
    try:
        described = json.loads((Path(config.model.path) / "config.json").read_text())
        positions = int((described.get("text_config") or described)["max_position_embeddings"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):    # said when the folder is opened
        return config
    if config.max_model_len <= positions or "max_prompt_tokens" in said.data.model_fields_set or (
            "max_response_tokens" in said.rollout.model_fields_set):
        return config
    response = min(config.rollout.max_response_tokens, positions // 2)
    return config.model_copy(update={
        "data": config.data.model_copy(update={"max_prompt_tokens": positions - response}),
        "rollout": config.rollout.model_copy(update={"max_response_tokens": response})})


def _with_sources(config: Config) -> Config:
    """Tools that have no source are not offered."""
    from hdpo.doctor.doctor import without_source
    lacking = without_source(config)
    for problem in lacking.values():
        print(f"hdpo: not offered: {problem.partition(', or take')[0]}", file=sys.stderr)
    allowed = [name for name in config.tools.allowed if name not in lacking]
    return config.model_copy(update={"tools": config.tools.model_copy(update={"allowed": allowed})})


def _system(options: argparse.Namespace, config: Config, run: Path | None) -> list[dict[str, str]]:
    if options.system is not None:
        if not options.system.is_file():
            raise UserError(f"--system {options.system}: no such file")
        text = options.system.read_text(encoding="utf-8", errors="replace").strip()
        return [{"role": "system", "content": text}] if text else []
    trained = _first_system(config.data.train) if run else ""
    if trained:
        return [{"role": "system", "content": trained}]
    from hdpo.evaluation.prompts import system_prompt
    return [{"role": "system", "content": system_prompt(config.tools)}]


def _first_system(files: Sequence[str]) -> str:
    """The system prompt of the first training row, where that is a Parquet file which is still there."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    for file in (Path(name) for name in files if name.endswith(".parquet") and Path(name).is_file()):
        try:
            with pq.ParquetFile(file) as rows:
                column = next(name for name in ("prompt", "messages") if name in rows.schema_arrow.names)
                first = next(rows.iter_batches(batch_size=1, columns=[column])).to_pylist()[0][column]
            return next(message["content"] for message in first if message["role"] == "system")
        except (StopIteration, OSError, pa.ArrowException, KeyError, TypeError):   # no such row: nothing to take over
            continue
    return ""
