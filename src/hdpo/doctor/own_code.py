"""Code and services that a configuration brings along: found before anything is loaded."""
from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator, Sequence

from hdpo.config import Config
from hdpo.errors import ConfigError
from hdpo.keys import key
from hdpo.own import load_function
from hdpo.toolserver.own import compiled


def check_own(config: Config) -> list[str]:
    """What there is, a word for each. Raises ConfigError for what can't be used; endpoints and servers are not asked."""
    return [*_tools(config), *_servers(config), *_reward(config)]


def _tools(config: Config) -> Iterator[str]:
    for name, tool in config.tools.own.items():
        setting = f"tools.own.{name}"
        compiled(tool.parameters, f"{setting}.parameters")
        check_variables(setting, (tool.key,))
        if tool.function:
            load_function(tool.function, f"{setting}.function")
        yield f"{name} ({tool.function or tool.url or f'MCP server {tool.mcp}'})"


def _servers(config: Config) -> Iterator[str]:
    for name, server in config.tools.mcp.items():
        setting = f"tools.mcp.{name}"
        if importlib.util.find_spec("mcp") is None:
            raise ConfigError(f"{setting} needs the mcp package: pip install hdpo[mcp]")
        check_variables(setting, (server.key, *server.env))
        if server.command and not shutil.which(server.command[0]):
            raise ConfigError(f"{setting}.command: there is no program {server.command[0]}")
        yield f"{name} ({server.url or server.command[0]})"


def _reward(config: Config) -> Iterator[str]:
    if config.reward.function:
        load_function(config.reward.function, "reward.function")
        yield f"reward ({config.reward.function})"


def check_variables(setting: str, names: Sequence[str]) -> None:
    for name in names:
        if name and not key(name):
            raise ConfigError(f"{setting}: the environment variable {name} is not set")
