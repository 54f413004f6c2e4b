"""Signs of life: a rank that dies, is stopped or hangs is named with its host and phase, and every other rank ends.

Synchronous training waits for its slowest rank, so one lost process otherwise means a silent cluster until a collective
times out, with a message that names nobody. Here every rank beats on a store from a thread of its own, whatever its
main thread does: a slow rollout beats, a killed or stopped process doesn't. Ranks of one machine see each other's death
in the process table at once. A main thread stuck in a collective beats on, and is found by the longer limit on a step's
progress. The first verdict is shared, so that all ranks of all nodes give the same reason.
"""
from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch.distributed as dist

from hdpo.errors import USER_STATUS, WORLD_STATUS, HdpoError, RankError, UserError, say

BEATS = 20          # beats within the limit of silence
START_S = 600.0     # how long the ranks wait for the slowest one before any silence counts
GRACE_S = 5.0       # between a verdict and the end of a process that doesn't end by itself
FAREWELL_S = 30.0   # how long the store's host waits for the others to leave


@dataclass(frozen=True, slots=True)
class Life:
    """What a rank tells the others."""

    host: str
    place: str          # machine and process namespace: where `pid` means this process
    pid: int
    phase: str = "start"
    step: int = 0       # steps done
    moves: int = 0      # phases entered so far
    progress: int = 0   # what was finished within phases: generations, verdicts, micro-batches
    beat: int = 0
    left: bool = False
    failure: str = ""   # why this rank is leaving early
    mendable: bool = False   # by the user: starting again would fail again

    def where(self) -> str:
        return f"{self.phase} of step {self.step + 1}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why all ranks end."""

    text: str                # which rank, where, and what happened
    cause: str = ""          # the error that rank had, if it had one
    mendable: bool = False

    @property
    def line(self) -> str:
        return f"{self.text}; this rank stops"

    @property
    def status(self) -> int:
        return USER_STATUS if self.mendable else WORLD_STATUS

    def error(self) -> HdpoError:
        return UserError(self.line) if self.mendable else RankError(self.line)


@dataclass(frozen=True, slots=True)
class Limits:
    silent_s: float = 45.0     # a rank that gives no sign of life for so long is dead or stopped
    stuck_s: float = 5400.0    # when no rank enters another phase or finishes anything for so long, the run hangs


