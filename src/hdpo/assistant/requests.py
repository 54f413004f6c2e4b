"""What clients of OpenAI's /v1/chat/completions send -> a conversation for this agent, or what is wrong with it."""
from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hdpo.agent.images import check_image
from hdpo.assistant.session import user_text
from hdpo.errors import DataError
from hdpo.text import one_line, valid_tree

MAX_TOKENS = 1 << 20
_NEUTRAL = {"n": (1,), "top_p": (1,), "frequency_penalty": (0,), "presence_penalty": (0,), "logprobs": (False,),
            "logit_bias": ({},), "top_logprobs": (0,), "tools": ([],), "functions": ([],), "response_format": ({"type": "text"},)}
"""What a request may leave as it is, but not set: this agent samples plainly, has tools of its own and one answer."""


class BadRequest(Exception):
    """`param` is the field at fault, `code` OpenAI's word for it."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message, param, code, status)
        self.message = one_line(message)
        self.param, self.code, self.status = param, code, status


@dataclass(frozen=True, slots=True)
class ChatRequest:
    messages: list[dict[str, str]]
    images: tuple[bytes, ...]
    temperature: float | None
    max_tokens: int                      # 0: no limit of its own
    seed: int | None
    stop: tuple[str, ...]
    stream: bool
    usage: bool                          # a last chunk of a stream tells the tokens


def read_request(body: Any, model: str, system: Sequence[Mapping[str, str]]) -> ChatRequest:
    """`system` is the agent's own system message, which names its tools: a client's comes behind it. Raises BadRequest."""
    body = valid_tree(body, "request")
    if not isinstance(body, dict):
        raise BadRequest("the body must be a JSON object")
    if body.get("model") != model:
        raise unknown_model(body.get("model"), model)
    for name, allowed in _NEUTRAL.items():
        if body.get(name) is not None and body[name] not in allowed:
            raise BadRequest(f"{name} can't be set here" + (": tools run on this side" if name in ("tools", "functions") else ""),
                             name, "unsupported_parameter")
    messages, images = _messages(body.get("messages"), system)
    stop = body.get("stop") or []
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(word, str) and word for word in stop):
        raise BadRequest("stop must be text or a list of texts", "stop")
    options = body.get("stream_options") or {}
    name = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    return ChatRequest(
        messages, tuple(images), _number(body, "temperature", 0, 2), int(_number(body, name, 1, MAX_TOKENS, whole=True) or 0),
        _whole(_number(body, "seed", -(1 << 63), 1 << 63, whole=True)), tuple(stop), _flag(body, "stream"),
        isinstance(options, dict) and _flag(options, "include_usage"))


def unknown_model(asked: Any, model: str) -> BadRequest:
    return BadRequest(f"there is no model {asked!r}; the model here is {model!r}", "model", "model_not_found", 404)


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name) or False
    if not isinstance(value, bool):
        raise BadRequest(f"{name} must be true or false", name)
    return value


def _number(body: Mapping[str, Any], name: str, low: float, high: float, whole: bool = False) -> float | None:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not low <= value <= high:
        raise BadRequest(f"{name} must be a {'whole ' * whole}number from {low} to {high}", name)
    return value


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def _messages(given: Any, system: Sequence[Mapping[str, str]]) -> tuple[list[dict[str, str]], list[bytes]]:
    if not isinstance(given, list) or not given:
        raise BadRequest("messages must be a list with at least one message", "messages")
    instructions, said, images = [message["content"] for message in system], list[dict[str, str]](), list[bytes]()
    for number, message in enumerate(given):
        where = f"messages[{number}]"
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ("system", "developer", "user", "assistant"):
            raise BadRequest(f"{where}.role must be system, developer, user or assistant", where)
        text, shown = _content(message.get("content"), f"{where}.content")
        if shown and role != "user":
            raise BadRequest(f"{where}: only messages of the user can hold images", where)
        if role in ("system", "developer"):
            instructions.append(text)
            continue
        images += shown
        said.append({"role": role, "content": user_text(text, len(shown)) if role == "user" else text})
    if not said or said[-1]["role"] != "user":
        raise BadRequest("the last message must be the user's", "messages")
    first = [{"role": "system", "content": "\n\n".join(instructions)}] if instructions else []
    return [*first, *said], images


def _content(content: Any, where: str) -> tuple[str, list[bytes]]:
    """(text, images) of one message."""
    if content is None or isinstance(content, str):
        return content or "", []
    if not isinstance(content, list):
        raise BadRequest(f"{where} must be text or a list of parts", where)
    texts, images = list[str](), list[bytes]()
    for number, part in enumerate(content):
        here = f"{where}[{number}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image_url":
            address = part.get("image_url")
            images.append(_image(address.get("url") if isinstance(address, dict) else address, here))
        else:
            raise BadRequest(f"{here} must be a text or image_url part", here)
    return "\n".join(texts), images


def _image(url: Any, where: str) -> bytes:
    head, comma, data = url.partition(",") if isinstance(url, str) else ("", "", "")
    if not comma or not head.startswith("data:image/") or not head.endswith(";base64"):
        raise BadRequest(f"{where}: images are taken as data:image/...;base64 addresses only; nothing is fetched", where,
                         "invalid_image_url")
    try:
        image = base64.b64decode(data, validate=True)
        check_image(image, where)
    except ValueError:
        raise BadRequest(f"{where}: not valid base64", where, "invalid_image") from None
    except DataError as exc:
        raise BadRequest(str(exc), where, "invalid_image") from None
    return image


def cut_at(text: str, stop: Sequence[str]) -> str:
    """`text` up to the first of the stop words."""
    return text[:min((at for word in stop if (at := text.find(word)) >= 0), default=len(text))]
