"""Which trajectories hold a Python session, in a file: a server that is started again knows what its former life has lost.

Our own client says itself that it expects a session. A client of the reference's format doesn't; its next call would run in
a fresh session without a word.
"""
from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

from hdpo.toolserver.token import private_file

log = logging.getLogger(__name__)
KEEP_S = 24 * 3600.0
"""Age from which an entry of a former life means nothing any more, seconds."""


class Journal:
    """Appends as sessions begin and end. `path` None keeps nothing. What can't be written is said once, and ends nothing."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.lost = self._read() if path is not None else {}
        self._open: set[str] = set()
        self._write([f"+{name} {number} {began:.0f}" for name, (number, began) in self.lost.items()], afresh=True)

    def called(self, trajectory_id: str, number: int) -> None:
        """The trajectory's session has been given its call of this number."""
        self._open.add(_name(trajectory_id))
        self._write([f"+{_name(trajectory_id)} {number} {time.time():.0f}"])

    def ended(self, trajectory_id: str) -> None:
        self.lost.pop(_name(trajectory_id), None)
        self._open.discard(_name(trajectory_id))
        self._write([f"-{_name(trajectory_id)}"])

    def calls_lost(self, trajectory_id: str) -> int:
        """How many calls the trajectory made in sessions of a former life; told once."""
        return self.lost.pop(_name(trajectory_id), (0, 0.0))[0]

    def close(self) -> None:
        """Without open sessions there is nothing to tell."""
        if self.path is not None and not self._open:
            self.path.unlink(missing_ok=True)

    def _read(self) -> dict[str, tuple[int, float]]:
        assert self.path is not None
        found: dict[str, tuple[int, float]] = {}
        with contextlib.suppress(OSError):
            for line in self.path.read_text().splitlines():
                parts = line[1:].split()
                with contextlib.suppress(ValueError, IndexError):      # the last one may be cut
                    if line[0] == "-":
                        found.pop(parts[0], None)
                    elif float(parts[2]) > time.time() - KEEP_S:
                        found[parts[0]] = int(parts[1]), float(parts[2])
        return found

    def _write(self, lines: list[str], afresh: bool = False) -> None:
        if self.path is None:
            return
        flags = os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if afresh else os.O_APPEND)
        try:
            with open(os.open(self.path, flags, 0o600), "w") as file:
                file.write("".join(line + "\n" for line in lines))
        except OSError as exc:
            log.warning("sessions are not noted for a later server (%s)", exc)
            self.path = None


@contextlib.contextmanager
def open_journal(name: str) -> Iterator[Journal]:
    """That of a server of this name: its port, and where it stands behind a front, its number."""
    try:
        path: Path | None = private_file(f"tool-server-{name}.sessions")
    except OSError as exc:
        log.warning("sessions are not noted for a later server (%s)", exc)
        path = None
    journal = Journal(path)
    try:
        yield journal
    finally:
        journal.close()


def _name(trajectory_id: str) -> str:
    return hashlib.sha256(trajectory_id.encode("utf-8", "surrogatepass")).hexdigest()[:32]
