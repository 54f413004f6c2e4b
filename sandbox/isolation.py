"""Linux controls a session puts on itself before any of the model's code runs. Standard library and libc only.

Order matters: namespaces (as the unprivileged user) -> mounts -> resource limits -> capabilities -> no_new_privs ->
seccomp. A control that this kernel or container refuses is reported by `probe`, never silently assumed.
"""
from __future__ import annotations

import ctypes
import functools
import os
import resource
import signal
import struct
import sys
from dataclasses import dataclass

_libc = ctypes.CDLL(None, use_errno=True)

NEW = {"mount": 0x00020000, "uts": 0x04000000, "ipc": 0x08000000, "user": 0x10000000, "pid": 0x20000000,
       "net": 0x40000000}
"""clone flags by name of the namespace."""
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
_PDEATHSIG, _DUMPABLE, _SECCOMP, _CAPBSET_DROP, _NO_NEW_PRIVS, _SUBREAPER = 1, 4, 22, 24, 38, 36
_NOBODY = 65534


@dataclass(frozen=True)
class Limits:
    """What one session may use."""

    memory_bytes: int = 2 << 30      # address space of a process
    processes: int = 64              # of the session, threads included
    file_bytes: int = 64 << 20       # one file, and the session's whole tmpfs
    files: int = 256                 # open descriptors of a process
    cpu_seconds: int = 900           # of a process, over its life


def _call(name: str, *args: object) -> int:
    result = getattr(_libc, name)(*args)
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return result


def prctl(option: int, value: int = 0) -> None:
    _call("prctl", option, ctypes.c_ulong(value), 0, 0, 0)


def die_with_parent() -> None:
    """Be killed when the parent dies. Cleared by the kernel at every change of credentials: set it after those."""
    prctl(_PDEATHSIG, signal.SIGKILL)


def adopt_orphans() -> None:
    """Become the parent of descendants whose parent ends."""
    prctl(_SUBREAPER, 1)


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
            with open(f"/proc/self/{file}", "w") as handle:
                handle.write(text)


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
    for kind, value in ((resource.RLIMIT_AS, limits.memory_bytes), (resource.RLIMIT_FSIZE, limits.file_bytes),
                        (resource.RLIMIT_NOFILE, limits.files), (resource.RLIMIT_CPU, limits.cpu_seconds),
                        (resource.RLIMIT_NPROC, limits.processes), (resource.RLIMIT_CORE, 0)):
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)   # a write beyond the limit fails with EFBIG instead
    try:
        with open("/proc/self/oom_score_adj", "w") as handle:
            handle.write("1000")
    except OSError:   # no /proc inside; the container's own limit decides then
        pass


def drop_capabilities() -> None:
    """Empty every capability set, for good."""
    for capability in range(64):
        try:
            prctl(_CAPBSET_DROP, capability)
        except OSError:
            break   # beyond the last one, or already without CAP_SETPCAP
    header, empty = struct.pack("II", 0x20080522, 0), struct.pack("6I", 0, 0, 0, 0, 0, 0)
    _call("capset", header, empty)
    prctl(_NO_NEW_PRIVS, 1)


# name: (number on x86_64, number on aarch64); None where the architecture lacks the call
_DENIED: dict[str, tuple[int | None, int | None]] = {
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51), "mount_setattr": (442, 442), "open_tree": (428, 428), "move_mount": (429, 429),
    "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "pidfd_getfd": (438, 438),
    "process_madvise": (440, 440), "bpf": (321, 280), "keyctl": (250, 219), "add_key": (248, 217),
    "request_key": (249, 218), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427), "userfaultfd": (323, 282), "perf_event_open": (298, 241),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "init_module": (175, 105), "finit_module": (313, 273),
    "delete_module": (176, 106), "swapon": (167, 224), "swapoff": (168, 225), "reboot": (169, 142), "acct": (163, 89),
    "quotactl": (179, 60), "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "personality": (135, 92),
    "sethostname": (170, 161), "setdomainname": (171, 162), "mknod": (133, None), "mknodat": (259, 33),
    "fanotify_init": (300, 262), "modify_ldt": (154, None), "iopl": (172, None), "ioperm": (173, None),
    "socket": (41, 198),   # socketpair stays: it reaches nothing outside the process
}
_ARCHITECTURES = {"x86_64": (0, 0xC000003E, 56), "aarch64": (1, 0xC00000B7, 220)}   # column, audit number, clone
_CLONE3 = 435
_LOAD, _JEQ, _JGE, _JSET, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _EPERM, _ENOSYS = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026


@functools.cache
def seccomp_program(machine: str) -> bytes:
    """BPF that answers EPERM to the calls above and to clone with new namespaces. Raises KeyError on other machines."""
    column, audit, clone = _ARCHITECTURES[machine]
    denied = sorted(call for numbers in _DENIED.values() if (call := numbers[column]) is not None)
    code = [(_LOAD, 0, 0, 4), (_JEQ, 1, 0, audit), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    if machine == "x86_64":   # the x32 ABI would be a second door to the same calls
        code += [(_JGE, 0, 1, 0x40000000), (_RETURN, 0, 0, _EPERM)]
    for number in denied:
        code += [(_JEQ, 0, 1, number), (_RETURN, 0, 0, _EPERM)]
    code += [(_JEQ, 0, 1, _CLONE3), (_RETURN, 0, 0, _ENOSYS)]   # its flags can't be read here; libc falls back to clone
    code += [(_JEQ, 0, 3, clone), (_LOAD, 0, 0, 16), (_JSET, 0, 1, sum(NEW.values()) | 0x02000000 | 0x80),
             (_RETURN, 0, 0, _EPERM), (_RETURN, 0, 0, _ALLOW)]
    return b"".join(struct.pack("HBBI", *line) for line in code)


def install_seccomp() -> None:
    """Needs no_new_privs. Inherited by every child, can't be taken off."""
    program = seccomp_program(os.uname().machine)
    buffer = ctypes.create_string_buffer(program, len(program))
    fprog = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
    holder = ctypes.create_string_buffer(fprog, len(fprog))
    _call("prctl", _SECCOMP, ctypes.c_ulong(2), ctypes.c_void_p(ctypes.addressof(holder)), 0, 0)


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
    install_seccomp()


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
    machine = os.uname().machine
    if machine in _ARCHITECTURES and seccomp_program(machine) and _works(_probe_seccomp):   # built here, for all sessions
        found.append("seccomp")
    return found
