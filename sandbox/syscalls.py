"""System calls that a session may not make, as a seccomp filter. Standard library and libc only.

Denied is what changes the kernel, its mounts or other processes; what two sessions could meet by (unix sockets with
addresses, notifications about and locks on shared files); what holds memory, or a quota of the machine's user, beside the
processes whose memory is counted (memfds, System V and POSIX queues, asynchronous I/O); and what changes a thread's place in
the queue for processors, by which a session would seem to be kept waiting by others (turns.py).
"""
from __future__ import annotations

import ctypes
import errno
import functools
import os
import struct
from typing import Any

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
    # channels: a pair of connected stream sockets stays (below), and needs none of these
    "socket": (41, 198), "bind": (49, 200), "connect": (42, 203), "listen": (50, 201), "accept": (43, 202),
    "accept4": (288, 242), "inotify_init": (253, None), "inotify_init1": (294, 26), "flock": (73, 32),
    # memory that no process shows
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "shmat": (30, 196), "msgget": (68, 186),
    "semget": (64, 190), "mq_open": (240, 180), "io_setup": (206, 0),
    # a place in the queue for processors
    "setpriority": (141, 140), "sched_setparam": (142, 118), "sched_setscheduler": (144, 119), "sched_setaffinity": (203, 122),
    "sched_setattr": (314, 274),
}
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Machine -> (column above, number of the audit subsystem)."""
_CLONE, _CLONE3, _SOCKETPAIR, _FCNTL, _PRCTL = (56, 220), (435, 435), (53, 199), (72, 25), (157, 167)
_NEW_NAMESPACES = 0x7E020080        # every CLONE_NEW flag of clone
_FCNTL_DENIED = (5, 36, 1024, 1026, 1031)
"""F_GETLK and F_OFD_GETLK: with `flock`, the ways to see a lock on a file that all may read; locks for writing need a file of
one's own. F_SETLEASE and F_NOTIFY: word of others' accesses. F_SETPIPE_SZ: pipes of more than the usual size."""
_PR_SET_SECCOMP, _PR_SET_DUMPABLE = 22, 4
_LOAD, _AND, _JEQ, _JGE, _JSET, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _REFUSE, _MISSING = 0x7FFF0000, 0x80000000, 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
_ARGUMENT = (16, 24)                # offsets of the lower halves of the first two arguments

Line = tuple[int, int, int, int]


def _block(number: int, rules: list[Line]) -> list[Line]:
    """`rules` for one system call, which end it; others pass by with their number still loaded."""
    return [(_JEQ, 0, len(rules), number), *rules]


@functools.cache
def program(machine: str) -> bytes:
    """BPF that refuses the calls above, and some arguments of others. Raises KeyError on machines it doesn't know."""
    column, audit = ARCHITECTURES[machine]
    refuse, allow = (_RETURN, 0, 0, _REFUSE), (_RETURN, 0, 0, _ALLOW)
    code = [(_LOAD, 0, 0, 4), (_JEQ, 1, 0, audit), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    if machine == "x86_64":   # the x32 ABI would be a second door to the same calls
        code += [(_JGE, 0, 1, 0x40000000), refuse]
    for number in sorted(call for numbers in _DENIED.values() if (call := numbers[column]) is not None):
        code += _block(number, [refuse])
    code += _block(_CLONE3[column], [(_RETURN, 0, 0, _MISSING)])   # flags out of reach here; libc falls back to clone
    code += _block(_CLONE[column], [(_LOAD, 0, 0, _ARGUMENT[0]), (_JSET, 0, 1, _NEW_NAMESPACES), refuse, allow])
    code += _block(_SOCKETPAIR[column], [      # AF_UNIX and SOCK_STREAM only: nothing else stays tied to its pair
        (_LOAD, 0, 0, _ARGUMENT[0]), (_JEQ, 1, 0, 1), refuse, (_LOAD, 0, 0, _ARGUMENT[1]), (_AND, 0, 0, 0xF),
        (_JEQ, 1, 0, 1), refuse, allow])
    last = len(_FCNTL_DENIED) - 1
    code += _block(_FCNTL[column], [
        (_LOAD, 0, 0, _ARGUMENT[1]),
        *((_JEQ, last - n, int(n == last), command) for n, command in enumerate(_FCNTL_DENIED)), refuse, allow])
    code += _block(_PRCTL[column], [           # a process that can't be looked at can't be counted
        (_LOAD, 0, 0, _ARGUMENT[0]), (_JEQ, 0, 1, _PR_SET_DUMPABLE), refuse, allow])
    return b"".join(struct.pack("HBBI", *line) for line in [*code, allow])


@functools.cache
def _prepared() -> tuple[Any, ...]:
    """A call that installs the program of this machine, its arguments, and what they point to. Made once, in the template."""
    text = program(os.uname().machine)
    buffer = ctypes.create_string_buffer(text, len(text))
    fprog = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(text) // 8, ctypes.addressof(buffer)))
    return (ctypes.CDLL(None, use_errno=True).prctl, (_PR_SET_SECCOMP, ctypes.c_ulong(2), ctypes.byref(fprog), 0, 0), buffer)


def install() -> None:
    """Needs no_new_privs. Inherited by every child, can't be taken off. Raises OSError where the kernel refuses."""
    prctl, arguments, _ = _prepared()
    if prctl(*arguments) == -1:
        raise OSError(ctypes.get_errno(), "seccomp")


def known(machine: str) -> bool:
    """Whether there is a program for such a machine, which is prepared then."""
    return machine in ARCHITECTURES and bool(_prepared())
