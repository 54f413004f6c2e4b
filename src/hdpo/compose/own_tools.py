"""The user's own tools of a configuration, as parts beside the tool server's client."""
from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from hdpo.agent.own_calls import own_examples
from hdpo.config import Config
from hdpo.config.tools import OwnTool
from hdpo.doctor.own_code import check_own
from hdpo.errors import ConfigError
from hdpo.keys import key
from hdpo.own import OwnCode, ToolContext, load_function
from hdpo.protocols import ToolBackend
from hdpo.toolserver.own import Own, OwnCall, OwnTools, compiled
from hdpo.toolserver.own_http import HttpTool


class FunctionTool:
    """A function of the user's. It has no timeout of its own: who calls it has."""

    def __init__(self, function: Any, code: OwnCode, timeout_s: float) -> None:
        self._function, self._code, self._timeout_s = function, code, timeout_s

    async def __call__(self, arguments: dict[str, Any], context: ToolContext) -> Any:
        return await self._code.run(self._function, arguments, context, timeout_s=self._timeout_s)

    async def close(self) -> None:
        self._code.close()


def with_own_tools(config: Config, backend: ToolBackend) -> ToolBackend:
    """`backend`, with the configuration's own tools beside its. Raises ConfigError."""
    if not config.tools.own:
        return backend
    code, examples, links = OwnCode(), own_examples(config.tools), dict[str, Any]()
    return OwnTools(backend, {name: Own(_call_of(name, tool, config, code, links), compiled(
        tool.parameters, f"tools.own.{name}.parameters"), examples[name], tool.timeout_s)
        for name, tool in config.tools.own.items()})


def _call_of(name: str, tool: OwnTool, config: Config, code: OwnCode, links: dict[str, Any]) -> OwnCall:
    if tool.function:
        return FunctionTool(load_function(tool.function, f"tools.own.{name}.function"), code, tool.timeout_s)
    if tool.url:
        return HttpTool(name, key(tool.key) if tool.key else "", tool.url, tool.timeout_s, tool.send_images)
    from hdpo.adapters.mcp_tools import McpLink, McpTool
    if tool.mcp not in links:
        links[tool.mcp] = McpLink(tool.mcp, config.tools.mcp[tool.mcp], log_of(config, tool.mcp))
    return McpTool(links[tool.mcp], name)


def log_of(config: Config, server: str) -> Path:
    return config.run.path / f"mcp_{server}_{os.environ.get('RANK', '0')}.log"


def with_mcp_tools(config: Config) -> Config:
    """With the tools of MCP servers among tools.own, so that names and schemas stand in the run's configuration. A server of
    which tools.own names a tool already is not asked again. Raises ConfigError and ToolServerError."""
    known = {tool.mcp for tool in config.tools.own.values()}
    asked = {name: server for name, server in config.tools.mcp.items() if name not in known}
    if not asked:
        return config
    check_own(config)
    from hdpo.adapters.mcp_tools import McpLink
    own = dict(config.tools.own)

    async def ask(name: str) -> dict[str, tuple[str, dict[str, Any]]]:
        link = McpLink(name, asked[name], log_of(config, name))
        try:
            return await link.tools()
        finally:
            await link.close()

    for name, server in asked.items():
        offered = asyncio.run(ask(name))
        for tool in server.tools or sorted(offered):
            if tool not in offered:
                raise ConfigError(f"tools.mcp.{name}.tools: the server has no {tool}; it has {', '.join(sorted(offered))}")
            if tool in own or tool in config.tools.allowed:
                raise ConfigError(f"tools.mcp.{name}: {tool} is a tool already; tools.mcp.{name}.tools chooses others")
            own[tool] = OwnTool(description=offered[tool][0], parameters=offered[tool][1], mcp=name, timeout_s=server.timeout_s)
    try:
        return Config.model_validate({**config.model_dump(), "tools": {**config.tools.model_dump(), "own": own}})
    except ValidationError as exc:
        first = exc.errors()[0]
        raise ConfigError(f"tools.mcp: {'.'.join(map(str, first['loc'][2:]))}: {first['msg']}") from None
