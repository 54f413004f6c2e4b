"""Pictures of trajectories as files, each once however many trajectories have it, named by the SHA-256 of its bytes.

    FOLDER/all/KEY         what can be had; beyond a bound, what no trajectory holds goes, longest unused first
    FOLDER/held/PID/NAME   what a server's trajectories hold: links, so that a picture is there as long as anyone has it

The file system counts who holds what, so that servers of a machine share a folder without a lock, and one that is killed
can be cleaned up after. What a trajectory holds is let go when the object is that stands for it.
"""
from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
import threading
import time
import weakref
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import overload

KEY = re.compile(r"[0-9a-f]{64}")
GRACE_S = 30.0
"""A picture that was put or asked for in this time stays: whoever sent it is about to call, seconds."""
SMALL_BYTES = 1 << 15
"""Pictures of a reply that together have less stay in memory."""


class MissingPictures(Exception):
    """The store lacks `keys`."""

    def __init__(self, keys: Sequence[str]) -> None:
        super().__init__(keys)
        self.keys = list(keys)


class HeldPictures(Sequence[bytes]):
    """Pictures that are read when they are asked for."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> list[bytes]: ...

    def __getitem__(self, index: int | slice) -> bytes | list[bytes]:
        if isinstance(index, slice):
            return [path.read_bytes() for path in self._paths[index]]
        return self._paths[index].read_bytes()


def key_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class PictureStore:
    """One per server process. Methods may be called from any thread and raise OSError where the disk fails.

    `limit`: bytes of pictures that no trajectory holds.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._all, self._held = folder / "all", folder / "held" / str(os.getpid())
        for path in (self._all, self._held):
            path.mkdir(parents=True, exist_ok=True)
        for other in self._held.parent.iterdir():      # of a process of this folder that was killed
            if not Path("/proc", other.name).exists():
                shutil.rmtree(other, ignore_errors=True)
        self._links: Counter[str] = Counter()      # by key: how many objects of this process hold it
        self._kept = self._loose = 0               # replies written; bytes that became loose since the last look
        self._lock = threading.RLock()             # finalizers may run anywhere

    def put(self, key: str, data: bytes) -> bool:
        """Take a picture in. False where `key` isn't that of `data`."""
        if key_of(data) != key:
            return False
        if not (self._all / key).exists():
            fd, name = tempfile.mkstemp(dir=self._held)
            try:
                with os.fdopen(fd, "wb") as file:
                    file.write(data)
                os.rename(name, self._all / key)
            except OSError:
                with contextlib.suppress(OSError):
                    os.unlink(name)
                raise
            self._loosened(len(data))
        return True

    def hold(self, keys: Sequence[str]) -> HeldPictures:
        """Raises MissingPictures."""
        missing: list[str] = []
        taken: list[str] = []
        with self._lock:
            for key in keys:
                try:
                    if not self._links[key]:
                        os.link(self._all / key, self._held / key)
                except FileNotFoundError:
                    missing.append(key)
                    continue
                except OSError:
                    self._release(taken)
                    raise
                self._links[key] += 1
                taken.append(key)
                with contextlib.suppress(OSError):
                    os.utime(self._all / key)
            if missing:
                self._release(taken)
                raise MissingPictures(list(dict.fromkeys(missing)))
        held = HeldPictures([self._held / key for key in keys])
        weakref.finalize(held, self._release, list(keys)).atexit = False
        return held

    def take(self, images: Sequence[bytes]) -> HeldPictures:
        """Hold pictures that came as bytes."""
        keys = [key_of(image) for image in images]
        for _ in range(10):      # another server of this folder may drop one that is just in
            for key, image in zip(keys, images):
                self.put(key, image)
            with contextlib.suppress(MissingPictures):
                return self.hold(keys)
        raise OSError(f"{self.folder}: pictures vanish as they are written")

    def keep(self, images: Sequence[bytes]) -> Sequence[bytes]:
        """Pictures of a reply, which nobody else has: out of memory, unless they are small."""
        if sum(map(len, images)) < SMALL_BYTES:
            return images
        with self._lock:
            self._kept += 1
            paths = [self._held / f"reply-{self._kept}-{number}" for number in range(len(images))]
        held = HeldPictures(paths)
        weakref.finalize(held, _unlink, paths).atexit = False
        for path, image in zip(paths, images):
            path.write_bytes(image)
        return held

    def close(self) -> None:
        shutil.rmtree(self._held, ignore_errors=True)

    def _release(self, keys: Sequence[str]) -> None:
        with self._lock:
            self._links.subtract(keys)
            for key in set(keys):
                if self._links[key] <= 0:
                    del self._links[key]
                    with contextlib.suppress(OSError):
                        size = (self._held / key).stat().st_size
                        (self._held / key).unlink()
                        self._loosened(size)

    def _loosened(self, size: int) -> None:
        with self._lock:
            self._loose += size
            if self._loose > self.limit // 16:
                self._loose = 0
                self._drop()

    def _drop(self) -> None:
        """What nobody holds and nobody has asked for lately, beyond the limit."""
        free = []
        for entry in os.scandir(self._all):
            with contextlib.suppress(OSError):      # another server was faster
                status = entry.stat()
                if status.st_nlink == 1:
                    free.append((status.st_mtime_ns, status.st_size, entry.path))
        total = sum(size for _, size, _ in free)
        for used, size, path in sorted(free):
            if total <= self.limit or used / 1e9 > time.time() - GRACE_S:
                return
            total -= size
            _unlink([Path(path)])


def _unlink(paths: Sequence[Path]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink()
