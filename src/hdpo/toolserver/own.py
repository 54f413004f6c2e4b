"""The user's own tools beside a tool server: one `ToolBackend` over both. What they answer passes the same bounds as any answer.

Own tools run in the trainer's process (hdpo.own says why); this file decides whose fault a failure is.
"""
from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from jsonschema.exceptions import SchemaError, ValidationError
from jsonschema.protocols import Validator
from jsonschema.validators import validator_for

from hdpo import oddities, text
from hdpo.agent.parse import ParsedCall, call_error, parse_tool_call
from hdpo.errors import ConfigError, InfrastructureError, ToolServerError
from hdpo.own import BadArguments, ToolContext
from hdpo.protocols import ToolBackend, ToolResult
from hdpo.types import Task

MAX_TEXT_CHARS, MAX_IMAGES, MAX_IMAGE_BYTES = 70_000, 16, 32 << 20
"""Of one answer, as for the model's own code; longer text is cut in its middle, further and larger pictures are left out."""
MAX_ARGUMENT_CHARS = 100_000


class OwnCall(Protocol):
    """Where the calls of one own tool go."""

    async def __call__(self, arguments: dict[str, Any], context: ToolContext) -> Any:
        """A text, a ToolResult or what JSON can say. Raises BadArguments for the policy's mistakes."""
        ...

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Own:
    """One tool. `example` is a correct call of it; `timeout_s` counts from the call's start to its answer."""

    call: OwnCall
    schema: Validator
    example: str
    timeout_s: float


def compiled(schema: dict[str, Any], setting: str) -> Validator:
    """Raises ConfigError for what is no JSON Schema."""
    kind = validator_for(schema)
    try:
        kind.check_schema(schema)
    except SchemaError as exc:
        raise ConfigError(f"{setting}: no JSON Schema: {text.one_line(exc.message)}") from None
    return kind(schema)


class OwnTools:
    """Calls of `tools` are made here, all others go to `backend`."""

    def __init__(self, backend: ToolBackend, tools: Mapping[str, Own]) -> None:
        self._backend, self._tools = backend, tools
        self._examples = {name: tool.example for name, tool in tools.items()}

    async def call(self, trajectory_id: str, action: str, task: Task) -> ToolResult:
        """Raises ToolServerError for every failure but BadArguments."""
        parsed = parse_tool_call(action, own=self._examples)
        if not isinstance(parsed, ParsedCall) or parsed.name not in self._tools:
            return await self._backend.call(trajectory_id, action, task)
        tool, name = self._tools[parsed.name], parsed.name
        context = ToolContext(trajectory_id, task.question, task.images, task.data_source)
        try:
            _check(tool.schema, parsed.arguments)
            async with asyncio.timeout(tool.timeout_s):
                found = await tool.call(parsed.arguments, context)
            return bounded(name, found)
        except BadArguments as exc:
            said = text.valid(str(exc), "tool").strip()[:2000] or "its arguments are not right"
            return ToolResult(call_error(f"{name}: {said}", tool.example), ok=False)
        except TimeoutError:
            raise ToolServerError(f"{name}: no answer within {tool.timeout_s:g} s") from None
        except InfrastructureError as exc:
            raise ToolServerError(f"{name}: {text.one_line(exc)}") from exc
        except Exception as exc:  # noqa: BLE001 - code of the user's: ours, as far as the policy goes
            raise ToolServerError(f"{name}: {type(exc).__name__}: {text.one_line(exc)}") from exc

    def expect(self, trajectory_id: str) -> None:
        self._backend.expect(trajectory_id)

    async def finish(self, trajectory_id: str) -> None:
        await self._backend.finish(trajectory_id)

    async def close(self) -> None:
        for tool in self._tools.values():
            await tool.call.close()
        await self._backend.close()


def _check(schema: Validator, arguments: dict[str, Any]) -> None:
    """Raises BadArguments for what the schema doesn't allow."""
    try:
        if len(json.dumps(arguments, allow_nan=False)) > MAX_ARGUMENT_CHARS:
            raise BadArguments("the arguments are too long")
        error: ValidationError | None = next(iter(schema.iter_errors(arguments)), None)
    except (ValueError, RecursionError):      # NaN, and nesting without end
        raise BadArguments("the arguments are not plain JSON") from None
    if error is not None:
        where = ".".join(str(part) for part in error.absolute_path)
        raise BadArguments(f"{where}{': ' if where else ''}{error.message[:500]}")


def bounded(name: str, found: Any) -> ToolResult:
    """An own tool's answer within the bounds. Raises TypeError for what is none."""
    if not isinstance(found, ToolResult):
        found = ToolResult(found if isinstance(found, str) else json.dumps(found, ensure_ascii=False))
    if not isinstance(found.text, str) or not all(isinstance(image, bytes) for image in found.images):
        raise TypeError("an answer is text, and its images are encoded files (bytes)")
    said = text.valid(found.text, "tool")
    if len(said) > MAX_TEXT_CHARS:
        oddities.count("tool/own_cut")
        half = MAX_TEXT_CHARS // 2
        said = f"{said[:half]}\n[... {len(said) - 2 * half} characters cut ...]\n{said[-half:]}"
    images = tuple(image for image in found.images if len(image) <= MAX_IMAGE_BYTES)[:MAX_IMAGES]
    if dropped := len(found.images) - len(images):
        oddities.count("tool/own_cut")
        said += f"\n[{dropped} of {len(found.images)} images are not shown: they exceed the limit]"
    return replace(found, text=said, images=images)
