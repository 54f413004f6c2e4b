"""Who owns what a sandbox leaves on the machine: a lock that ends with its holder, whoever looks from wherever.

A process id says nothing to a job in another PID namespace or on another node; a file lock does to all that see the file.
What can't be judged because its lock isn't in sight is left alone.
"""
from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
import uuid
from pathlib import Path

PREFIX = "hdpo-sandbox-"
FRESH_S = 600.0
"""Age from which a folder without a lock was left by a process that died while it made it, seconds."""


class OwnedFolder:
    """A new temporary folder, locked as long as this process lives or until `remove`."""

    def __init__(self, kind: str) -> None:
        self.id = uuid.uuid4().hex
        self.path = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{kind}-{os.getpid()}-"))
        self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        os.write(self._lock, self.id.encode())

    @property
    def label(self) -> str:
        """By which others find the lock."""
        return f"{os.getpid()}:{self.id}:{self.path / 'lock'}"

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def is_gone(label: str) -> bool:
    """Whether the owner that wrote `label` has ended for certain."""
    _, _, rest = label.partition(":")
    owner, _, lock = rest.partition(":")
    return bool(lock) and _free(Path(lock), owner)


def reap_folders(kind: str) -> None:
    """Remove the folders of owners that have ended."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}{kind}-*"):
        if _free(folder / "lock"):
            shutil.rmtree(folder, ignore_errors=True)


def _free(lock: Path, owner: str = "") -> bool:
    try:
        fd = os.open(lock, os.O_RDWR)
    except FileNotFoundError:
        return not owner and _old(lock.parent)
    except OSError:      # another user's
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        said = os.read(fd, 64).decode("ascii", "replace")
        return said == owner if owner else said != "" or _old(lock.parent)
    except OSError:
        return False
    finally:
        os.close(fd)


def _old(folder: Path) -> bool:
    try:
        return time.time() - folder.stat().st_mtime > FRESH_S
    except OSError:
        return False
