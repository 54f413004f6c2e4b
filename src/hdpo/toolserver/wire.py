"""The reference's HTTP format of /get_observation, as records and bytes.

Request  {"trajectory_ids": [str], "actions": [str], "extra_fields": [{}]?, "finish": [bool]?, "is_last_step": [bool]?}
Response {"observations": [str | {"obs", "image": [data URL], "metrics", ...}], "dones": [bool], "valids": [bool],
          "processing_time_ms": float, "queue_time_ms": float}

Extensions, all optional, so that a reference trainer can use this server and our client a reference server:
- "request_ids": [str]: a call repeated under the same id is executed once and answered twice.
- extra_fields[i]["images"] (data URLs) is needed on a trajectory's first call only; later ones carry "images_sent": true.
  A server that has lost the trajectory answers metrics {"need_images": true} without executing.
- extra_fields[i]["image_keys"]: [SHA-256 in hexadecimal] instead of "images", for a server whose /health says "uploads": true.
  It answers metrics {"need_images": [key]} without executing where it lacks pictures; PUT /images/KEY brings them, as raw
  bytes (application/octet-stream), once for all trajectories.
- Accept: application/x-hdpo-reply: the answer is a zero byte, the length of the JSON (4 bytes, little-endian), the JSON,
  and the pictures' bytes one after another; "image_bytes": [int] of an observation, in place of "image", has their sizes.
- extra_fields[i]["expects_session"]: true once a python call of the trajectory was executed. A server that does not have
  its session refuses further python calls with "infrastructure" instead of executing them in a fresh one.
- extra_fields[i]["python_calls"]: how many python calls of the trajectory were executed and answered so far. A server that
  knows of fewer has another session than they made, and refuses likewise.
- "infrastructure": true in a dict observation: the failure is the server's, not the policy's.
"""
from __future__ import annotations

import base64
import json
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

_ID = re.compile(r"[^\x00-\x1f\x7f]{1,256}")
_KEY = re.compile(r"[0-9a-f]{64}")
_DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,")
_MAGIC = ((b"\x89PNG", "png"), (b"\xff\xd8", "jpeg"), (b"GIF8", "gif"), (b"RIFF", "webp"), (b"BM", "bmp"))
_HEAD = struct.Struct("<BI")      # 0, which begins no JSON; length
RAW, JSON = "application/x-hdpo-reply", "application/json"
"""The two forms of an answer."""
MAX_BATCH = 256
"""Calls in one request."""


