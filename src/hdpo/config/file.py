"""Where settings come from and go to: YAML files, the reference's environment variables, and `--set a.b=c`.

Text fields keep what was written (`--set run.name=1e5` is text), a key given twice is an error, and every message names
who said it: the file and its line, the `--set`, or the environment variable.
"""
from __future__ import annotations

import argparse
import difflib
import os
import re
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from hdpo.config import Config
from hdpo.config.hints import hint
from hdpo.config.shipped import launch_folder, shipped_file
from hdpo.config.types import is_section
from hdpo.config.yaml import Document, field_paths, is_text, kinds, line_of, unknown
from hdpo.errors import ConfigError, UserError

ENVIRONMENT = {
    "MODEL_PATH": "model.path", "TRAIN_DATA": "data.train", "VAL_DATA": "data.val", "JUDGE_BASE_URL": "judge.base_url",
    "JUDGE_MODEL": "judge.model", "SEARCH_PROVIDER": "tools.search_provider", "REMOTE_TOOL_SERVER_URL": "tools.url",
}
"""Environment variables of the reference and the field each one fills when the configuration leaves it at its default.

Secrets (JUDGE_API_KEY, SERPER_API_KEY, ...) are deliberately absent: they are read where they are used and never
become part of a configuration, a log or a dump.
"""


class _Given:
    """All that was said, later over earlier, and by whom."""

    def __init__(self) -> None:
        self._tree: dict[str, Any] = {}
        self._who: dict[str, tuple[str, str]] = {}     # field -> who said it and " (line 3)"; the latest is last

    def put(self, path: str, value: Any, who: str, where: str = "") -> None:
        *sections, leaf = path.split(".")
        tree = self._tree
        for section in sections:
            tree = tree.setdefault(section, {})
        tree[leaf] = value
        self._who.pop(path, None)
        self._who[path] = (who, where)

    def validated(self) -> Config:
        try:
            return Config.model_validate(self._tree)
        except ValidationError as exc:
            first = exc.errors()[0]
        path = ".".join(str(part) for part in first["loc"])
        problem = _problem(first)
        # a contradiction belongs to no field: the last one said of those it names
        named = [name for name in self._who if path == name or path.startswith(f"{name}.")] or [
            name for name in self._who if re.search(rf"(?<![\w.]){re.escape(name)}(?![\w.])", problem)]
        who, where = self._who[named[-1]] if named else ("configuration", "")
        shown = f" (got {reprlib.repr(first['input'])})" if path else ""
        raise ConfigError(f"{who}: {path + ': ' if path else ''}{problem}{shown}{where}") from None


def _problem(error: ErrorDetails) -> str:
    message, given = error["msg"].removeprefix("Value error, "), error["input"]
    if error["type"] == "list_type" and isinstance(given, str):
        return f"expected a list: {'.'.join(str(part) for part in error['loc'])}=[{given}]"
    if error["type"] == "literal_error":
        close = difflib.get_close_matches(str(given).lower(), re.findall(r"'([^']*)'", message), n=1)
        return message + (f"; did you mean {close[0]}?" if close else "")
    return message


def load_config(files: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None,
                overrides: Sequence[str] = (), environment: dict[str, str] | None = None) -> Config:
    """Environment variables of the reference, under YAML files, each under the next, under `a.b=c` overrides.

    A file that isn't there is looked for among the shipped ones, by its name. Raises ConfigError with one line that names
    who said it, the key and the nearest known key.
    """
    given = _Given()
    env = os.environ if environment is None else environment
    for variable, field in ENVIRONMENT.items():
        if env.get(variable):
            given.put(field, _from_environment(field, env[variable]), f"environment variable {variable}")
    for file in [files] if isinstance(files, (str, os.PathLike)) else files or ():
        _add_file(given, str(file))
    for item in overrides:
        _add_override(given, item)
    return given.validated()


def _from_environment(path: str, text: str) -> Any:
    if path in ("data.train", "data.val"):   # the reference writes "[a.parquet,b.parquet]"
        return [part.strip().strip("'\"") for part in text.strip().strip("[]").split(",") if part.strip()]
    return text


