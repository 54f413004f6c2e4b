"""Tools of MCP servers, through the `mcp` package (pip install hdpo[mcp]).

One connection a process and server, opened by its first call and anew after it broke. A server that is started gets the default
environment of the package and the variables that its entry names, nothing else; it writes its errors into a file.
"""
from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hdpo.config.tools import McpServer
from hdpo.errors import ToolServerError
from hdpo.keys import key
from hdpo.own import BadArguments, ToolContext
from hdpo.protocols import ToolResult
from hdpo.text import one_line

if TYPE_CHECKING:
    from mcp import Client
    from mcp.types import CallToolResult

START_S = 60.0
_INVALID_PARAMS = -32602


class McpLink:
    """A server. Methods are coroutines of one event loop."""

    def __init__(self, name: str, config: McpServer, log: Path) -> None:
        self._name, self._config, self._log = name, config, log
        self._lock = asyncio.Lock()
        self._running: asyncio.Task[None] | None = None
        self._broken = asyncio.Event()
        self._client: Client | None = None

    async def tools(self) -> dict[str, tuple[str, dict[str, Any]]]:
        """Name -> (description, JSON Schema). Raises ToolServerError."""
        client, cursor, found = await self._connected(), None, dict[str, tuple[str, dict[str, Any]]]()
        for _ in range(100):           # a server that never ends its list must not hang a start
            page = await client.list_tools(cursor=cursor)
            found |= {tool.name: (tool.description or "", dict(tool.input_schema)) for tool in page.tools}
            cursor = page.next_cursor
            if not cursor:
                break
        return found

    async def call(self, tool: str, arguments: dict[str, Any]) -> ToolResult:
        """Raises BadArguments for what the server calls invalid, ToolServerError for a server that fails."""
        from mcp import MCPError
        client = await self._connected()
        try:
            result = await client.call_tool(tool, arguments)
        except MCPError as exc:
            if exc.code == _INVALID_PARAMS:
                raise BadArguments(exc.message) from None
            self._broken.set()
            raise ToolServerError(f"MCP server {self._name}: {one_line(exc.message)}") from exc
        except Exception as exc:
            self._broken.set()
            raise ToolServerError(f"MCP server {self._name}: {type(exc).__name__}: {one_line(exc)}") from exc
        if result.is_error and self._config.errors == "ours":
            raise ToolServerError(f"MCP server {self._name}: {one_line(_result(result).text)}")
        return _result(result)

    async def close(self) -> None:
        self._broken.set()
        if self._running is not None:
            await asyncio.wait([self._running], timeout=5)

    async def _connected(self) -> Client:
        async with self._lock:
            if self._client is not None and not self._broken.is_set():
                return self._client
            await self.close()
            self._broken = asyncio.Event()
            ready: asyncio.Future[Client] = asyncio.get_running_loop().create_future()
            self._running = asyncio.create_task(self._run(ready, self._broken))
            try:
                async with asyncio.timeout(START_S):
                    self._client = await ready
            except TimeoutError:
                self._running.cancel()
                raise ToolServerError(f"MCP server {self._name}: not ready within {START_S:g} s; see {self._log}") from None
            return self._client

    async def _run(self, ready: asyncio.Future[Client], broken: asyncio.Event) -> None:
        """Holds the connection; its context managers must be left by the task that entered them."""
        try:
            async with self._opened() as client:
                ready.set_result(client)
                await broken.wait()
        except Exception as exc:  # noqa: BLE001 - process and network boundary
            broken.set()
            if not ready.done():
                ready.set_exception(ToolServerError(f"MCP server {self._name} can't be used: {_reason(exc)}; see {self._log}"))

    @contextlib.asynccontextmanager
    async def _opened(self) -> AsyncIterator[Client]:
        from mcp import Client, StdioServerParameters, stdio_client
        config = self._config
        async with contextlib.AsyncExitStack() as stack:
            if config.command:
                self._log.parent.mkdir(parents=True, exist_ok=True)
                errors = stack.enter_context(self._log.open("a", encoding="utf-8"))
                server = StdioServerParameters(command=config.command[0], args=config.command[1:],
                                               encoding_error_handler="replace", env={name: key(name) for name in config.env})
                transport = stdio_client(server, errlog=errors)
            else:
                import httpx2
                from mcp.client.streamable_http import streamable_http_client
                headers = {"Authorization": f"Bearer {key(config.key)}"} if config.key else {}
                http = await stack.enter_async_context(httpx2.AsyncClient(headers=headers, timeout=config.timeout_s))
                transport = streamable_http_client(config.url, http_client=http)
            yield await stack.enter_async_context(Client(transport, read_timeout_seconds=config.timeout_s))


class McpTool:
    """One tool of a server."""

    def __init__(self, link: McpLink, name: str) -> None:
        self._link, self._name = link, name

    async def __call__(self, arguments: dict[str, Any], context: ToolContext) -> ToolResult:
        return await self._link.call(self._name, arguments)

    async def close(self) -> None:
        await self._link.close()


def _result(result: CallToolResult) -> ToolResult:
    texts, images = list[str](), list[bytes]()
    for block in result.content:
        if block.type == "text":
            texts.append(block.text)
        elif block.type == "image":
            images.append(base64.b64decode(block.data))
        elif block.type == "resource" and (said := getattr(block.resource, "text", None)) is not None:
            texts.append(said)
        else:
            texts.append(f"[{block.type} is not shown]")
    if not result.content and result.structured_content is not None:
        texts.append(json.dumps(result.structured_content, ensure_ascii=False))
    return ToolResult("\n".join(texts), tuple(images), ok=not result.is_error)


def _reason(exc: BaseException) -> str:
    """In one line; a task group's first failure."""
    while isinstance(exc, BaseExceptionGroup):
        exc = exc.exceptions[0]
    return f"{type(exc).__name__}: {one_line(exc)}" if str(exc) else type(exc).__name__