class WireError(Exception):
    """A request or response that does not follow the format; `field` names the part."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(field, message)
        self.field, self.message = field, message

    def __str__(self) -> str:
        return f"{self.field}: {self.message}"


@dataclass(frozen=True, slots=True)
class Call:
    """One row of a request. `images` and `image_keys` are None when the field was absent."""

    trajectory_id: str
    action: str
    request_id: str = ""
    finish: bool = False
    is_last_step: bool = False
    images: tuple[bytes, ...] | None = None
    image_keys: tuple[str, ...] | None = None
    images_sent: bool = False
    expects_session: bool = False
    python_calls: int = 0      # of the trajectory, executed and answered before this one
    index: str = ""            # the row's extra_info.index: key of the reference's offline image-search cache


@dataclass(frozen=True, slots=True)
class Reply:
    """One row of a response."""

    text: str
    images: Sequence[bytes] = ()
    valid: bool = True
    done: bool = False
    metrics: dict[str, Any] = field(default_factory=dict)
    timed_out: bool = False
    infrastructure: bool = False
    queued_s: float = field(default=0.0, compare=False)     # that its request waited for its turn, as the response says


def encode_image(data: bytes) -> str:
    """Encoded image file -> data URL."""
    kind = next((name for magic, name in _MAGIC if data.startswith(magic)), "png")
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def decode_image(url: Any, field_name: str) -> bytes:
    """Data URL (or bare base64, as some trainers send) -> encoded image file."""
    if not isinstance(url, str):
        raise WireError(field_name, f"expected a data URL, got {type(url).__name__}")
    head = _DATA_URL.match(url)
    try:
        return base64.b64decode(url[head.end() if head else 0:], validate=True)
    except ValueError:
        raise WireError(field_name, "expected data:image/...;base64,... with valid base64") from None


def parse_request(body: Any) -> list[Call]:
    """Validate a request body. Raises WireError naming the field; the server answers 422."""
    if not isinstance(body, dict):
        raise WireError("body", "expected a JSON object")
    ids = _rows(body, "trajectory_ids", None, str)
    if not 1 <= len(ids) <= MAX_BATCH:
        raise WireError("trajectory_ids", f"expected 1 to {MAX_BATCH} ids, got {len(ids)}")
    size = len(ids)
    actions = _rows(body, "actions", size, str)
    finish = _rows(body, "finish", size, bool, False)
    last = _rows(body, "is_last_step", size, bool, False)
    request_ids = _rows(body, "request_ids", size, str, "")
    extras = _rows(body, "extra_fields", size, dict, None)
    return [_call(f"[{i}]", *row) for i, row in enumerate(zip(ids, actions, request_ids, finish, last, extras))]


def _rows(body: dict[str, Any], name: str, size: int | None, kind: type, default: Any = ...) -> list[Any]:
    rows = body.get(name)
    if rows is None:
        if default is ... or size is None:
            raise WireError(name, "field required")
        return [default] * size
    if not isinstance(rows, list):
        raise WireError(name, f"expected a list, got {type(rows).__name__}")
    if size is not None and len(rows) != size:
        raise WireError(name, f"expected {size} entries, one per trajectory id, got {len(rows)}")
    for i, row in enumerate(rows):
        if not isinstance(row, kind) and not (kind is dict and row is None):
            raise WireError(f"{name}[{i}]", f"expected {kind.__name__}, got {type(row).__name__}")
    return rows


def _call(where: str, trajectory_id: str, action: str, request_id: str, finish: bool, last: bool,
          extra: dict[str, Any] | None) -> Call:
    if not _ID.fullmatch(trajectory_id):
        raise WireError(f"trajectory_ids{where}", "expected 1 to 256 printable characters")
    extra = extra or {}
    images = extra.get("images")
    name = f"extra_fields{where}.images"
    if images is not None and not isinstance(images, list):
        raise WireError(name, f"expected a list of data URLs, got {type(images).__name__}")
    keys = extra.get("image_keys")
    if keys is not None and not (isinstance(keys, list) and all(isinstance(key, str) and _KEY.fullmatch(key) for key in keys)):
        raise WireError(f"extra_fields{where}.image_keys", "expected a list of SHA-256 in lower-case hexadecimal")
    return Call(
        trajectory_id, action, request_id, finish, last,
        images=None if images is None else tuple(decode_image(url, f"{name}[{i}]") for i, url in enumerate(images)),
        image_keys=None if keys is None else tuple(keys), images_sent=extra.get("images_sent") is True,
        expects_session=extra.get("expects_session") is True,
        python_calls=calls if type(calls := extra.get("python_calls")) is int else 0,
        index="" if extra.get("index") is None else str(extra["index"]))


def request_json(call: Call) -> dict[str, Any]:
    """The body our client sends for one call. Nothing of the task but its images leaves the trainer."""
    extra: dict[str, Any] = {name: True for name in ("images_sent", "expects_session") if getattr(call, name)}
    extra |= {"python_calls": call.python_calls} if call.python_calls else {}
    if call.images is not None:
        extra["images"] = [encode_image(image) for image in call.images]
    if call.image_keys is not None:
        extra["image_keys"] = list(call.image_keys)
    if call.index:
        extra["index"] = call.index
    return {"trajectory_ids": [call.trajectory_id], "actions": [call.action], "extra_fields": [extra],
            "finish": [call.finish], "is_last_step": [call.is_last_step], "request_ids": [call.request_id]}


def response_body(replies: Sequence[Reply], processing_ms: float, queue_ms: float, raw: bool = False) -> bytes:
    """The body of a 200 response, RAW or JSON."""
    pictures: list[bytes] = []
    body = {"observations": [_observation(reply, pictures if raw else None) for reply in replies],
            "dones": [reply.done for reply in replies], "valids": [reply.valid for reply in replies],
            "processing_time_ms": processing_ms, "queue_time_ms": queue_ms}
    text = json.dumps(body).encode()
    return b"".join((_HEAD.pack(0, len(text)), text, *pictures)) if raw else text


def _observation(reply: Reply, pictures: list[bytes] | None) -> str | dict[str, Any]:
    """`pictures` takes the bytes; None writes them as data URLs."""
    if not (reply.images or reply.metrics or reply.timed_out or reply.infrastructure):
        return reply.text
    observation: dict[str, Any] = {"obs": reply.text, "metrics": reply.metrics, "timeout": reply.timed_out}
    if reply.images and pictures is None:
        observation["image"] = [encode_image(image) for image in reply.images]
    elif reply.images and pictures is not None:
        shown = list(reply.images)
        observation["image_bytes"] = list(map(len, shown))
        pictures += shown
    if reply.infrastructure:
        observation["infrastructure"] = True
    return observation


def parse_response(body: bytes) -> list[Reply]:
    """Read a response of this server or of the reference's. Raises WireError naming the field, or ValueError for bad JSON."""
    if body[:1] != b"\0":
        return _replies(json.loads(body), memoryview(b""))
    if len(body) < _HEAD.size:
        raise WireError("body", "ends too early")
    end = _HEAD.size + _HEAD.unpack_from(body)[1]
    return _replies(json.loads(body[_HEAD.size:end]), memoryview(body)[end:])


