"""Open files: a process may have as many as the machine lets it, and an error of too many is known as one.

Login shells and systemd give a soft limit of 1,024 under a hard one that is hundreds of times as high, for the sake of
programs that use select(). None of ours do, and a tool server alone has several files open for each live trajectory.
"""
from __future__ import annotations

import errno
import os
import resource

from hdpo.errors import UserError

PER_TRAJECTORY = 4
"""Open files of a tool server for a live trajectory: its session's two sockets and control group, a client's connection."""
OWN = 256
"""What a process has open besides: libraries, logs, listeners, templates of sandboxes."""
WAY_OUT = "`ulimit -Hn` as root, LimitNOFILE= of a systemd unit, nofile in /etc/security/limits.conf, docker run --ulimit nofile="


def raise_limit() -> int:
    """Raise the soft limit of this process and its children to the hard one; how many files it may have open then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError):      # a hard limit above what the kernel takes (fs.nr_open, macOS): the soft one stays
            hard = soft
    return hard if hard != resource.RLIM_INFINITY else 1 << 30


def needed(trajectories: int) -> int:
    """Files that a tool server with so many live trajectories may have open."""
    return PER_TRAJECTORY * trajectories + OWN


def check_limit(trajectories: int, servers: int = 1) -> str:
    """A line that says what this machine allows. Raises UserError where `trajectories`, shared by so many servers, need more."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed, wanted = (hard if hard != resource.RLIM_INFINITY else 1 << 30), needed(-(-trajectories // servers))
    if trajectories and wanted > allowed:
        raise UserError(f"{trajectories} live trajectories need {wanted} open files in a tool server and the hard limit here is "
                        f"{allowed}: raise it ({WAY_OUT}), or lower rollout.max_num_seqs")
    said = f"{allowed} allowed (hard limit)"
    return f"{said}, {wanted} needed by a tool server with {trajectories} live trajectories" if trajectories else said


def number_open() -> int:
    """Files that this process has open just now."""
    return os.stat("/proc/self/fd").st_size or len(os.listdir("/proc/self/fd"))      # the size is told since Linux 6.2


def room(files: int) -> bool:
    """Whether so many more may be opened while an eighth of the limit, for connections, stays free."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft == resource.RLIM_INFINITY or number_open() + files <= soft - soft // 8


def exhausted(error: BaseException | None) -> str:
    """What to say where `error`, or what it came from, is for want of a file descriptor; else empty."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            return too_many()
        error = error.__cause__ or error.__context__
    return ""


def too_many() -> str:
    return (f"too many open files: this process may have {resource.getrlimit(resource.RLIMIT_NOFILE)[0]} (ulimit -n); raise the "
            f"hard limit: {WAY_OUT}")
