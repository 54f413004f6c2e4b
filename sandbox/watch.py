"""What one session uses, seen from its supervisor: memory with everything counted, processors, processes.

Where the server can give a session a control group, the kernel counts its memory. An unprivileged container can make
none, so otherwise this counts the session's processes, its files in memory and its kernel buffers. Either way it says when
they are over the limit, and keeps sessions that have used much of the processors, or use them in many processes, behind
the others. Standard library only.
"""
from __future__ import annotations

import math
import os
import re
import signal

from processes import TICKS, Below, Process

SOCKET_BYTES, PIPE_BYTES = 256 << 10, 64 << 10
"""What the kernel holds for a full socket and a full pipe."""
NICE, SUPERVISOR_NICE = 4, -10
"""Of a session at its start, and of its supervisor where that is permitted: it must get to look."""
LEVELS = ((0.3, NICE), (1.0, NICE + 3), (3.0, NICE + 6), (10.0, NICE + 10), (math.inf, NICE + 14))
"""(processor time that a session has used, seconds, up to which this is its niceness). A cell that spins is soon behind."""
AT_WORK, AT_REST = 1000, 600
"""How readily the kernel ends a session when memory runs out: one at work before all that are not. The template's is 500
in a container."""
MANY = 24
"""Tasks of a session from which on no niceness is enough: they get what processors nobody else wants."""
FEW_FILES = 16
"""Open descriptors of a process that are not looked at."""
TIGHT_BYTES = 1 << 30
"""Memory left, of a large container, below which sessions are held to less than their limit."""
GROWN_BYTES = 16 << 20
"""Growth since the cell began that a shortage of memory can be put down to."""
_SHARED = re.compile(rb"^([0-9a-f]+)-([0-9a-f]+) .s\S* \S+ (\S+ \d+) +(?:/dev/zero|/memfd|/SYSV)", re.MULTILINE)


class Group:
    """A control group as far as it concerns memory. `limit` is 0 where there is none."""

    def __init__(self, *folders: str) -> None:
        self.limit = 0
        for folder in folders:
            for usage, limit, events in (("memory.current", "memory.max", "memory.events"),
                                         ("memory.usage_in_bytes", "memory.limit_in_bytes", "memory.oom_control")):
                text = _read(f"{folder}/{limit}").strip()
                if text.isdigit() and int(text) < 1 << 50:
                    self.limit, self._folder, self._usage, self._events = int(text), folder, usage, events

    def used(self) -> int:
        """Bytes; nearly all that is left gone, without what the kernel could drop of its cache."""
        used = int(_read(f"{self._folder}/{self._usage}") or 0)
        if self.limit - used < TIGHT_BYTES:
            cache = re.search(r"^(?:total_)?inactive_file (\d+)", _read(f"{self._folder}/memory.stat"), re.MULTILINE)
            used -= int(cache[1]) if cache else 0
        return used

    def kills(self) -> int:
        """How often the kernel has killed a process here because memory ran out; 0 where it doesn't say."""
        found = re.search(r"^oom_kill (\d+)", _read(f"{self._folder}/{self._events}"), re.MULTILINE) if self.limit else None
        return int(found[1]) if found else 0


