"""What is asked of a request before anything of it is read: no page of a browser and no stranger gets past this."""
from __future__ import annotations

import hmac
import ipaddress
import socket
import zlib
from collections.abc import Iterable
from urllib.parse import urlsplit

from aiohttp import web

MAX_UNPACKED = 64 << 20
"""Largest compressed body once it is unpacked, bytes."""
JSON = "application/json"
_TYPES = {"POST": JSON, "PUT": "application/octet-stream"}


def objection(request: web.Request, hosts: Iterable[str], token: str, open_to_all: bool) -> web.Response | None:
    """The answer to a request that is refused; None lets it in. An empty `token` means that none is asked for.

    Browsers send Origin with whatever a page posts elsewhere, and can't post JSON or PUT to another origin unasked; a name in
    Host that isn't this server's is one that its owner has pointed here (DNS rebinding).
    """
    found = problem(request, hosts, "" if open_to_all else token, "HDPO_TOOL_SERVER_TOKEN")
    return None if found is None else web.json_response({"detail": found[1]}, status=found[0])


def problem(request: web.Request, hosts: Iterable[str], token: str, variable: str) -> tuple[int, str] | None:
    """(status, why) of a request that is refused; `variable` is where clients find the token."""
    if not _is_ours(request.headers.get("Host", ""), hosts):
        return 403, "the Host header names another server; --allow-host NAME lets a name in"
    if "Origin" in request.headers:
        return 403, "requests of web pages are refused"
    if request.method in _TYPES and request.content_type != _TYPES[request.method]:
        return 415, f"Content-Type must be {_TYPES[request.method]}"
    if token:
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode("utf-8", "surrogateescape"), token.encode()):
            return 401, f"missing or wrong bearer token ({variable})"
    return None


def unpacked(request: web.Request, body: bytes) -> bytes:
    """The body as its sender wrote it. Raises HTTPRequestEntityTooLarge or HTTPUnsupportedMediaType."""
    encoding = request.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding == "identity":
        return body
    if encoding not in ("gzip", "deflate"):
        raise web.HTTPUnsupportedMediaType(text=f"Content-Encoding {encoding} is not understood")
    unpacker = zlib.decompressobj(wbits=47)      # zlib or gzip by what it begins with
    try:
        text = unpacker.decompress(body, MAX_UNPACKED)
    except zlib.error as exc:
        raise web.HTTPBadRequest(text=f"body is not {encoding}: {exc}") from None
    if not unpacker.eof:
        raise web.HTTPRequestEntityTooLarge(MAX_UNPACKED, MAX_UNPACKED + 1)
    return text


def own_hosts(host: str, public_url: str, allowed: Iterable[str]) -> set[str]:
    """Names, beside addresses, under which this server may be called."""
    machine = socket.gethostname().lower()
    return {"localhost", host.lower(), machine, machine.split(".")[0], (urlsplit(public_url).hostname or "localhost"),
            *(name.lower() for name in allowed)}


def _is_ours(header: str, hosts: Iterable[str]) -> bool:
    try:
        name = urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return False
    try:
        ipaddress.ip_address(name)
        return True
    except ValueError:
        return name in hosts
