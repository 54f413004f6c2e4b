"""A tool server as a process of this machine, started by a trainer, a test or a benchmark."""
from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from hdpo.errors import ToolServerError


def start_tool_server(options: Sequence[str] = (), log: str | Path = os.devnull,
                      environment: Mapping[str, str] | None = None) -> tuple[subprocess.Popen[str], str]:
    """(process, URL) once it listens. It ends with this process, however that ends; what it says is appended to `log`.

    It has a session of its own: Ctrl-C at the terminal reaches the trainer, which needs its tools until it has left the step.
    Raises ToolServerError with the last line of the log when it does not start.
    """
    command = [sys.executable, "-m", "hdpo.toolserver.app", "--parent-pid", str(os.getpid()), *options]
    with open(log, "a") as said:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True, start_new_session=True,
                                  env=environment)
    assert server.stdout is not None
    url = server.stdout.readline().strip()
    if not url.startswith("http"):
        server.wait(timeout=10)
        tail = Path(log).read_text().strip().splitlines()[-1:] or ["no message"]
        raise ToolServerError(f"the tool server did not start (see {log}): {tail[0]}")
    return server, url
