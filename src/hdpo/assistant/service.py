"""The agent behind an OpenAI-compatible address: /v1/chat/completions, streamed or whole, and /v1/models.

Tools run on this side. `content` is the agent's answer; its reasoning, its calls and what it saw are `reasoning_content`. The
handlers are coroutines of the background loop, on which the agent's own are.
"""
from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from hdpo.assistant.requests import BadRequest, ChatRequest, cut_at, read_request, unknown_model
from hdpo.assistant.session import Assistant, Opened, Question
from hdpo.assistant.speech import Event, Piece, Reply, Seen
from hdpo.errors import DataError
from hdpo.text import one_line
from hdpo.toolserver.gate import own_hosts, problem
from hdpo.types import EndReason

MAX_BODY = 128 << 20
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
MakeQuestion = Callable[[ChatRequest], Question]
_FINISH = {EndReason.ANSWERED: "stop", EndReason.UNPARSEABLE: "stop", EndReason.MAX_TOKENS: "length",
           EndReason.MAX_TURNS: "length", EndReason.CONTEXT_FULL: "length"}
_FAILED = {EndReason.INFRASTRUCTURE: 502, EndReason.ABORTED: 504}


class Service:
    """`key` is the bearer token that clients send; empty asks for none. `most` requests are open at once."""

    def __init__(self, assistant: Assistant, model: str, system: list[dict[str, str]], make: MakeQuestion, *, key: str, host: str,
                 allowed_hosts: list[str], most: int) -> None:
        self._assistant, self._model, self._system, self._make = assistant, model, system, make
        self._key, self._hosts, self._most = key, own_hosts(host, "", allowed_hosts), most
        self._open, self._started = 0, int(time.time())

    async def serve(self, listener: socket.socket, stop: asyncio.Event) -> None:
        """Answer requests on `listener` until `stop` is set; open ones are cut off then."""
        app = web.Application(client_max_size=MAX_BODY, middlewares=[self._guarded])
        app.router.add_post("/v1/chat/completions", self.chat)
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/v1/models/{name:.+}", self.model)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0, handler_cancellation=True)
        await runner.setup()
        try:
            await web.SockSite(runner, listener).start()
            await stop.wait()
        finally:
            await runner.cleanup()

    @web.middleware
    async def _guarded(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        refused = problem(request, self._hosts, self._key, "HDPO_SERVE_KEY")
        if refused is not None:
            return _error(refused[0], refused[1], code="invalid_api_key" if refused[0] == 401 else None)
        try:
            return await handler(request)
        except BadRequest as exc:
            return _error(exc.status, exc.message, exc.param, exc.code)
        except web.HTTPException as exc:
            return _error(exc.status, f"{request.method} {one_line(request.path)}: {exc.reason}")

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [self._described()]})

    async def model(self, request: web.Request) -> web.Response:
        if request.match_info["name"] != self._model:
            raise unknown_model(request.match_info["name"], self._model)
        return web.json_response(self._described())

    def _described(self) -> dict[str, Any]:
        return {"id": self._model, "object": "model", "created": self._started, "owned_by": "hdpo"}

    async def chat(self, request: web.Request) -> web.StreamResponse:
        try:
            body = json.loads(await request.read())
        except (ValueError, RecursionError):
            raise BadRequest("the body is not valid JSON") from None
        asked = await asyncio.to_thread(read_request, body, self._model, self._system)
        if self._open >= self._most:
            raise BadRequest(f"{self._open} requests are being answered; try again later", None, "rate_limit_exceeded", 429)
        self._open += 1
        try:
            opened = await self._assistant.open(self._make(asked))
            return await (self._streamed if asked.stream else self._whole)(request, asked, opened)
        except DataError as exc:
            raise BadRequest(str(exc), "messages", "invalid_prompt") from None
        finally:
            self._open -= 1

    async def _whole(self, request: web.Request, asked: ChatRequest, opened: Opened) -> web.Response:
        reasoning = list[str]()
        reply = await self._assistant.answer(opened, lambda event: reasoning.append(_reasoned(event)))
        if reply.end in _FAILED:
            return _error(_FAILED[reply.end], f"the agent could not go on: {reply.error}", code=reply.end.value)
        message = {"role": "assistant", "content": cut_at(reply.text, asked.stop), "reasoning_content": "".join(reasoning)}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": _FINISH[reply.end]}
        return web.json_response({**self._head("chat.completion"), "choices": [choice], "usage": _usage(reply)})

    async def _streamed(self, request: web.Request, asked: ChatRequest, opened: Opened) -> web.StreamResponse:
        """The reasoning as it is sampled, then the answer."""
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        await response.prepare(request)
        head, said = self._head("chat.completion.chunk"), asyncio.Queue[str | None]()

        async def send(delta: dict[str, str], finish: str | None = None) -> None:
            await _send(response, {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})

        playing = asyncio.create_task(self._assistant.answer(opened, lambda event: said.put_nowait(_reasoned(event))))
        playing.add_done_callback(lambda _: said.put_nowait(None))
        try:
            await send({"role": "assistant", "content": ""})
            while (text := await said.get()) is not None:
                if text:
                    await send({"reasoning_content": text})
            reply = await playing
            if reply.end in _FAILED:
                said_last = f"the agent could not go on: {reply.error}"
                await _send(response, _described(said_last, None, reply.end.value, "server_error"))
            else:
                await send({"content": cut_at(reply.text, asked.stop)})
                await send({}, _FINISH[reply.end])
                if asked.usage:
                    await _send(response, {**head, "choices": [], "usage": _usage(reply)})
            await response.write(b"data: [DONE]\n\n")
        except ConnectionError:           # the client went away
            pass
        finally:
            playing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await playing
        return response

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": self._model}


def _reasoned(event: Event) -> str:
    """What `reasoning_content` says of an event. The answer comes as content, when it is known to be one."""
    if isinstance(event, Piece):
        return event.text if event.kind == "reason" else ""
    if isinstance(event, Seen):
        pictures = f"\n[{len(event.images)} picture{'s' * (len(event.images) != 1)}]" if event.images else ""
        return f"\n[result]\n{event.call.observation}{pictures}\n"
    if not event.called:
        return ""
    call = event.text if event.arguments is None else json.dumps(event.arguments, ensure_ascii=False)
    return f"\n[{event.name or 'call'}]\n{call}"


def _usage(reply: Reply) -> dict[str, int]:
    """Observations are tokens that were given, as the prompt's."""
    return {"prompt_tokens": reply.given_tokens, "completion_tokens": reply.sampled_tokens,
            "total_tokens": reply.given_tokens + reply.sampled_tokens}


async def _send(response: web.StreamResponse, value: dict[str, Any]) -> None:
    await response.write(f"data: {json.dumps(value)}\n\n".encode())


def _described(message: str, param: str | None, code: str | None, kind: str) -> dict[str, Any]:
    return {"error": {"message": one_line(message), "type": kind, "param": param, "code": code}}


def _error(status: int, message: str, param: str | None = None, code: str | None = None) -> web.Response:
    kind = "server_error" if status >= 500 else "authentication_error" if status == 401 else "invalid_request_error"
    return web.json_response(_described(message, param, code, kind), status=status,
                             headers={"Retry-After": "1"} if status == 429 else None)
