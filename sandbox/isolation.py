"""Linux controls a session puts on itself before any of the model's code runs. Standard library and libc only.

Order matters: namespaces (as the unprivileged user) -> mounts -> resource limits -> capabilities -> no_new_privs ->
seccomp (syscalls.py). A control that this kernel or container refuses is reported by `probe`, never silently assumed.
"""
from __future__ import annotations

import ctypes
import os
import resource
import signal
import struct
import sys
from dataclasses import dataclass

import syscalls

_libc = ctypes.CDLL(None, use_errno=True)
_python = ctypes.PyDLL(None, use_errno=True)      # keeps the interpreter's lock during a call

NEW = {"mount": 0x00020000, "uts": 0x04000000, "ipc": 0x08000000, "user": 0x10000000, "pid": 0x20000000,
       "net": 0x40000000}
"""clone flags by name of the namespace."""
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
_PDEATHSIG, _DUMPABLE, _CAPBSET_READ, _CAPBSET_DROP, _NO_NEW_PRIVS, _SUBREAPER = 1, 4, 23, 24, 38, 36
_CAPABILITIES = next((n for n in range(64) if _libc.prctl(_CAPBSET_READ, ctypes.c_ulong(n), 0, 0, 0) == -1), 64)      # kernel's
_NOBODY = 65534


@dataclass(frozen=True)
class Limits:
    """What one session may use."""

    address_bytes: int = 2 << 30     # address space of a process
    memory_bytes: int = 2 << 30      # of the session, everything counted (watch.py); 0: its container's limit is its own
    processes: int = 64              # of the session, threads included; 0: its container's limit is its own
    file_bytes: int = 64 << 20       # one file, and the session's whole tmpfs
    files: int = 256                 # open descriptors of a process
    cpu_seconds: int = 900           # of a process, over its life


def _call(name: str, *args: object) -> int:
    return _checked(name, getattr(_libc, name)(*args))


def _checked(name: str, result: int) -> int:
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return result


def fork() -> int:
    """os.fork for processes with one thread, without what Python and its modules do afterwards in the child.

    Their hooks (locks of threads, logging, random numbers) write to 0.3 MB of pages, in each supervisor and each session.
    """
    return _checked("fork", _python.fork())


def prctl(option: int, value: int = 0) -> None:
    _call("prctl", option, ctypes.c_ulong(value), 0, 0, 0)


def die_with_parent() -> None:
    """Be killed when the parent dies. Cleared by the kernel at every change of credentials: set it after those."""
    prctl(_PDEATHSIG, signal.SIGKILL)


def adopt_orphans() -> None:
    """Become the parent of descendants whose parent ends."""
    prctl(_SUBREAPER, 1)


def come_first(nice: int) -> None:
    """Be scheduled before others, if permitted."""
    try:
        os.setpriority(os.PRIO_PROCESS, 0, nice)
    except OSError:
        pass