def _add_file(given: _Given, name: str) -> None:
    try:
        text = _find(name).read_text(encoding="utf-8")
    except (OSError, ValueError) as exc:   # ValueError: not UTF-8, or no path
        raise ConfigError(f"{name} is not a readable YAML file ({getattr(exc, 'strerror', None) or exc}); "
                          f"shipped ones are {_shipped()}") from None
    try:
        source = Document(text)
        for path, node in source.fields(source.root):
            given.put(path, source.value(node, kinds()[path]), name, f" (line {line_of(node)})")
    except ConfigError as exc:
        raise ConfigError(f"{name}: {exc}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as exc:
        raise ConfigError(f"{name}: not valid YAML: {_reason(exc)}") from None


def _find(name: str) -> Path:
    file = Path(name)
    if file.exists():
        return file
    shipped = shipped_file(name, "configs")
    if shipped is None:
        raise ConfigError(f"{name}: no such configuration file; shipped ones are {_shipped()}")
    return shipped


def _shipped() -> str:
    return ", ".join(sorted(file.stem for file in (launch_folder() / "configs").glob("*.yaml")))


def _add_override(given: _Given, item: str) -> None:
    key, equals, text = item.partition("=")
    who = f"--set {''.join(c if c.isprintable() else repr(c)[1:-1] for c in item)}"     # one line whatever it holds
    if not equals:
        raise ConfigError(f"{who}: expected KEY=VALUE, for example --set hdpo.w_tool=0.1")
    if key not in kinds():
        raise ConfigError(f"{who}: {unknown(key)}")
    if is_text(kinds()[key]) and not (len(text) > 1 and text[0] == text[-1] and text[0] in "'\""):
        given.put(key, text, who)
        return
    try:
        source = Document(text)
        given.put(key, source.value(source.root, kinds()[key]), who)
    except ConfigError as exc:
        raise ConfigError(f"{who}: {key}: {exc}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as exc:
        raise ConfigError(f"{who}: {key}: not valid YAML: {_reason(exc)}") from None


def _reason(problem: Exception) -> str:
    return "nested too deeply" if isinstance(problem, RecursionError) else " ".join(str(problem).split())


def dump_config(config: Config) -> str:
    """YAML with every field, in order; reading it back gives the same configuration."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def describe_fields(section: type[BaseModel] = Config, prefix: str = "") -> list[tuple[str, Any, str]]:
    """(dotted name, default, description) of every leaf field: the table of settings in --help and README."""
    rows: list[tuple[str, Any, str]] = []
    for name, info in section.model_fields.items():
        kind = info.annotation
        if is_section(kind):
            rows += describe_fields(kind, f"{prefix}{name}.")
        else:
            rows.append((prefix + name, info.get_default(call_default_factory=True), info.description or ""))
    return rows


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """--config and --set, as every command takes them that needs a run's settings."""
    parser.add_argument("--config", action="append", default=[], metavar="FILE",
                        help="YAML file, or the name of a shipped one such as metis_8b_rl (repeatable: the later wins)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
                        help="override one setting, for example --set hdpo.w_tool=0.1 (repeatable)")


def parse_run(command: str, description: str, argv: Sequence[str]) -> tuple[Config, argparse.Namespace]:
    """The configuration of `hdpo COMMAND`, and its options print_config, dry_run and steal_lock. Raises ConfigError."""
    parser = argparse.ArgumentParser(prog=f"hdpo {command}", description=description,
                                     epilog="`hdpo settings` lists every setting with its default and meaning.")
    add_config_options(parser)
    parser.add_argument("--print-config", action="store_true", help="print the resulting configuration as YAML and end")
    parser.add_argument("--dry-run", action="store_true", help="check data, model folder, tools and judge, then end")
    parser.add_argument("--steal-lock", action="store_true", help="take the run's folder over from a process that is known to "
                        "be gone, for example with its machine; one that still lives writes no more checkpoints")
    options = parser.parse_args(argv)
    return load_config(options.config, options.overrides), options


def main(argv: Sequence[str]) -> int:
    """`hdpo settings`."""
    parser = argparse.ArgumentParser(prog="hdpo settings", description="Settings, their defaults and their meaning.")
    parser.add_argument("words", nargs="*", metavar="WORD",
                        help="a section (optim), a field (optim.lr) or words that its name or meaning holds; without, all")
    words = [word.lower() for word in parser.parse_args(argv).words]
    shown = [row for row in describe_fields() if all(_is_about(row, word) for word in words)]
    if not shown:
        raise UserError(f"no setting is about {' '.join(words)}{hint(words[0], field_paths(), list(Config.model_fields))}")
    for path, default, description in shown:
        print(f"{path:34} {default!r:28} {description}")
    return 0


def _is_about(row: tuple[str, Any, str], word: str) -> bool:
    path, _, description = row
    section = word.removesuffix(".")
    return path.startswith(f"{section}.") if section in Config.model_fields else word in f"{path} {description}".lower()
