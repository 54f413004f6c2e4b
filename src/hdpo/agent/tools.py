"""The tools as the agent sees them: a sampled turn becomes a call, its outcome an observation.

What is wrong with a call is told to the model and the trajectory goes on. What fails on our side is marked as ours, so
that no policy is charged for it.
"""
from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from hdpo import oddities, text
from hdpo.agent.own_calls import own_examples
from hdpo.agent.parse import EXAMPLES, MalformedCall, call_error, parse_tool_call
from hdpo.config import ToolsConfig
from hdpo.errors import ToolServerError
from hdpo.protocols import ToolBackend
from hdpo.types import Task, ToolCall


@dataclass(frozen=True, slots=True)
class ToolOutcome:
    """A finished call and the encoded images it returned; `error` says what failed when call.infrastructure is set."""

    call: ToolCall
    images: tuple[bytes, ...] = ()
    error: str = ""


class AgentTools:
    """Checks calls here and lets the backend run the good ones, each within `config.call_timeout_s`.

    Attempts at a server that was not reached are repeated by the backend, which alone knows that nothing ran.
    """

    def __init__(self, backend: ToolBackend, config: ToolsConfig) -> None:
        self._backend = backend
        self._allowed, self._own = config.offered, own_examples(config)
        self._timeout = config.call_timeout_s

    async def run(self, trajectory_id: str, turn: str, task: Task) -> ToolOutcome:
        """Execute the tool call a sampled turn ends with. A backend's ToolServerError becomes an infrastructure call."""
        parsed = parse_tool_call(turn, self._allowed, self._own)
        if isinstance(parsed, MalformedCall):
            return ToolOutcome(ToolCall("", {}, ok=False, observation=parsed.message))
        if parsed.name not in self._allowed:
            return ToolOutcome(ToolCall(parsed.name, parsed.arguments, ok=False, observation=self._refusal(parsed.name)))
        started = time.monotonic()
        try:
            async with asyncio.timeout(self._timeout):
                result = await self._backend.call(trajectory_id, turn, task)
        except (ToolServerError, TimeoutError) as exc:
            error = text.one_line(exc) or f"no answer to a {parsed.name} call within {self._timeout:g} s"
            oddities.count(f"tool/{parsed.name}_unavailable")
            call = ToolCall(parsed.name, parsed.arguments, ok=False, observation="", infrastructure=True,
                            seconds=time.monotonic() - started)
            return ToolOutcome(call, error=error)
        call = ToolCall(parsed.name, parsed.arguments, ok=result.ok, observation=text.valid(result.text, "tool"),
                        num_images=len(result.images), seconds=time.monotonic() - started)
        return ToolOutcome(call, result.images)

    def _refusal(self, name: str) -> str:
        if not self._allowed:
            return f"Tool call error: {name} is not available, and no other tool is. Answer without tools."
        return call_error(f"{name} is not available here; available: {', '.join(self._allowed)}",
                          {**EXAMPLES, **self._own}[self._allowed[0]])