def drop_root() -> None:
    """Become nobody, if this is root; otherwise nothing."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    prctl(_DUMPABLE, 1)   # else /proc/self belongs to root and the uid map can't be written


def unshare(names: list[str]) -> None:
    """Enter new namespaces; "user" maps the current user to itself. A new "pid" one begins with the next child."""
    uid, gid = os.geteuid(), os.getegid()
    _call("unshare", sum(NEW[name] for name in names))
    if "user" in names:
        for file, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            _write(f"/proc/self/{file}", text)


def _write(path: str, text: str) -> None:
    """As `open` and its write, with a fraction of the pages they touch."""
    fd = os.open(path, os.O_WRONLY)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def _mount(kind: str, where: str, flags: int, data: str) -> None:
    _call("mount", kind.encode(), where.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode())


def private_mounts(work: str, size: int) -> None:
    """Own tmpfs on `work` and /dev/shm, own /proc, everything else read-only. Needs a mount and a PID namespace."""
    _call("mount", None, b"/", None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None)
    try:
        _mount("proc", "/proc", _MS_NOSUID | _MS_NODEV, "")
    except OSError:   # inside a container with masked paths the kernel refuses a fresh one: better none than its
        _mount("tmpfs", "/proc", _MS_NOSUID | _MS_NODEV, "size=4k,mode=555")
    _read_only("/")
    for where in (work, "/dev/shm"):
        if os.path.isdir(where):
            _mount("tmpfs", where, _MS_NOSUID | _MS_NODEV, f"size={size},nr_inodes=4096,mode=700")


def _read_only(where: str) -> None:
    """mount_setattr(AT_RECURSIVE, MOUNT_ATTR_RDONLY | NOSUID)."""
    attributes = struct.pack("QQQQ", 1 | 2, 0, 0, 0)
    _call("syscall", 442, -100, where.encode(), 0x8000, attributes, len(attributes))


def set_limits(limits: Limits) -> None:
    for kind, value in ((resource.RLIMIT_AS, limits.address_bytes), (resource.RLIMIT_FSIZE, limits.file_bytes),
                        (resource.RLIMIT_NOFILE, limits.files), (resource.RLIMIT_CPU, limits.cpu_seconds),
                        (resource.RLIMIT_NPROC, limits.processes), (resource.RLIMIT_CORE, 0),
                        (resource.RLIMIT_NICE, 0), (resource.RLIMIT_RTPRIO, 0)):
        if kind == resource.RLIMIT_NPROC and not value:
            continue    # without a user namespace of its own the kernel would count the user's processes everywhere
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)   # a write beyond the limit fails with EFBIG instead


def offer_to_the_kernel(score: int) -> None:
    """When memory runs out, the kernel is to end this process rather than its supervisor, the template or the server."""
    _write("/proc/self/oom_score_adj", str(score))


def drop_capabilities() -> None:
    """Empty every capability set, for good."""
    for capability in range(_CAPABILITIES):
        try:
            prctl(_CAPBSET_DROP, capability)
        except OSError:
            break   # already without CAP_SETPCAP
    header, empty = struct.pack("II", 0x20080522, 0), struct.pack("6I", 0, 0, 0, 0, 0, 0)
    _call("capset", header, empty)
    prctl(_NO_NEW_PRIVS, 1)


def _works(check: object, *args: object) -> bool:
    """Whether `check` succeeds in a child of its own."""
    pid = os.fork()
    if pid == 0:
        try:
            check(*args)   # type: ignore[operator]
            os._exit(0)
        except BaseException as exc:  # noqa: B036,B902,BLE001 - a forked probe must not return into the template's code
            print(f"sandbox: {getattr(check, '__name__', check)}{args}: {exc}", file=sys.stderr, flush=True)
            os._exit(1)
    return os.waitpid(pid, 0)[1] == 0


def _probe_namespaces(work: str) -> None:
    drop_root()
    unshare(["user", "mount", "pid", "ipc", "uts"])
    pid = os.fork()
    if pid == 0:
        try:
            private_mounts(work, 1 << 20)
            os._exit(0)
        finally:
            os._exit(1)
    if os.waitpid(pid, 0)[1]:
        raise OSError("private mounts are refused")


def _probe_seccomp() -> None:
    prctl(_NO_NEW_PRIVS, 1)
    syscalls.install()


def _probe_drop_root(paths: list[str]) -> None:
    drop_root()
    for path in paths:
        os.listdir(path)


def open_to_nobody(paths: list[str]) -> None:
    """As root: let unprivileged sessions reach `paths` below folders closed to them, e.g. an interpreter in /root.

    In a mount namespace of our own, an empty tmpfs takes the closed folder's place and holds nothing but those paths;
    so whatever else lies in it (keys, tokens, histories) is out of sight too.
    """
    if os.geteuid() != 0:
        return
    try:
        unshare(["mount"])
        _call("mount", None, b"/", None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None)
        closed = {path: _closed_ancestor(path) for path in paths}
        originals = {path: os.open(path, os.O_PATH) for path, ancestor in closed.items() if ancestor}
        for folder in sorted({ancestor for ancestor in closed.values() if ancestor}):
            _mount("tmpfs", folder, _MS_NOSUID | _MS_NODEV, "size=1m,mode=755")
        mask = os.umask(0o022)
        for path, fd in originals.items():
            os.makedirs(path, exist_ok=True)
            _call("mount", f"/proc/self/fd/{fd}".encode(), path.encode(), None, ctypes.c_ulong(_MS_BIND | _MS_REC), None)
            os.close(fd)
        os.umask(mask)
    except OSError as exc:   # not permitted here: `probe` will find that root can't be dropped
        print(f"sandbox: {exc}", file=sys.stderr, flush=True)


def _closed_ancestor(path: str) -> str | None:
    parts = os.path.realpath(path).split("/")
    ancestors = ["/".join(parts[:n]) for n in range(2, len(parts) + 1)]
    return next((folder for folder in ancestors if not os.stat(folder).st_mode & 0o001), None)


def isolate_network() -> bool:
    """Put this process and its descendants into an empty network namespace, if permitted."""
    try:
        unshare(["net"] if os.geteuid() == 0 else ["user", "net"])
    except OSError:
        return False
    return True


def probe(work: str, importable: list[str]) -> list[str]:
    """Names of the controls that work here: "user" (not root), "namespaces", "seccomp". Sessions need `importable`."""
    found = []
    if os.geteuid() != 0 or _works(_probe_drop_root, importable):
        found.append("user")
        if _works(_probe_namespaces, work):
            found.append("namespaces")
    if syscalls.known(os.uname().machine) and _works(_probe_seccomp):
        found.append("seccomp")
    return found
