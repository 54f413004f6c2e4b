"""The supervisor of one session: relays between the client and the session, interrupts, kills, cleans up.

It runs outside the session's PID namespace, holds no code of the model, and parses nothing the session says.
"""
from __future__ import annotations

import argparse
import os
import select
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable
from typing import Any

import frames
import isolation
from session import log, run_session

INTERRUPT_GRACE_S = 0.35
START_TIMEOUT_S = 60.0
SEND_TIMEOUT_S = 30.0
MAX_REPLY_JSON, MAX_REPLY_BLOBS = 4 << 20, 64 << 20


class Supervisor:
    """Relays between the client and one session, and ends the session when time or the client is gone."""

    def __init__(self, client: socket.socket, options: argparse.Namespace) -> None:
        self.client, self.options = client, options
        self.private = "namespaces" in options.controls
        self.work = options.work if self.private else tempfile.mkdtemp(prefix="session-", dir=options.work)
        self.pid = 0
        self.inner: socket.socket
        self._received = bytearray()      # of an answer not yet complete

    def run(self) -> None:
        os.setsid()
        isolation.adopt_orphans()
        if "user" in self.options.controls:
            if not self.private and os.geteuid() == 0:
                os.chown(self.work, 65534, 65534)
            isolation.drop_root()
        if self.private:
            isolation.unshare(["user", "mount", "pid", "ipc", "uts"])
        isolation.die_with_parent()
        self.inner, other = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            run_in_fork(self._session, other)
        other.close()
        self.inner.settimeout(SEND_TIMEOUT_S)
        self._answering, self._idle = select.poll(), select.poll()
        self._answering.register(self.inner, select.POLLIN)
        self._answering.register(self.client, select.POLLRDHUP)
        self._idle.register(self.client, select.POLLIN | select.POLLRDHUP)
        self._idle.register(self.inner, select.POLLIN | select.POLLRDHUP)
        try:
            self._relay()
        except (EOFError, OSError, frames.FrameError) as exc:
            log(f"session ends: {type(exc).__name__} {exc}".rstrip())
        finally:
            self._kill()
            if not self.private:
                shutil.rmtree(self.work, ignore_errors=True)

    def _session(self, conn: socket.socket) -> None:
        self.client.close()
        self.inner.close()
        run_session(conn, self.options, self.work)

    def _relay(self) -> None:
        self._pass_in(*self._from_client())                 # images
        self.client.sendall(self._from_session(time.monotonic() + START_TIMEOUT_S))
        while True:
            self._wait_for_client()
            header, text, payload = self._from_client()
            message, _ = frames.unpack(text, payload)
            if not self._answer(message, header + text + payload):
                return

    def _answer(self, message: dict[str, Any], raw: bytes) -> bool:
        """Run one cell. False when the session is gone."""
        timeout = min(float(message["timeout"]), 3600.0)
        started = time.monotonic()
        status, reply = "ok", b""
        try:
            self.inner.sendall(raw)
            reply = self._from_session(started + timeout)
        except TimeoutError:
            os.kill(self.pid, signal.SIGINT)
            try:
                reply = self._from_session(time.monotonic() + INTERRUPT_GRACE_S)
                status = "interrupted"
            except TimeoutError:
                status = "killed"
            except (EOFError, OSError, frames.FrameError):
                status = "died"
        except (EOFError, ConnectionError, frames.FrameError):
            status = "died"
        if not reply:
            self._kill()
        verdict = {"status": status, "seconds": round(time.monotonic() - started, 4)}
        self.client.sendall(frames.pack(verdict) + reply)
        return bool(reply)

    def _from_client(self) -> tuple[bytes, bytes, bytes]:
        try:
            header = frames.read_exactly(self.client, frames.HEADER.size)
        except EOFError:
            raise ClientGone from None
        json_size, blob_size = frames.sizes(header)
        return header, frames.read_exactly(self.client, json_size), frames.read_exactly(self.client, blob_size)

    def _pass_in(self, *parts: bytes) -> None:
        for part in parts:
            self.inner.sendall(part)

    def _from_session(self, deadline: float) -> bytes:
        """One whole frame, unparsed. Raises TimeoutError (what came so far is kept), EOFError, FrameError, ClientGone."""
        data, need = self._received, frames.HEADER.size
        if len(data) >= need:     # a frame that had begun before its deadline
            need += sum(frames.sizes(bytes(data[:need]), MAX_REPLY_JSON, MAX_REPLY_BLOBS))
        while len(data) < need:
            self._receive(deadline)
            if need == frames.HEADER.size <= len(data):
                need += sum(frames.sizes(bytes(data[:need]), MAX_REPLY_JSON, MAX_REPLY_BLOBS))
        if len(data) > need:
            raise frames.FrameError("more than one answer")
        self._received = bytearray()
        return bytes(data)

    def _receive(self, deadline: float) -> None:
        events = dict(self._answering.poll(max(0.0, deadline - time.monotonic()) * 1000))
        if self.client.fileno() in events:
            raise ClientGone
        if not events:
            raise TimeoutError
        chunk = self.inner.recv(1 << 18)
        if not chunk:
            raise EOFError("the session closed its end")
        self._received += chunk

    def _wait_for_client(self) -> None:
        """Until the client speaks. Raises EOFError when the session dies between cells, or speaks out of turn."""
        if self.inner.fileno() in dict(self._idle.poll()):
            raise EOFError("between cells")

    def _kill(self) -> None:
        """SIGKILL the session; its PID namespace, or failing that every descendant, goes with it."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = 0
        while not self.private and (rest := _children()):   # orphans come to us: this process adopts them
            for pid in rest:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


class ClientGone(SystemExit):
    """The client hung up: nobody is left to answer."""


def _children() -> list[int]:
    with open(f"/proc/self/task/{os.getpid()}/children") as handle:
        return [int(pid) for pid in handle.read().split()]


def run_in_fork(body: Callable[..., None], *args: Any) -> None:
    """Run `body` in a fresh fork and never return from it."""
    code = 1
    try:
        body(*args)
        code = 0
    except SystemExit:
        code = 0
    except BaseException as exc:  # noqa: B036,B902,BLE001 - a fork must not return into its parent's code
        log(f"{getattr(body, '__qualname__', body)}: {type(exc).__name__}: {exc}")
    finally:
        os._exit(code)
