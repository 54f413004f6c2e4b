"""How the tools of a configuration are shown to the model: a correct call of each, and what it is for."""
from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from hdpo.agent.parse import EXAMPLES
from hdpo.config import ToolsConfig
from hdpo.config.tools import OwnTool

_WHAT = {"python": "python runs code; the pictures are image_1, image_2, ... and what plt.show() draws comes back as a picture",
         "text_search": "text_search looks up facts", "image_search": "image_search says what a picture shows"}
_KINDS: dict[str, Any] = {"string": "...", "integer": 1, "number": 1.5, "boolean": True, "array": [], "object": {}, "null": None}


def own_examples(config: ToolsConfig) -> dict[str, str]:
    """Own tool -> a correct call of it."""
    return {name: _call(name, tool) for name, tool in config.own.items()}


def tools_block(config: ToolsConfig) -> str:
    """A line for each tool on offer: what it is for, and how it is called."""
    lines = [f"- {_WHAT[name]}: {EXAMPLES[name]}" for name in config.allowed]
    for name, example in own_examples(config).items():
        described = config.own[name].description
        lines.append(f"- {name}{': ' if described else ''}{described}{_names(config.own[name].parameters)}: {example}")
    return "\n".join(lines)


def _call(name: str, tool: OwnTool) -> str:
    arguments = example_arguments(tool.parameters) if tool.example is None else tool.example
    return f'<tool_call>{json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)}</tool_call>'


def _names(schema: Mapping[str, Any]) -> str:
    """The arguments that the example does not show, and what any of them is for."""
    properties = schema.get("properties", {})
    told = [f"{name}{' (optional)' * (name not in schema.get('required', ()))}"
            + (f": {' '.join(str(given['description']).split())}" if isinstance(given, dict) and given.get("description") else "")
            for name, given in properties.items()]
    return f" (arguments: {'; '.join(told)})" if told else ""


def example_arguments(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the kinds that a schema asks for; those it requires alone."""
    properties = schema.get("properties", {})
    return {name: _value(properties.get(name, {})) for name in schema.get("required", ())}


def _value(schema: Any) -> Any:
    if not isinstance(schema, dict):
        return "..."
    if schema.get("examples"):
        return schema["examples"][0]
    for name in ("const", "default"):
        if name in schema:
            return schema[name]
    if schema.get("enum"):
        return schema["enum"][0]
    kind = schema.get("type", "string")
    kind = kind[0] if isinstance(kind, list) and kind else kind
    if kind == "object":
        return example_arguments(schema)
    if kind in ("integer", "number") and ("minimum" in schema or "maximum" in schema):
        return schema.get("minimum", schema.get("maximum"))
    return _KINDS.get(kind, "...")
