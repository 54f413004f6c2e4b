"""The session process: confines itself, then serves the cells of one trajectory until its connection ends."""
from __future__ import annotations

import argparse
import os
import socket
import sys
import tempfile

import frames
import isolation
import syscalls
from cell import Interpreter
from watch import AT_WORK, NICE

LOG_FD = os.dup(2)   # a session's own descriptor 2 belongs to its cells


def run_session(conn: socket.socket, options: argparse.Namespace, work: str) -> None:
    """Body of a session process: confine itself, then serve cells until the connection ends."""
    os.setsid()
    os.setpriority(os.PRIO_PROCESS, 0, NICE)
    isolation.offer_to_the_kernel(AT_WORK)      # while there is a /proc
    if "namespaces" in options.controls:
        isolation.private_mounts(work, options.limits.file_bytes)
    os.chdir(work)
    if work != options.work:
        move_in(work)
    out = [os.open(os.path.join(work, name), os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600) for name in (".out", ".err")]
    null = os.open(os.devnull, os.O_RDONLY)
    for fd, target in ((null, 0), (out[0], 1), (out[1], 2)):
        os.dup2(fd, target)
        os.close(fd)
    for name in (".out", ".err"):
        os.unlink(os.path.join(work, name))
    isolation.set_limits(options.limits)
    isolation.drop_capabilities()
    isolation.die_with_parent()
    if "seccomp" in options.controls:
        syscalls.install()
    _serve(conn, options)


def own_environment(work: str) -> None:
    """That of all sessions, made once by the template: nothing of what the template was given but where programs are."""
    keep = {name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL", "TZ") if name in os.environ}
    os.environ.clear()
    os.environ.update(keep, MPLBACKEND="Agg", OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
    sys.path[:] = [entry for entry in sys.path if entry not in ("", os.path.dirname(os.path.abspath(__file__)))]
    sys.path.insert(0, work)
    sys.argv = [""]
    move_in(work)


def move_in(work: str) -> None:
    """Where a session writes."""
    os.environ.update(HOME=work, TMPDIR=work, MPLCONFIGDIR=work)
    tempfile.tempdir = sys.path[0] = work


def _serve(conn: socket.socket, options: argparse.Namespace) -> None:
    _, images = frames.receive(conn)
    interpreter: Interpreter = options.interpreter
    interpreter.begin(images)
    os.close(LOG_FD)
    frames.send(conn, {"status": "ready"})
    while True:
        try:
            code = frames.receive_code(conn)
        except EOFError:
            return
        conn.sendall(frames.pack_answer(*interpreter.run(code)))


def log(line: str) -> None:
    try:
        os.write(LOG_FD, f"sandbox: {line}\n".encode())
    except OSError:   # the server's end of the log is gone
        pass