class Room(Group):
    """Memory for all sessions together: the container's, or where it has no limit, the machine's."""

    def __init__(self) -> None:
        super().__init__("/sys/fs/cgroup", "/sys/fs/cgroup/memory")
        self.tight = min(self.limit // 8, TIGHT_BYTES) if self.limit else TIGHT_BYTES

    def left(self) -> int:
        """Bytes."""
        if self.limit:
            return self.limit - self.used()
        found = re.search(r"MemAvailable: +(\d+)", _read("/proc/meminfo"))
        return int(found[1]) << 10 if found else TIGHT_BYTES


class Account(Below):
    """The processes below this one, a supervisor, and what they hold.

    `limit` is in bytes; at `folders` the session will have file systems in memory. Made before it mounts any.
    """

    def __init__(self, limit: int, folders: list[str], room: Room) -> None:
        super().__init__()
        self.limit, self.room, self.group = limit, room, Group()
        self.folders = {folder: os.stat(folder).st_dev for folder in folders}      # of the machine, until the session has its own
        self.memory = self.started_with = 0
        self._nice: dict[int, int] = {}

    # -- memory ------------------------------------------------------------------------------------------------------
    def enter(self, procs: int) -> None:
        """Put all into the control group whose open cgroup.procs this is; it counts from now on. Takes the kernel 20 ms."""
        inside: set[int] = set()
        text = b""
        try:
            while new := [process.pid for process in self.processes() if process.pid not in inside]:
                for pid in new:
                    inside.add(pid)
                    try:
                        os.write(procs, str(pid).encode())
                        text = text or self._text(f"{pid}/cgroup")
                    except ProcessLookupError:
                        pass
        except OSError:      # then it isn't to be, and this account goes on counting
            return
        finally:
            os.close(procs)
        self.group = _group_in(text.decode())

    def count(self, processes: list[Process]) -> int:
        """Bytes the session holds, into `memory`. Exact only where a cheap upper bound is over the limit."""
        if self.group.limit:
            self.memory = self.group.used()
            return self.memory
        beside = sum(_used(folder) for folder, before in self.folders.items() if os.stat(folder).st_dev != before)
        beside += self._buffers(processes)
        bound = beside + sum(process.resident for process in processes)
        if sum(process.mapped for process in processes) > self.limit:
            hidden = self._shared(processes)       # pages of a shared mapping that no process has in its tables at present
            bound, beside = bound + hidden, beside + hidden
        self.memory = bound if bound <= self.limit else beside + sum(map(self._proportional, processes))
        return self.memory

    def _proportional(self, process: Process) -> int:
        """Resident bytes, each page shared between the processes that have it."""
        found = re.search(rb"^Pss: +(\d+)", self._text(f"{process.pid}/smaps_rollup"), re.MULTILINE)
        return int(found[1]) << 10 if found else process.resident

    def _buffers(self, processes: list[Process]) -> int:
        """What distinct sockets and pipes can hold at most."""
        found: set[str] = set()
        total = 0
        for process in processes:
            names = self._list(f"{process.pid}/fd")
            for name in names if len(names) > FEW_FILES and total <= self.limit else ():
                try:
                    link = os.readlink(f"{process.pid}/fd/{name}", dir_fd=self.proc)
                except OSError:      # closed in the meantime
                    continue
                if link not in found:
                    found.add(link)
                    total += SOCKET_BYTES if link.startswith("socket:") else PIPE_BYTES if link.startswith("pipe:") else 0
        return total

    def _shared(self, processes: list[Process]) -> int:
        """Sizes of the distinct anonymous mappings that processes share."""
        sizes: dict[bytes, int] = {}
        for process in processes:
            for first, last, file in _SHARED.findall(self._text(f"{process.pid}/maps")):
                sizes[file] = max(sizes.get(file, 0), int(last, 16) - int(first, 16))
        return sum(sizes.values())

    def large(self, processes: list[Process]) -> bool:
        """Whether the session could soon hold more than it may."""
        return self.memory > self.limit // 8 or len(processes) > 4

    def begin(self) -> None:
        """Cells begin after a pause: what the session holds now is no one's growth."""
        self.started_with = self.count(self.processes())

    @property
    def over(self) -> bool:
        """Whether the session holds more than it may, or has wanted to and the kernel has ended a part of it."""
        return self.memory > self.limit or self.group.kills() > 0

    @property
    def crowds(self) -> bool:
        """Whether the session, within its limit, has grown where next to nothing is left; the larger it is, the sooner."""
        if self.memory - self.started_with < GROWN_BYTES:
            return False
        left = self.room.left()
        return left < self.room.tight and self.memory > self.limit * left // self.room.tight

    # -- processors --------------------------------------------------------------------------------------------------
    def share_fairly(self, processes: list[Process]) -> None:
        """Sessions that have used much come after those that have used little; many processes weigh as one.

        A session's first thread goes by the time it has used alone: nothing can make it nicer again afterwards.
        """
        if not processes:
            return
        seconds = sum(process.ticks for process in processes) / TICKS
        first = next(level for limit, level in LEVELS if seconds < limit)
        tasks = sum(process.threads for process in processes)
        rest = min(19, first + round(math.log(max(1, tasks - 1), 1.25)))
        levels = {processes[0].pid: first}
        if tasks > 1:
            for process in processes:
                threads = self._list(f"{process.pid}/task") if process.threads > 1 else [str(process.pid)]
                for thread in map(int, threads):
                    levels.setdefault(thread, rest)
        for thread, level in levels.items():
            if level > self._nice.get(thread, NICE):
                try:
                    os.setpriority(os.PRIO_PROCESS, thread, level)
                    if tasks > MANY and thread != processes[0].pid:
                        os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))
                except OSError:      # ended in the meantime
                    pass
        self._nice = {thread: max(level, self._nice.get(thread, NICE)) for thread, level in levels.items()}

    # -- between cells -----------------------------------------------------------------------------------------------
    def stop(self) -> bool:
        """Stop every process; those that are still at work when no cell is, end. False when they multiply faster."""
        stopped: set[int] = set()
        for _ in range(100):
            new = [process for process in self.processes() if process.pid not in stopped]
            if not new:
                self._offer_to_the_kernel(self.processes(), AT_REST)
                return True
            for number, process in enumerate(new):
                first = not stopped and number == 0
                _signal(process.pid, signal.SIGKILL if process.state == "R" and not first else signal.SIGSTOP)
                stopped.add(process.pid)
        return False

    def resume(self) -> None:
        processes = self.processes()
        self._offer_to_the_kernel(processes, AT_WORK)
        for process in processes:
            _signal(process.pid, signal.SIGCONT)

    def _offer_to_the_kernel(self, processes: list[Process], score: int) -> None:
        for process in processes:
            try:
                fd = os.open(f"{process.pid}/oom_score_adj", os.O_WRONLY, dir_fd=self.proc)
            except OSError:      # ended in the meantime
                continue
            try:
                os.write(fd, str(score).encode())
            except OSError:      # lower than an outer container allows
                pass
            finally:
                os.close(fd)


def _group_in(text: str) -> Group:
    """A session's group, as a process's /proc/PID/cgroup tells it."""
    paths = [line.split(":", 2)[2] for line in text.splitlines()
             if line.startswith("0::") or "memory" in line.split(":")[1].split(",")]
    bases = ("/sys/fs/cgroup", "/sys/fs/cgroup/memory")      # seen whole, or from the container's own group on
    return Group(*(base + tail for base in bases for path in paths
                   for tail in (path, "/" + "/".join(path.split("/")[-2:])) if "sessions-" in tail))


def _used(folder: str) -> int:
    status = os.statvfs(folder)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return ""
