"""An own tool behind an HTTP endpoint of the user's.

Request  POST {"name", "arguments": {...}, "trajectory": id, "question", "images": [data URL]?}   images with send_images alone
Response 200 {"text": str, "images": [data URL]?}; 400 or 422: the call was the policy's mistake, which is told the body's "error"
or text. Everything else is a failure of ours; what may pass (429, 5xx, a broken connection) is tried again within timeout_s.
"""
from __future__ import annotations

import json
from typing import Any

import aiohttp

from hdpo.own import BadArguments, ToolContext
from hdpo.protocols import ToolResult
from hdpo.toolserver.http_service import HttpService
from hdpo.toolserver.wire import WireError, decode_image, encode_image

REFUSED = (400, 422)


class HttpTool(HttpService):
    """`key` is sent as bearer token; empty sends none."""

    counted = "tool"

    def __init__(self, name: str, key: str, url: str, timeout_s: float, send_images: bool) -> None:
        super().__init__(key, url)
        self.name, self._timeout_s, self._send_images = name, timeout_s, send_images
        self.limit(1000.0, timeout_s)

    async def __call__(self, arguments: dict[str, Any], context: ToolContext) -> ToolResult:
        asked: dict[str, Any] = {"name": self.name, "arguments": arguments, "trajectory": context.trajectory,
                                 "question": context.question}
        if self._send_images:
            asked["images"] = [encode_image(image) for image in context.images]
        return _result(await self.fetch(json.dumps(asked)))

    def request(self, query: str) -> tuple[str, dict[str, Any]]:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        return "POST", {"data": query.encode(), "headers": headers, "allow_redirects": False}

    def session(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=self._timeout_s), trust_env=True)
        return self._session

    async def _attempt(self, query: str, deadline: float) -> tuple[int | None, str, Any, float]:
        status, problem, body, asked = await super()._attempt(query, deadline)
        if status in REFUSED:
            raise BadArguments(_said(problem.removeprefix(f"HTTP {status}: ")))
        return status, problem, body, asked


def _said(body: str) -> str:
    try:
        found = json.loads(body)
        return str(found["error"]) if isinstance(found, dict) and "error" in found else body
    except ValueError:
        return body


def _result(body: dict[str, Any]) -> ToolResult:
    """Raises WireError, which names the field."""
    images = body.get("images") or []
    if not isinstance(body.get("text"), str) or not isinstance(images, list):
        raise WireError("answer", 'expected {"text": str, "images": [data URL]}')
    return ToolResult(body["text"], tuple(decode_image(url, f"images[{number}]") for number, url in enumerate(images)))
