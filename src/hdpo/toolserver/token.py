"""The bearer token of a tool server. A server always has one; clients of the same user on the same machine find it.

It comes by the environment (HDPO_TOOL_SERVER_TOKEN) or is made by the server, and is then in a file that only its user
reads, named by the port. Never in an argument, which every user of the machine sees, nor in a log.
"""
from __future__ import annotations

import contextlib
import os
import secrets
import stat
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

from hdpo.keys import key

VARIABLE = "HDPO_TOOL_SERVER_TOKEN"
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def new_token() -> str:
    return secrets.token_urlsafe(32)


def private_file(name: str) -> Path:
    """A path in this user's own folder for such things, which is made if need be. Raises OSError."""
    path = token_file(0).with_name(name)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    _check(path.parent)
    return path


def token_file(port: int) -> Path:
    """Where a server of this user at `port` leaves a token that it made."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    folder = Path(base) / "hdpo" if base else Path(tempfile.gettempdir()) / f"hdpo-{os.getuid()}"
    return folder / f"tool-server-{port}.token"


def leave_token(port: int) -> str:
    """The token a server at `port` has left before, or a new one, in its file. Raises OSError."""
    path = private_file(token_file(port).name)
    token = _read(path) or new_token()
    fd, name = tempfile.mkstemp(dir=path.parent)      # 0600 from the start
    with os.fdopen(fd, "w") as file:
        file.write(token)
    os.replace(name, path)
    return token


def forget_token(port: int) -> None:
    with contextlib.suppress(OSError):
        token_file(port).unlink()


def token_for(url: str) -> str:
    """The token to send to `url`: the environment's, or what a server of this user on this machine has left."""
    parts = urlsplit(url)
    return key(VARIABLE) or (_read(token_file(parts.port)) if parts.port and parts.hostname in LOOPBACK else "")


def _read(path: Path) -> str:
    try:
        _check(path.parent)
        return path.read_text().strip()
    except OSError:
        return ""


def _check(folder: Path) -> None:
    """Another user may have made the folder, to be sent tokens or to hand out his own."""
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise PermissionError(f"{folder} is not a folder of this user alone")
