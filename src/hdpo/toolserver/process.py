"""A tool server as a process of this machine, started by a trainer, a test or a benchmark."""
from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from hdpo.errors import ToolServerError
from hdpo.keys import environment_with_keys, key
from hdpo.toolserver.token import VARIABLE, new_token

log = logging.getLogger(__name__)

STOP_S = 10.0
MAX_WAIT_S = 30.0      # between two attempts to start a server that ends at once


class NotStarted(ToolServerError):
    """A server that says why it ended where this process's own words go; `status` is its exit status."""

    def __init__(self, status: int) -> None:
        super().__init__(f"the tool server did not start: it ended with status {status}")
        self.status = status


def start_tool_server(options: Sequence[str] = (), log: str | Path | None = os.devnull,
                      environment: Mapping[str, str] | None = None) -> tuple[subprocess.Popen[str], str]:
    """(process, URL) once it listens. It ends with this process, however that ends; what it says is appended to `log`
    (None: goes where this process's words go).

    It has a session of its own: Ctrl-C at the terminal reaches the trainer, which needs its tools until it has left the step.
    Raises ToolServerError with the last line of the log when it does not start. `environment` replaces this process's, with the
    keys that were withdrawn from it.
    """
    command = [sys.executable, "-m", "hdpo.toolserver.app", "--parent-pid", str(os.getpid()), *options]
    with contextlib.nullcontext() if log is None else open(log, "a") as said:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True, start_new_session=True,
                                  env=environment_with_keys() if environment is None else environment)
    assert server.stdout is not None
    url = server.stdout.readline().strip()
    if not url.startswith("http"):
        status = server.wait(timeout=10)
        if log is None:
            raise NotStarted(status)
        tail = Path(log).read_text().strip().splitlines()[-1:] or ["no message"]
        raise ToolServerError(f"the tool server did not start (see {log}): {tail[0]}")
    return server, url


class KeptToolServer:
    """A tool server that is started again, at the same address, whenever it ends and nobody stopped it.

    Calls wait for it meanwhile; trajectories whose sessions it held end as failures of ours (see sessions.py). Raises
    ToolServerError when it does not start the first time. `token` is what it will ask its clients for.
    """

    def __init__(self, options: Sequence[str], said: str | Path | None) -> None:
        self.token = key(VARIABLE) or new_token()
        self._environment = {**environment_with_keys(), VARIABLE: self.token}
        self._server, self.url = start_tool_server(options, said, self._environment)
        self._options, self._said = [*options, "--port", self.url.rsplit(":", 1)[1]], said
        self._stopped, self._lock = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._keep, name="hdpo-tool-server", daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int:
        return self._server.pid

    def stop(self) -> None:
        """End it for good."""
        self._stopped.set()
        if self._lock.acquire(timeout=STOP_S):      # not between a start and its noting; one that hangs ends with this process
            self._lock.release()
        self._server.terminate()
        try:
            self._server.wait(timeout=STOP_S)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()
        self._thread.join(STOP_S)

    def _keep(self) -> None:
        wait = 0.0
        while True:
            status = self._server.wait()
            if self._stopped.wait(wait):
                return
            log.warning("the tool server ended with status %d (see %s); it is started again", status, self._said or "above")
            with self._lock:
                if self._stopped.is_set():
                    return
                try:
                    self._server, _ = start_tool_server(self._options, self._said, self._environment)
                    wait = 1.0
                except ToolServerError as exc:
                    log.warning("%s", exc)
                    wait = min(MAX_WAIT_S, 2 * wait + 1)