def _replies(body: Any, rest: memoryview) -> list[Reply]:
    """`rest`: the pictures of a raw response."""
    if not isinstance(body, dict):
        raise WireError("body", "expected a JSON object")
    observations = _rows(body, "observations", None, object)
    dones = _rows(body, "dones", len(observations), object)       # the reference sends bool or 0/1
    valids = _rows(body, "valids", len(observations), object)
    waited = body.get("queue_time_ms")
    queued_s = waited / 1000 if isinstance(waited, (int, float)) and 0 <= waited < 1e9 else 0.0
    replies = []
    for i, row in enumerate(zip(observations, dones, valids)):
        where = f"observations[{i}]"
        sizes = row[0].get("image_bytes", []) if isinstance(row[0], dict) else []
        if not isinstance(sizes, list) or not all(type(size) is int and size >= 0 for size in sizes) or sum(sizes) > len(rest):
            raise WireError(f"{where}.image_bytes", "is not what follows")
        reply = replace(_reply(where, *row), queued_s=queued_s)
        for size in sizes:
            reply = replace(reply, images=(*reply.images, bytes(rest[:size])))
            rest = rest[size:]
        replies.append(reply)
    return replies


def _reply(where: str, observation: Any, done: Any, valid: Any) -> Reply:
    if isinstance(observation, str):
        return Reply(observation, valid=bool(valid), done=bool(done))
    if not isinstance(observation, dict) or not isinstance(observation.get("obs"), str):
        raise WireError(where, 'expected a string or an object with a string "obs"')
    images = observation.get("image") or []
    if isinstance(images, str):
        images = [images]
    if not isinstance(images, list):
        raise WireError(f"{where}.image", f"expected a list of data URLs, got {type(images).__name__}")
    metrics = observation.get("metrics")
    return Reply(
        observation["obs"], tuple(decode_image(url, f"{where}.image[{i}]") for i, url in enumerate(images)),
        valid=bool(valid), done=bool(done), metrics=metrics if isinstance(metrics, dict) else {},
        timed_out=observation.get("timeout") is True, infrastructure=observation.get("infrastructure") is True)
