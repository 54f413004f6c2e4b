"""A scripted OpenAI-compatible server on a real socket: what each request gets is decided by a function of the test."""
from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

from aiohttp import web

from hdpo.adapters.openai_judge import OpenAIJudge
from hdpo.background import BackgroundLoop
from hdpo.config import JudgeConfig
from hdpo.types import Judgement

Action = Callable[[web.Request], Any]   # a coroutine function: request -> response
Script = Callable[[dict[str, Any], int], Action]   # (request body, how many came before) -> action


def say(text: Any, delay: float = 0.0, **message: Any) -> Action:
    async def action(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(delay)
        return web.json_response(completion(text, **message))
    return action


def completion(text: Any, finish_reason: str | None = "stop", **message: Any) -> dict[str, Any]:
    return {"id": "c", "object": "chat.completion", "created": 1, "model": "scripted", "choices": [
        {"index": 0, "finish_reason": finish_reason, "message": {"role": "assistant", "content": text, **message}}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 2, "total_tokens": 102}}


def fail(status: int, body: Any = None, headers: dict[str, str] | None = None) -> Action:
    async def action(request: web.Request) -> web.StreamResponse:
        return web.json_response(body or {"error": {"message": f"scripted {status}"}}, status=status, headers=headers)
    return action


def raw(text: str, content_type: str = "application/json") -> Action:
    async def action(request: web.Request) -> web.StreamResponse:
        return web.Response(text=text, content_type=content_type)
    return action


async def hang(request: web.Request) -> web.StreamResponse:
    await asyncio.Event().wait()   # until the client hangs up
    raise AssertionError


async def reset(request: web.Request) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def die_in_the_body(request: web.Request) -> web.StreamResponse:
    """Half of a reply with the right length in its header, then the connection breaks."""
    text = json.dumps(completion("CORRECT")).encode()
    response = web.StreamResponse(headers={"Content-Length": str(len(text)), "Content-Type": "application/json"})
    await response.prepare(request)
    await response.write(text[:len(text) // 2])
    assert request.transport is not None
    request.transport.abort()
    return response


async def trickle(request: web.Request) -> web.StreamResponse:
    """A valid reply, a few bytes at a time, for ever shorter than any timeout between two bytes."""
    response = web.StreamResponse(headers={"Content-Type": "application/json"})
    await response.prepare(request)
    for _ in range(10_000):
        await response.write(b" ")   # white space before JSON is valid JSON
        await asyncio.sleep(0.05)
    await response.write(json.dumps(completion("CORRECT")).encode())
    return response


class JudgeServer:
    """Serves /v1 on 127.0.0.1 from a thread of its own. `stop` and `start` keep the port."""

    def __init__(self, script: Script, models: list[str] | None = None) -> None:
        self.script = script
        self.models = ["scripted"] if models is None else models
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.running = self.most_running = self.model_requests = 0
        self.port = 0
        self._loop = BackgroundLoop("judge-server")
        self._runner: web.AppRunner | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        self._loop.run(self._start())

    def stop(self) -> None:
        self._loop.run(self._stop())

    def close(self) -> None:
        self.stop()
        self._loop.close()

    async def _start(self) -> None:
        app = web.Application(client_max_size=2**26)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/chat/completions", self._chat)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, backlog=1024, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def _stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _models(self, request: web.Request) -> web.StreamResponse:
        self.model_requests += 1
        return web.json_response({"object": "list", "data": [
            {"id": name, "object": "model", "created": 1, "owned_by": "test"} for name in self.models]})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            body = await request.json()
            self.bodies.append(body)
            self.headers.append(dict(request.headers))
            return await self.script(body, len(self.bodies) - 1)(request)
        finally:
            self.running -= 1


class Judges:
    """Scripted servers, and judges that talk to them from a background loop."""

    def __init__(self) -> None:
        self.background = BackgroundLoop()
        self._servers: list[JudgeServer] = []
        self._judges: list[OpenAIJudge] = []

    def serve(self, script: Script, models: list[str] | None = None) -> JudgeServer:
        self._servers.append(JudgeServer(script, models))
        return self._servers[-1]

    def judge(self, server: JudgeServer, **settings: object) -> OpenAIJudge:
        config = JudgeConfig.model_validate({"timeout_s": 20.0, "deadline_s": 40.0, **settings, "base_url": server.url})
        self._judges.append(OpenAIJudge(config, api_key="sk-very-secret", backoff_s=0.01))
        return self._judges[-1]

    def ask(self, judge: OpenAIJudge, prediction: str = "a bird") -> Judgement:
        return self.background.run(judge.judge("What flies there?", "a kite", prediction), timeout=120)

    def close(self) -> None:
        for judge in self._judges:
            self.background.run(judge.close())
        for server in self._servers:
            server.close()
        self.background.close()


def in_order(*actions: Action) -> Script:
    """One action per request; the last one for all that follow."""
    return lambda body, n: actions[min(n, len(actions) - 1)]


def user_message(body: dict[str, Any]) -> str:
    return body["messages"][-1]["content"]
