"""One checkpoint on its way to the disk, in a thread, while training goes on."""
from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hdpo.ranks.world import World
from hdpo.state.shards import TrainingState, manifest_path, shard_path, sync_folder, write_manifest, write_state

POLL_S = 0.05


class Writing:
    """Writes this rank's files into `partial`; on rank 0 calls `commit` when the files of every rank are there.

    Ranks meet through their manifests in the folder, never through a collective: the main threads are training.
    """

    def __init__(self, world: World, final: Path, partial: Path, write_model: Callable[[], list[Path]], state: TrainingState,
                 summary: dict[str, Any], commit: Callable[[], None]) -> None:
        self.world, self.final, self.partial = world, final, partial
        self._summary, self._commit = summary, commit
        self.error = ""
        self.wrote = threading.Event()       # this rank's files are on the disk, or have failed
        self._give_up = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(write_model, state), name="hdpo-checkpoint", daemon=True)
        self._thread.start()

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def finish(self, seconds: float) -> None:
        """Wait for this rank's own files, and at most `seconds` more for the others' and the commit."""
        self.wrote.wait()
        self._thread.join(seconds)
        self._give_up.set()
        self._thread.join()

    def _run(self, write_model: Callable[[], list[Path]], state: TrainingState) -> None:
        try:
            self._write(write_model, state)
            state.written.set()
            self.wrote.set()
            if self.world.is_main and self._others_wrote():
                sync_folder(self.partial / "trainer")
                sync_folder(self.partial)
                self._commit()
        except Exception as exc:   # noqa: BLE001  a thread's boundary: the main thread raises it on every rank
            self.error = (exc.strerror if isinstance(exc, OSError) else "") or " ".join(str(exc).split()) or type(exc).__name__
        finally:
            state.written.set()
            self.wrote.set()

    def _write(self, write_model: Callable[[], list[Path]], state: TrainingState) -> None:
        rank, trainer = self.world.rank, self.partial / "trainer"
        files = write_model()
        write_state(shard_path(trainer, rank), state)
        files.append(shard_path(trainer, rank))
        if self.world.is_main:
            (trainer / "state.json").write_text(json.dumps(self._summary))
            files.append(trainer / "state.json")
        write_manifest(trainer, self.partial, rank, files)

    def _others_wrote(self) -> bool:
        """Wait for every rank's manifest; False when told to give up."""
        paths = [manifest_path(self.partial / "trainer", rank) for rank in range(self.world.size)]
        while missing := [path for path in paths if not path.exists()]:
            if self._give_up.wait(POLL_S):
                self.error = f"{missing[0]} did not appear; do all nodes see the same run.folder?"
                return False
        return True
