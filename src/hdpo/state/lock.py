"""One run at a time in a folder.

A lock of the operating system on RUN/.lock, which ends with the process that holds it, however that ends, and which network
file systems know (byte-range locks: NFS 3 with lockd, NFS 4). In the file stands who holds it. Where a file system has no
locks what stands there decides, and a holder that crashed on another machine has to be overruled (`--steal-lock`).
"""
from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from hdpo.errors import ConfigError, boundary

NAME = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@dataclass(frozen=True, slots=True)
class Holder:
    host: str
    pid: int
    since: str
    command: str

    def line(self) -> str:
        return f"pid {self.pid} on {self.host} ({self.command}), since {self.since}"


_mine: dict[tuple[int, int], Holder] = {}
"""Lock files that this process holds, by device and inode: to open and close one again would give the lock up."""


class RunLock:
    """Holds `folder`, which is made when it is missing, until `release` or the process's end.

    Raises ConfigError with one line that says who holds it; `field` names the folder where it can't be written. `steal`
    takes it all the same: a holder that still lives finds out (`lost`) and must not write any more.
    """

    def __init__(self, folder: Path, steal: bool = False, name: str = NAME, field: str = "run.folder") -> None:
        self.folder, self.path = folder, folder / name
        self._me = Holder(socket.gethostname(), os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S"), _command())
        with boundary(ConfigError, f"{field} {folder}", OSError):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self._stolen() if steal else self._taken()
            self._inode = _inode(self._file)
            _mine[self._inode] = self._me

    def lost(self) -> str:
        """Who has taken the folder over (`--steal-lock`), or an empty string."""
        try:
            found = os.stat(self.path)
        except OSError:
            return f"{self.path} is gone"
        if (found.st_dev, found.st_ino) == self._inode:
            return ""
        holder = read_holder(self.path)
        return f"{self.folder} was taken over by {holder.line() if holder else 'another process'} (--steal-lock)"

    def release(self) -> None:
        """Give the folder up; nothing happens the second time."""
        if self._file >= 0:
            if not self.lost():
                os.ftruncate(self._file, 0)
            _mine.pop(self._inode, None)
            os.close(self._file)
            self._file = -1

    def _taken(self) -> int:
        while True:
            if self.path.exists() and (own := _mine.get(_inode_of(self.path))):
                raise self._refused(own)
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            locked = _lock(file)
            if locked is False or (locked is None and _lives(read_holder(self.path))):
                os.close(file)
                raise self._refused(read_holder(self.path))
            if self.path.exists() and _inode(file) == _inode_of(self.path):     # else it was stolen meanwhile
                self._sign(file)
                return file
            os.close(file)

    def _stolen(self) -> int:
        """A lock file of our own in the place of the one that is held."""
        own = self.path.with_name(f"{self.path.name}.{self._me.host}.{self._me.pid}")
        file = os.open(own, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        _lock(file)
        self._sign(file)
        os.replace(own, self.path)
        return file

    def _sign(self, file: int) -> None:
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(asdict(self._me)).encode(), 0)
        os.fsync(file)

    def _refused(self, holder: Holder | None) -> ConfigError:
        return ConfigError(
            f"{self.folder} is in use by {holder.line() if holder else 'another process'}: let it end, stop it, or name "
            "another folder (run.name); --steal-lock takes it over from a process that is known to be gone")


def read_holder(path: Path) -> Holder | None:
    """Who last signed a lock file; None when it was given up or can't be read."""
    try:
        return Holder(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _lock(file: int) -> bool | None:
    """Whether the lock could be had; None where the file system has none."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        if exc.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if exc.errno in _NO_LOCKS:
            return None
        raise
    return True


def _lives(holder: Holder | None) -> bool:
    """Whether a holder may still be there, where no lock can tell: one on another machine may."""
    if holder is None or holder.host != socket.gethostname():
        return holder is not None
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _inode(file: int) -> tuple[int, int]:
    found = os.fstat(file)
    return found.st_dev, found.st_ino


def _inode_of(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino


def _command() -> str:
    """The command as a user knows it, without its settings, which may be long."""
    name = Path(sys.argv[0]).name
    words = ["hdpo" if name == "__main__.py" else name, *sys.argv[1:2]]
    return " ".join(word for word in words if not word.startswith("-")) or "python"
