"""Real tool servers for tests: start, kill and ask them, and see which processes and containers they keep."""
from __future__ import annotations

import asyncio
import io
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import psutil
from PIL import Image

from hdpo.protocols import ToolResult
from hdpo.toolserver.client import ToolClient
from hdpo.toolserver.process import start_tool_server
from hdpo.toolserver.token import token_for
from hdpo.types import Task


def png(color: Any = "red", size: tuple[int, int] = (64, 48), mode: str = "RGB", kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, color).save(buffer, kind, **options)
    return buffer.getvalue()


def call_text(name: str, **arguments: Any) -> str:
    return f"<reason>r</reason><tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def python(code: str) -> str:
    return call_text("python", code=code)


def task(*images: bytes) -> Task:
    return Task("t", "test", [{"role": "user", "content": "?"}], images, "SECRET-GROUND-TRUTH", {"index": "i_1"})


def until(condition: Callable[[], object], seconds: float = 20.0) -> bool:
    """Whether the condition came true within the time."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return bool(condition())


def all_gone(processes: list[psutil.Process], seconds: float = 20.0) -> bool:
    """Whether none of the processes is there any more, at the latest after the time."""
    return until(lambda: not any(process.is_running() for process in processes), seconds)


def post(url: str, body: Any, headers: dict[str, str] | None = None) -> tuple[int, dict[str, Any], Any]:
    """(status, JSON body, headers) of the answer; `headers` beside the usual ones, a server's own token among them."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    usual = {"Content-Type": "application/json", "Authorization": f"Bearer {token_for(url)}"}
    request = urllib.request.Request(f"{url}/get_observation", data, {**usual, **(headers or {})})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response), response.headers
    except urllib.error.HTTPError as exc:
        return exc.code, json.loads(exc.read()), exc.headers


class ToolServer:
    """A server process on a free port, which can be killed and started again there."""

    def __init__(self, *options: str, environment: dict[str, str] | None = None) -> None:
        self.options = options
        self.environment = {**os.environ, "SERPER_API_KEY": "", "JUDGE_API_KEY": "SECRET-KEY", **(environment or {})}
        self.process, self.url = start_tool_server(options, environment=self.environment)

    def below(self) -> list[psutil.Process]:
        """Every process it has started: the sandbox's template first, then what sessions are made of."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def sessions(self) -> int:
        """Processes below the template of the process sandbox."""
        return max(0, len(self.below()) - 1)

    def post(self, body: Any, headers: dict[str, str] | None = None) -> tuple[int, dict[str, Any], Any]:
        return post(self.url, body, headers)

    def talk(self, *actions: str, images: tuple[bytes, ...] = (), trajectory: str = "t", finish: bool = True,
             ) -> list[ToolResult]:
        """One trajectory through our own client."""
        async def go() -> list[ToolResult]:
            client = ToolClient(self.url, timeout=60)
            try:
                results = [await client.call(trajectory, action, task(*images)) for action in actions]
                if finish:
                    await client.finish(trajectory)
                return results
            finally:
                await client.close()
        return asyncio.run(go())

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def start(self) -> None:
        """Again, on the same port."""
        port = self.url.rsplit(":", 1)[1]
        self.process, self.url = start_tool_server([*self.options, "--port", port], environment=self.environment)

    def close(self) -> int:
        """End it as a terminal would; its exit status."""
        self.process.terminate()
        return self.process.wait(60)


def containers(pid: int) -> list[Any]:
    """Sandbox containers that process `pid` owns."""
    import docker

    from hdpo.toolserver.backends.docker_container import OWNER_LABEL
    client = docker.from_env()
    try:
        found = client.containers.list(all=True, filters={"label": OWNER_LABEL}, ignore_removed=True)
        return [container for container in found if container.labels[OWNER_LABEL].startswith(f"{pid}:")]
    finally:
        client.close()
