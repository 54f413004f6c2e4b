"""Where settings come from and go to: YAML files, the reference's environment variables, and `--set a.b=c`."""
from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from hdpo.config import Config, Section
from hdpo.errors import ConfigError

ENVIRONMENT = {
    "MODEL_PATH": "model.path", "TRAIN_DATA": "data.train", "VAL_DATA": "data.val", "JUDGE_BASE_URL": "judge.base_url",
    "JUDGE_MODEL": "judge.model", "SEARCH_PROVIDER": "tools.search_provider", "REMOTE_TOOL_SERVER_URL": "tools.url",
}
"""Environment variables of the reference and the field each one fills when the configuration leaves it at its default.

Secrets (JUDGE_API_KEY, SERPER_API_KEY, ...) are deliberately absent: they are read where they are used and never
become part of a configuration, a log or a dump.
"""


def field_paths(section: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Dotted names of all leaf fields, in order."""
    paths: list[str] = []
    for name, info in section.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            paths += field_paths(kind, f"{prefix}{name}.")
        else:
            paths.append(prefix + name)
    return paths


def _nearest(path: str) -> str:
    known = field_paths() + list(Config.model_fields)
    close = difflib.get_close_matches(path, known, n=1, cutoff=0.5) or difflib.get_close_matches(
        path.rsplit(".", 1)[-1], [k.rsplit(".", 1)[-1] for k in known], n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; sections are {', '.join(Config.model_fields)}"


def _put(tree: dict[str, Any], path: str, value: Any) -> None:
    *parents, leaf = path.split(".")
    for name in parents:
        tree = tree.setdefault(name, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{path}: {name} is not a section")
    tree[leaf] = value


def _has(tree: dict[str, Any], path: str) -> bool:
    node: Any = tree
    for name in path.split("."):
        if not isinstance(node, dict) or name not in node:
            return False
        node = node[name]
    return True


def _from_environment(path: str, text: str) -> Any:
    if path in ("data.train", "data.val"):   # the reference writes "[a.parquet,b.parquet]"
        return [part.strip().strip("'\"") for part in text.strip().strip("[]").split(",") if part.strip()]
    return text


def _validate(tree: dict[str, Any], source: str) -> Config:
    try:
        return Config.model_validate(tree)
    except ValidationError as exc:
        first = exc.errors()[0]
        path = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise ConfigError(f"{source}: unknown key {path}{_nearest(path)}") from None
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "list_type":
            message = f"expected a list: {path}=[{first['input']}]"
        given = "" if not path else f" (got {first['input']!r})"
        raise ConfigError(f"{source}: {path + ': ' if path else ''}{message}{given}") from None


def load_config(path: str | os.PathLike[str] | None, overrides: list[str] | tuple[str, ...] = (),
                environment: dict[str, str] | None = None) -> Config:
    """Read YAML, then environment variables of the reference for fields it leaves out, then `a.b=c` overrides.

    Raises ConfigError with one line that names the file, the key and the nearest known key.
    """
    tree: dict[str, Any] = {}
    source = str(path) if path else "configuration"
    if path:
        try:
            tree = yaml.safe_load(Path(path).read_text()) or {}
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such configuration file; launch/configs has examples") from None
        except (OSError, UnicodeDecodeError) as exc:
            raise ConfigError(f"{path} is not a readable YAML file ({getattr(exc, 'strerror', None) or exc}); launch/configs has "
                              "examples") from None
        except yaml.YAMLError as exc:
            raise ConfigError(f"{path}: not valid YAML: {' '.join(str(exc).split())}") from None
        if not isinstance(tree, dict):
            raise ConfigError(f"{path}: expected a mapping of sections at the top level")
    env = dict(os.environ if environment is None else environment)
    for variable, field in ENVIRONMENT.items():
        if env.get(variable) and not _has(tree, field):
            _put(tree, field, _from_environment(field, env[variable]))
    for item in overrides:
        key, eq, text = item.partition("=")
        if not eq:
            raise ConfigError(f"--set {item}: expected KEY=VALUE, for example --set hdpo.w_tool=0.1")
        if key not in field_paths():
            raise ConfigError(f"--set {item}: unknown key {key}{_nearest(key)}")
        _put(tree, key, yaml.safe_load(_float_friendly(text)))
    return _validate(tree, source)


def _float_friendly(text: str) -> str:
    """YAML 1.1 reads 1e-6 as a string; write it so that it is a number."""
    try:
        return repr(float(text)) if "e" in text.lower() and not text.lower().startswith("0x") else text
    except ValueError:
        return text


def dump_config(config: Config) -> str:
    """YAML with every field, in order; reading it back gives the same configuration."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def describe_fields(section: type[BaseModel] = Config, prefix: str = "") -> list[tuple[str, Any, str]]:
    """(dotted name, default, description) of every leaf field: the table of settings in --help and README."""
    rows: list[tuple[str, Any, str]] = []
    for name, info in section.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            rows += describe_fields(kind, f"{prefix}{name}.")
        else:
            rows.append((prefix + name, info.get_default(call_default_factory=True), info.description or ""))
    return rows


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """--config and --set, as every command takes them that needs a run's settings."""
    parser.add_argument("--config", help="YAML file; see launch/configs")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
                        help="override one setting, for example --set hdpo.w_tool=0.1 (repeatable)")


def parse_run(command: str, description: str, argv: Sequence[str]) -> tuple[Config, argparse.Namespace]:
    """The configuration of `hdpo COMMAND`, and its options print_config and dry_run. Raises ConfigError."""
    parser = argparse.ArgumentParser(prog=f"hdpo {command}", description=description,
                                     epilog="`hdpo settings` lists every setting with its default and meaning.")
    add_config_options(parser)
    parser.add_argument("--print-config", action="store_true", help="print the resulting configuration as YAML and end")
    parser.add_argument("--dry-run", action="store_true", help="check data, model folder, tools and judge, then end")
    options = parser.parse_args(argv)
    return load_config(options.config, options.overrides), options


def main(argv: Sequence[str]) -> int:
    """`hdpo settings`."""
    argparse.ArgumentParser(prog="hdpo settings", description="Every setting, its default and its meaning.").parse_args(argv)
    for path, default, description in describe_fields():
        print(f"{path:34} {default!r:28} {description}")
    return 0