class Watchdog:
    """Beats for this rank and watches the others until `close`. `end` is called with the verdict in a dying run.

    Raises nothing: what it finds is a verdict (`verdict`), and `end` after GRACE_S, unless the process ends before.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, limits: Limits,
                 end: Callable[[Verdict], None] | None = None) -> None:
        self.rank, self.size, self.limits = rank, size, limits
        self.verdict: Verdict | None = None
        self._end = end or _end
        self._tick = limits.silent_s / BEATS
        self._me = Life(socket.gethostname(), _place(), os.getpid())
        self._lives: dict[int, Life] = {}
        self._silent: dict[int, float] = dict.fromkeys(range(size), 0.0)
        self._still: dict[int, float] = dict.fromkeys(range(size), 0.0)
        self._gone: dict[int, int] = dict.fromkeys(range(size), 0)
        self._heard = time.monotonic()
        self._told = False             # whether the others can know that this rank has left
        self._closed, self._wake = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        # A connection of its own: the main thread may be waiting on the other one.
        self._store = store.clone()   # type: ignore[attr-defined]
        if rank == 0:
            self._store.set("life/verdict", "-")
        self._publish()
        self._store.wait([f"life/{other}" for other in range(size)], datetime.timedelta(seconds=START_S))
        self._heard = time.monotonic()
        self._threads = [threading.Thread(target=work, name=f"hdpo-watchdog-{work.__name__}", daemon=True)
                         for work in (self._exchange, self._judge)]
        for thread in self._threads:
            thread.start()

    # -- called by the rank's own work -----------------------------------------------------------------------------

    def phase(self, name: str, step: int | None = None) -> None:
        """This rank enters a phase; `step` steps are done."""
        with self._lock:
            self._me = replace(self._me, phase=name, step=self._me.step if step is None else step, moves=self._me.moves + 1)

    def progress(self) -> None:
        """Something within the phase was finished: a long phase that goes on is no hang. Cheap, from any thread."""
        with self._lock:
            self._me = replace(self._me, progress=self._me.progress + 1)

    def failed(self, reason: str, mendable: bool = False) -> None:
        """Tell the others that this rank is about to leave with an error; `mendable` by the user alone."""
        with self._lock:
            self._me = replace(self._me, failure=reason or "no reason given", mendable=mendable)
        self._wake.set()

    def blame(self, wait_s: float | None = None) -> Verdict | None:
        """The verdict about another rank, if there is one within `wait_s` (default: four beats).

        For a collective that failed: its message says "connection closed", this says who closed it.
        """
        deadline = time.monotonic() + (4 * self._tick if wait_s is None else wait_s)
        while not self.verdict and time.monotonic() < deadline and self._threads[0].is_alive():
            time.sleep(0.05)
        return self.verdict

    def close(self) -> None:
        """Leave. The store's host stays until all others have left or failed, for at most FAREWELL_S."""
        with self._lock:
            self._me = replace(self._me, left=True)
        deadline = time.monotonic() + (FAREWELL_S if self.rank == 0 else 2 * self._tick)
        while time.monotonic() < deadline and self._threads[0].is_alive():
            self._wake.set()
            if self._told and (self.rank != 0 or self._alone()):
                break
            time.sleep(0.05)
        self._closed.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(timeout=1.0)

    # -- threads -----------------------------------------------------------------------------------------------------

    def _exchange(self) -> None:
        """Publish and read, once a tick. Alone in this thread, because a stopped host of the store blocks it."""
        last = time.monotonic()
        while not self._closed.is_set():
            try:
                told = self._publish()
                values = self._store.multi_get([*(f"life/{rank}" for rank in range(self.size)), "life/verdict"])
            except RuntimeError as exc:    # DistNetworkError, DistStoreError: the store's host is gone
                self._lost_store(exc)
                return
            # A tick that came late (a suspended machine, a held interpreter lock) says nothing about the others.
            now = self._heard = time.monotonic()
            elapsed, last = min(now - last, 2 * self._tick), now
            for rank in range(self.size):
                self._note(rank, Life(**json.loads(values[rank])), elapsed)
            shared = values[-1].decode()
            self._conclude(Verdict(**json.loads(shared)) if shared != "-" else self._finding())
            self._told = told
            if self.verdict and self.rank != 0:    # rank 0 keeps the store open until all have read the verdict
                return
            self._wake.wait(self._tick)
            self._wake.clear()

    def _judge(self) -> None:
        """Notice that the store is silent, and end the process once there is a verdict."""
        silent, last = 0.0, time.monotonic()
        while not self._closed.wait(self._tick / 2):
            now = time.monotonic()
            silent = 0.0 if self._heard > last else silent + min(now - last, self._tick)
            last = now
            if silent > self.limits.silent_s and not self.verdict:
                self._conclude(Verdict(self._describe(0, f"gave no sign of life for {silent:.0f} s")))
            if self.verdict:
                if not self._closed.wait(GRACE_S):
                    self._end(self.verdict)
                return

    # -- findings ----------------------------------------------------------------------------------------------------

    def _publish(self) -> bool:
        """Beat; whether it said farewell."""
        with self._lock:
            self._me = me = replace(self._me, beat=self._me.beat + 1)
        self._store.set(f"life/{self.rank}", json.dumps(asdict(me)))
        return me.left

    def _note(self, rank: int, life: Life, elapsed: float) -> None:
        before = self._lives.get(rank)
        self._lives[rank] = life
        beats, done = (before.beat, (before.moves, before.progress)) if before else (-1, None)
        self._silent[rank] = self._silent[rank] + elapsed if life.beat == beats else 0.0
        self._still[rank] = self._still[rank] + elapsed if (life.moves, life.progress) == done else 0.0
        # Twice: between our reading of the store and of the process table a rank may have left properly.
        gone = rank != self.rank and life.place == self._me.place and _process_gone(life.pid)
        self._gone[rank] = self._gone[rank] + 1 if gone else 0

    def _finding(self) -> Verdict | None:
        """What is wrong with another rank, if anything is."""
        for rank, life in self._lives.items():
            if rank == self.rank or (life.left and not life.failure):
                continue
            if life.failure:
                return Verdict(self._describe(rank, f"failed: {life.failure}"), life.failure, life.mendable)
            if self._gone[rank] >= 2:
                return Verdict(self._describe(rank, "died"))
            if self._silent[rank] > self.limits.silent_s:
                return Verdict(self._describe(rank, f"gave no sign of life for {self._silent[rank]:.0f} s"))
        here = [rank for rank, life in self._lives.items() if not life.left]
        if here and not self._me.left and min(self._still[rank] for rank in here) > self.limits.stuck_s:
            return Verdict(self._stuck(here))
        return None

    def _stuck(self, here: list[int]) -> str:
        first = min(self._lives[rank].moves for rank in here)
        behind = [rank for rank in here if self._lives[rank].moves == first]
        if len(behind) == len(here):
            return f"hang: no rank left {self._me.where()} for {self._still[self.rank]:.0f} s: all of them hang"
        ahead = max(here, key=lambda rank: self._lives[rank].moves)
        hosts = ", ".join(f"{rank} on {self._lives[rank].host}" for rank in behind)
        return (f"hang: rank {hosts} did not come out of {self._lives[behind[0]].where()} for {self._still[behind[0]]:.0f} s; "
                f"others wait in {self._lives[ahead].where()}")

    def _describe(self, rank: int, what: str) -> str:
        life = self._lives.get(rank)
        if life is None:
            return f"rank {rank} {what} before it was first heard of"
        return f"rank {rank} on {life.host} (pid {life.pid}) {what}, in {life.where()}"

    def _conclude(self, finding: Verdict | None) -> None:
        """Keep the first verdict of all ranks; a rank that the verdict is about takes it too, if it still can."""
        if finding is None or self.verdict is not None:
            return
        if threading.current_thread() is self._threads[0]:
            with contextlib.suppress(RuntimeError):
                first = self._store.compare_set("life/verdict", "-", json.dumps(asdict(finding)))
                finding = Verdict(**json.loads(first))
        if not self._me.failure and not self._me.left:
            self.verdict = finding

    def _lost_store(self, exc: RuntimeError) -> None:
        host = self._lives.get(0)
        expected = self._me.left or self._closed.is_set() or (host is not None and (host.left or self._alone()))
        if self.rank != 0 and not expected:
            if host is not None and host.failure:
                self._conclude(Verdict(self._describe(0, f"failed: {host.failure}"), host.failure, host.mendable))
            else:
                self._conclude(Verdict(self._describe(0, "died (its connection closed)")))

    def _alone(self) -> bool:
        return len(self._lives) == self.size and all(
            life.left or life.failure or self._gone[rank] for rank, life in self._lives.items() if rank != self.rank)


def _place() -> str:
    """The machine since its last boot and the process namespace, or a name nobody shares."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return f"{socket.gethostname()}-{os.getpid()}"


def _process_gone(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state in "ZX"


def _end(verdict: Verdict) -> None:
    """One line and out: the main thread may never come back from its collective. In a hang, also where it is."""
    main = sys._current_frames().get(threading.main_thread().ident or 0)
    if verdict.text.startswith("hang") and main is not None:
        sys.stderr.write("".join(["the main thread is here:\n", *traceback.format_stack(main)[-4:]]))
    say(verdict.line, verdict.cause)
    os._exit(verdict.status)
