"""The supervisor of one session: starts it, obeys its client, holds it to its limits, and says at the end who ended it.

It runs outside the session's PID namespace. The client talks to the session itself, over a socket pair of their own; this
process sees nothing of what they say. Its own connection carries one byte at a time. Orders: INTERRUPT the cell, which is
acknowledged once the signal is sent, by the same byte or by STARVED; PAUSE, when no cell is running: everything stops, and
what was still at work ends; RESUME, before the next cell; WATCH: the cell is a long one, and at its interrupt it will be asked
whether it was starved. The connection's end is the order to kill. Said by the supervisor before it hangs up: one of the bytes
below, its evidence of how the session ended.
"""
from __future__ import annotations

import argparse
import os
import select
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable
from typing import Any

import isolation
from session import log, run_session
from turns import Turns
from watch import SUPERVISOR_NICE, Account

INTERRUPT, PAUSE, RESUME, WATCH = b"i", b"p", b"c", b"w"
STARVED = b"s"           # by others, of processors, for most of its time
ENDED_ITSELF = b"x"      # by an exit, a crash, or a signal of its own
OVER_LIMIT = b"m"        # killed: it held more memory than it may
CROWDED_OUT = b"n"       # killed within its limit, because the memory for all sessions was used up
KILLED = b"k"            # by someone else, who is unknown here
FIRST_LOOK_S, LOOK_S, LOOK_SOON_S = 0.02, 0.05, 0.01
"""Time to the first look at a session at work, between two, and at one whose memory grows fast, seconds."""
FAST_BYTES = 64 << 20
"""Growth between two looks that is fast."""
LOOKING_SHARE = 5
"""A look is followed by a pause of this many times the processor time that it took."""


class Supervisor:
    """Forks one session and stays until it has to be killed."""

    def __init__(self, client: socket.socket, data: socket.socket, group: int, options: argparse.Namespace) -> None:
        self.client, self.data, self.options = client, data, options
        self.group = group      # descriptor by which the session joins a control group, or -1
        self.private = "namespaces" in options.controls
        self.pid = 0
        self.verdict = b""
        self.turns: Turns | None = None      # of a long cell

    def run(self) -> None:
        self.work = self.options.work if self.private else tempfile.mkdtemp(prefix="session-", dir=self.options.work)
        os.setsid()
        isolation.adopt_orphans()
        isolation.come_first(SUPERVISOR_NICE)
        if "user" in self.options.controls:
            if not self.private and os.geteuid() == 0:
                os.chown(self.work, 65534, 65534)
            isolation.drop_root()
        if self.private:
            isolation.unshare(["user", "mount", "pid", "ipc", "uts"])
        isolation.die_with_parent()
        self.account = Account(self.options.limits.memory_bytes or 1 << 60,
                               [self.work, "/dev/shm"] if self.private else [], self.options.room)
        self.kills = self.options.room.kills()
        self.pid = isolation.fork()
        if self.pid == 0:
            run_in_fork(self._session)
        self.data.close()
        try:
            self._obey()
        finally:
            self._end()
            if not self.private:
                shutil.rmtree(self.work, ignore_errors=True)

    def _session(self) -> None:
        self.client.close()
        for fd in (self.account.proc, self.group):
            if fd >= 0:
                os.close(fd)
        run_session(self.data, self.options, self.work)

    def _obey(self) -> None:
        """Until the client hangs up, the session ends, or has to."""
        poll = select.poll()
        poll.register(self.client, select.POLLIN)
        poll.register(os.pidfd_open(self.pid), select.POLLIN)
        pause: float | None = FIRST_LOOK_S      # between two looks; None while the session is stopped
        due = time.monotonic() + FIRST_LOOK_S
        while not self.verdict:
            ready = [fd for fd, _ in poll.poll(None if pause is None else max(0, 1e3 * (due - time.monotonic())))]
            if ready and ready != [self.client.fileno()]:
                return
            if ready:
                order = self.client.recv(1)
                if order == INTERRUPT:
                    starved = self.turns is not None and self.turns.starved()
                    os.kill(self.pid, signal.SIGINT)
                    self.client.sendall(STARVED if starved else INTERRUPT)
                elif order == WATCH:
                    self.turns = Turns(self.account)
                elif order == PAUSE:
                    pause, self.turns = None, None
                    if not self.account.stop():
                        self.verdict = ENDED_ITSELF
                elif order == RESUME:
                    self.account.begin()
                    self.account.resume()
                    pause = FIRST_LOOK_S
                    due = time.monotonic() + pause
                else:
                    return
            elif pause is not None:
                pause = self._look()
                due = time.monotonic() + pause

    def _look(self) -> float:
        """Hold the session to its limits; seconds until the next look."""
        started, before = time.process_time(), self.account.memory
        processes = self.account.processes()
        self.account.share_fairly(processes)
        self.account.count(processes)
        if self.turns is not None:
            self.turns.look(processes)
        if self.group >= 0 and self.account.large(processes):      # the way there takes the kernel longer than most sessions live
            self.account.enter(self.group)
            self.group = -1
        if self.account.over:
            self.verdict = OVER_LIMIT
        elif self.options.limits.memory_bytes and self.account.crowds:
            self.verdict = CROWDED_OUT
        soon = self.account.memory - before > FAST_BYTES
        return max(LOOK_SOON_S if soon else LOOK_S, LOOKING_SHARE * (time.process_time() - started))

    def _end(self) -> None:
        """SIGKILL the session; its PID namespace, or failing that every descendant, goes with it. Say how it ended."""
        ended = os.waitpid(self.pid, os.WNOHANG)
        if not ended[0]:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        while not self.private and (rest := self.account.processes()):   # orphans come to us: this process adopts them
            for process in rest:
                os.kill(process.pid, signal.SIGKILL)
                os.waitpid(process.pid, 0)
        try:
            self.client.send(self.verdict or self._evidence(ended[1]))
        except OSError:      # nobody listens any more
            pass

    def _evidence(self, status: int) -> bytes:
        """How a session ended that was not ended here. The first process of a PID namespace can't kill itself."""
        if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
            return ENDED_ITSELF
        alone = not self.options.limits.memory_bytes      # in a container whose limit is the session's own
        if self.account.over or (alone and self.options.room.kills() > self.kills):
            return OVER_LIMIT
        if self.options.room.kills() > self.kills:
            return CROWDED_OUT
        return ENDED_ITSELF if alone else KILLED


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
