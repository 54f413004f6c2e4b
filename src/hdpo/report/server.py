"""`hdpo report RUN --serve`: the whole run in a browser, a page at a time. Reads, and answers GET alone.

Only who knows the address gets in: its path begins with a secret made at the start. The Host header must name this server, so
that no web page can reach it under a name of its own (DNS rebinding). Rows and pictures are named by numbers within dumps that
the folder was found to hold; no path comes from a request.
"""
from __future__ import annotations

import hmac
import ipaddress
import secrets
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from hdpo.agent.images import decode_image
from hdpo.errors import DataError, UserError
from hdpo.report.document import to_json
from hdpo.report.pieces import Pieces
from hdpo.report.shelf import Shelf
from hdpo.state.dump import encode_image
from hdpo.train.timeline import read_timeline

THUMB = 112     # longest side of a picture in a list, pixels


class Site:
    """The answers, without HTTP. Raises DataError for what isn't there, KeyError and ValueError for what makes no sense."""

    def __init__(self, shelves: Sequence[Shelf], page: Callable[[], str]) -> None:
        self._shelves, self._page = list(shelves), page
        self._pieces = [Pieces(shelf.folder) for shelf in shelves]
        self._decoding = threading.Lock()     # tokenizer and thumbnails: one at a time is fast enough and bounds memory

    def answer(self, path: str, query: dict[str, str]) -> tuple[str, bytes]:
        """(content type, body) of a path below the secret."""
        if path == "":
            return "text/html; charset=utf-8", self._page().encode("utf-8", "replace")
        if path == "picture":
            return self._picture(query["dump"], int(query["row"]), int(query["place"]), query.get("size") == "thumb")
        if path not in ("sheet", "row", "tokens", "search", "history", "timeline"):
            raise DataError("no such page")
        return "application/json", to_json(getattr(self, f"_get_{path}")(query)).encode("utf-8", "replace")

    def _shelf(self, name: str) -> tuple[int, Shelf, str]:
        run, _, dump = name.partition("/")
        if not run.isdecimal() or int(run) >= len(self._shelves):
            raise DataError("no such run")
        return int(run), self._shelves[int(run)], dump

    def _get_sheet(self, query: dict[str, str]) -> Any:
        _, shelf, dump = self._shelf(query["dump"])
        return shelf.sheet(dump)

    def _get_row(self, query: dict[str, str]) -> Any:
        _, shelf, dump = self._shelf(query["dump"])
        return shelf.row(dump, int(query["row"]))

    def _get_tokens(self, query: dict[str, str]) -> Any:
        run, shelf, dump = self._shelf(query["dump"])
        found = shelf.tokens(dump, int(query["row"]))
        with self._decoding:
            return {**found, "pieces": self._pieces[run].texts(found["ids"])}

    def _get_search(self, query: dict[str, str]) -> Any:
        _, shelf, dump = self._shelf(query["dump"])
        return shelf.search(dump, query["text"])

    def _get_history(self, query: dict[str, str]) -> Any:
        return [{**place, "dump": f"{run}/{place['dump']}", "run": run}
                for run, shelf in enumerate(self._shelves) for place in shelf.history(query["task"])]

    def _get_timeline(self, query: dict[str, str]) -> Any:
        return read_timeline(self._shelf(query["run"] + "/")[1].folder / "timeline.jsonl")

    def _picture(self, name: str, row: int, place: int, thumb: bool) -> tuple[str, bytes]:
        _, shelf, dump = self._shelf(name)
        data = shelf.picture(dump, row, place)
        kind = "png" if data.startswith(b"\x89PNG") else "jpeg" if data.startswith(b"\xff\xd8") else ""
        if thumb or not kind:
            with self._decoding:
                data = encode_image(decode_image(data, "picture"), THUMB if thumb else 2048)
            kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
        return f"image/{kind}", data


class Server(ThreadingHTTPServer):
    """Answers below http://host:port/SECRET/ until it is shut down. Raises UserError when it can't listen there."""

    daemon_threads = True

    def __init__(self, site: Site, host: str, port: int) -> None:
        self.site, self.secret = site, secrets.token_urlsafe(18)
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.names = {"localhost", host.lower(), socket.gethostname().lower()}
        try:
            super().__init__((host, port), Handler)
        except (OSError, OverflowError) as exc:
            raise UserError(f"--host {host} --port {port}: {exc}; --port 0 takes a free one") from None
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self.server_address[1]}/{self.secret}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that has gone away is no news; anything else is a bug and is shown."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def is_ours(self, header: str) -> bool:
        try:
            name = urlsplit(f"//{header}").hostname or ""
            ipaddress.ip_address(name)
            return True                   # an address is not a name that somebody else could point here
        except ValueError:
            return header.rsplit(":", 1)[0].lower() in self.names


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    timeout = 60

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        _, secret, path = (url.path + "//").split("/", 2)
        if not self.server.is_ours(self.headers.get("Host", "")):
            return self._send(403, "text/plain", b"the Host header names another server\n")
        if not hmac.compare_digest(secret.encode(), self.server.secret.encode()):
            return self._send(404, "text/plain", b"not found: open the address that hdpo report has printed\n")
        try:
            kind, body = self.server.site.answer(path.rstrip("/"), {k: v[0] for k, v in parse_qs(url.query).items()})
        except (DataError, KeyError, ValueError) as exc:
            return self._send(404, "text/plain; charset=utf-8", f"{exc}\n".encode("utf-8", "replace"))
        self._send(200, kind, body)

    def _send(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), "X-Content-Type-Options": "nosniff",
                            "Referrer-Policy": "no-referrer", "Cross-Origin-Resource-Policy": "same-origin",
                            "X-Frame-Options": "DENY",
                            "Cache-Control": "private, max-age=600" if kind.startswith("image/") else "no-store"}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """The address holds a secret: nothing is logged."""
