"""The tool server's client, and the server of this node when the configuration names none."""
from __future__ import annotations

import os
from contextlib import ExitStack
from typing import Any

from hdpo.background import BackgroundLoop
from hdpo.compose.own_tools import with_own_tools
from hdpo.config import Config
from hdpo.doctor.host_plan import live, server_processes
from hdpo.doctor.memory_plan import ranks_of_run
from hdpo.errors import ConfigError, ToolServerError
from hdpo.protocols import ToolBackend, ToolResult
from hdpo.ranks.world import World
from hdpo.toolserver.client import ToolClient, wait_until_healthy
from hdpo.toolserver.process import KeptToolServer
from hdpo.types import Task


def open_tools(config: Config, world: World | None, closing: ExitStack) -> tuple[BackgroundLoop, ToolBackend]:
    """The background loop and a client of the configured tool server, or of one started for this node (world None: for this
    process), with the user's own tools beside. Collective."""
    tools = config.tools
    background = BackgroundLoop()
    closing.callback(background.close)
    if not (tools.url or tools.allowed):     # a server that is told no tools would offer all
        return background, _closing(with_own_tools(config, NoTools()), background, closing)
    url, token = tools.url, ""
    if not url:
        mine = _start_tool_server(config, world, closing) if world is None or world.local_rank == 0 else None
        servers = [(0, mine)] if world is None else world.gather((world.node, mine))
        url, token = next(server for node, server in servers if server and node == (world.node if world else 0))
    check_layout(wait_until_healthy(url, timeout=30.0), config)
    client = ToolClient(url, timeout=tools.call_timeout_s, retries=tools.retries, token=token)
    return background, _closing(with_own_tools(config, client), background, closing)


def _closing(backend: ToolBackend, background: BackgroundLoop, closing: ExitStack) -> ToolBackend:
    closing.callback(lambda: background.run(backend.close(), timeout=10))
    return backend


def check_layout(health: dict[str, Any], config: Config) -> None:
    """Raises ConfigError for a server that answers in another layout; the reference's own says nothing of its only one."""
    theirs, ours = health.get("layout", "reference"), config.tools.layout
    if theirs != ours:
        raise ConfigError(f"tools.layout is {ours}, and the tool server at tools.url answers in the layout {theirs}: start it "
                          f"with --layout {ours}, or set tools.layout={theirs}")


def _start_tool_server(config: Config, world: World | None, closing: ExitStack) -> tuple[str, str]:
    """(URL, token)."""
    tools = config.tools
    ranks, of_node = ranks_of_run() if world else (1, 1)
    options = [
        "--tools", ",".join(tools.allowed), "--sandbox", tools.sandbox, "--python-timeout", str(tools.python_timeout_s),
        "--call-timeout", str(tools.call_timeout_s), "--search-provider", tools.search_provider,
        "--search-results", str(tools.search_results), "--max-image-searches", str(tools.max_image_searches),
        "--trajectories", str(live(config, ranks) * of_node), "--processes", str(server_processes(config, ranks, of_node)),
        "--picture-store", str(tools.picture_store_mib), "--layout", tools.layout,
        "--container-memory", str(tools.container_memory_mib), "--sessions-per-container", str(tools.sessions_per_container)]
    for flag, value in (("--text-index", tools.text_index), ("--image-index", tools.image_index),
                        ("--image-cache", tools.image_cache)):
        options += [flag, value] if value else []
    options += ["--i-trust-the-model"] if tools.i_trust_the_model else []
    config.run.path.mkdir(parents=True, exist_ok=True)
    server = KeptToolServer(options, config.run.path / f"tool_server_{world.node if world else os.getpid()}.log")
    closing.callback(server.stop)
    return server.url, server.token


class NoTools:
    """A `ToolBackend` for rollouts whose tools.allowed is empty: calls are refused before they come here."""

    async def call(self, trajectory_id: str, action: str, task: Task) -> ToolResult:
        raise ToolServerError("there is no tool server")

    def expect(self, trajectory_id: str) -> None: ...

    async def finish(self, trajectory_id: str) -> None:
        pass

    async def close(self) -> None:
        pass
