"""YAML documents of settings: which field says what, in which line."""
from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel

from hdpo.config import Config
from hdpo.config.hints import hint
from hdpo.config.types import is_section
from hdpo.errors import ConfigError

_NULL, _MERGE = "tag:yaml.org,2002:null", "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """YAML 1.1, but 1e-6 is a number, as everywhere else."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789"))


def field_paths() -> list[str]:
    """Dotted names of all leaf fields, in order."""
    return list(kinds())


@cache
def kinds(section: type[BaseModel] = Config, prefix: str = "") -> dict[str, Any]:
    """Type of every leaf field by its dotted name."""
    found: dict[str, Any] = {}
    for name, info in section.model_fields.items():
        kind = info.annotation
        found |= kinds(kind, f"{prefix}{name}.") if is_section(kind) else {prefix + name: kind}
    return found


def unknown(key: str) -> str:
    whole = next((field for field, kind in kinds().items() if key.startswith(f"{field}.") and _is_mapping(kind)), None)
    if whole is not None:
        return f"{whole} is set as a whole: {whole}={{{key.removeprefix(whole + '.').split('.')[0]}: ...}}"
    return f"unknown key {key}{hint(key, field_paths(), list(Config.model_fields))}"


def _is_mapping(kind: Any) -> bool:
    return get_origin(kind) is dict or any(get_origin(one) is dict for one in get_args(kind))


class Document:
    """One document of settings: a file, or the value of one `--set`. Raises ConfigError, ValueError and YAMLError."""

    def __init__(self, text: str) -> None:
        self._loader = _Loader(text)
        self.root = self._loader.get_single_node()

    def fields(self, node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, yaml.Node]]:
        """(dotted name, node) of every leaf that says something; `name:` with nothing behind it says nothing."""
        if node is None or node.tag == _NULL:
            return
        if not isinstance(node, yaml.MappingNode):
            what = f"{prefix[:-1]} is a section, expected a mapping" if prefix else "expected a mapping of sections"
            raise ConfigError(f"{what} (line {line_of(node)})")
        self._check_keys(node, prefix)
        self._loader.flatten_mapping(node)
        for key, value in node.value:
            name = prefix + key.value
            if any(known.startswith(f"{name}.") for known in kinds()) and "." not in key.value:
                yield from self.fields(value, f"{name}.")
            elif name not in kinds():
                raise ConfigError(f"{unknown(name)} (line {line_of(key)})")
            elif not prefix:
                section, _, leaf = name.partition(".")
                raise ConfigError(f"{name}: in a file write it in its section, {section}: {{{leaf}: ...}} (line {line_of(key)})")
            elif value.tag != _NULL:
                yield name, value

    def value(self, node: yaml.Node | None, kind: Any) -> Any:
        """A field's value; where `kind` holds text, text is what was written."""
        inside = get_args(kind)
        if isinstance(node, yaml.ScalarNode) and is_text(kind) and node.tag in self._loader.yaml_constructors:
            return node.value
        if isinstance(node, yaml.MappingNode) and is_section(kind):     # inside of a list or a dict
            self._check_keys(node, "")
            self._loader.flatten_mapping(node)
            fields = {name: info.annotation for name, info in kind.model_fields.items()}
            return {key.value: self.value(value, fields.get(key.value)) for key, value in node.value}
        if isinstance(node, yaml.SequenceNode) and get_origin(kind) is list:
            return [self.value(item, inside[0]) for item in node.value]
        if isinstance(node, yaml.MappingNode) and get_origin(kind) is dict:
            self._check_keys(node, "")
            self._loader.flatten_mapping(node)
            return {self.value(key, inside[0]): self.value(value, inside[1]) for key, value in node.value}
        return None if node is None else self._loader.construct_document(node)

    def _check_keys(self, node: yaml.MappingNode, prefix: str) -> None:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError(f"{prefix or 'a key'} must be a word (line {line_of(key)})")
            if key.value in seen:
                raise ConfigError(f"{prefix}{key.value} is given twice (lines {seen[key.value]} and {line_of(key)})")
            if key.tag != _MERGE:
                seen[key.value] = line_of(key)


def is_text(kind: Any) -> bool:
    return kind is str or get_origin(kind) is Literal


def line_of(node: yaml.Node) -> int:
    return node.start_mark.line + 1
