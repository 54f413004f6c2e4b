"""The supervisor of one session: starts it, interrupts it when told to, ends it when the client or the session is gone.

It runs outside the session's PID namespace. The client talks to the session itself, over a socket that it passes in;
this process sees nothing of what they say. Its own connection carries one-byte orders: INTERRUPT, acknowledged once
the signal is sent; and its end is the order to kill.
"""
from __future__ import annotations

import argparse
import os
import select
import shutil
import signal
import socket
import tempfile
from collections.abc import Callable
from typing import Any

import isolation
from session import log, run_session

INTERRUPT = b"i"


class Supervisor:
    """Forks one session and stays until it has to be killed."""

    def __init__(self, client: socket.socket, options: argparse.Namespace) -> None:
        self.client, self.options = client, options
        self.private = "namespaces" in options.controls
        self.pid = 0

    def run(self) -> None:
        data = self._data_socket()
        self.work = self.options.work if self.private else tempfile.mkdtemp(prefix="session-", dir=self.options.work)
        os.setsid()
        isolation.adopt_orphans()
        if "user" in self.options.controls:
            if not self.private and os.geteuid() == 0:
                os.chown(self.work, 65534, 65534)
            isolation.drop_root()
        if self.private:
            isolation.unshare(["user", "mount", "pid", "ipc", "uts"])
        isolation.die_with_parent()
        self.pid = os.fork()
        if self.pid == 0:
            run_in_fork(self._session, data)
        data.close()
        try:
            self._obey()
        finally:
            self._kill()
            if not self.private:
                shutil.rmtree(self.work, ignore_errors=True)

    def _data_socket(self) -> socket.socket:
        """The session's end of its conversation with the client, passed in with the first byte."""
        _, fds, _, _ = socket.recv_fds(self.client, 1, 1)
        if not fds:
            raise SystemExit(0)    # the client is gone already, or is none
        return socket.socket(fileno=fds[0])

    def _session(self, data: socket.socket) -> None:
        self.client.close()
        run_session(data, self.options, self.work)

    def _obey(self) -> None:
        """Until the client hangs up or the session ends."""
        poll = select.poll()
        poll.register(self.client, select.POLLIN)
        poll.register(os.pidfd_open(self.pid), select.POLLIN)
        while [fd for fd, _ in poll.poll()] == [self.client.fileno()]:
            if self.client.recv(1) != INTERRUPT:
                return
            os.kill(self.pid, signal.SIGINT)
            self.client.sendall(INTERRUPT)

    def _kill(self) -> None:
        """SIGKILL the session; its PID namespace, or failing that every descendant, goes with it."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        while not self.private and (rest := _children()):   # orphans come to us: this process adopts them
            for pid in rest:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


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
