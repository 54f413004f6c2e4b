"""The warm template: forks one session per trajectory. Runs in a container or as a plain process; knows no training.

    python worker.py --socket /run/x/socket --work /run/x/work [--memory-mib 2048 ...]

Processes of one session:

    template      imported everything once, single-threaded, accepts connections and forks
      supervisor  owns the client's connection and the clock: interrupt, then kill; outside the session's PID namespace
        session   init of its own PID namespace; runs the model's code; its death takes all its descendants

The connection is the session: when the client hangs up, for whatever reason, the session is killed. The first
connection says {"op": "lifeline"} and stands for the server: when it ends, the template ends, and everything with it.

Conversation on a session's connection: {"op": "open"} + images -> {"status": "ready"}; then any number of
{"op": "run", "code", "timeout"} -> {"status": "ok" | "interrupted" | "killed" | "died", "seconds"}, followed for the
first two by the session's own frame {"ok", "stdout", "stderr"} + PNG files, which the client must treat as hostile.
"""
from __future__ import annotations

import argparse
import gc
import os
import select
import shutil
import signal
import socket
import sys
import tempfile
import time
from typing import Any

import frames
import isolation
from cell import Interpreter

INTERRUPT_GRACE_S = 0.35
LOG_FD = os.dup(2)   # a session's own descriptor 2 belongs to its cells
MAX_REPLY_JSON, MAX_REPLY_BLOBS = 4 << 20, 64 << 20


# -- the session -----------------------------------------------------------------------------------------------------
def session(conn: socket.socket, options: argparse.Namespace, work: str) -> None:
    """Body of a session process: confine itself, then serve cells until the connection ends."""
    os.setsid()
    if "namespaces" in options.controls:
        isolation.private_mounts(work, options.limits.file_bytes)
    os.chdir(work)
    _own_environment(work)
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
        isolation.install_seccomp()
    _serve(conn, options)


def _own_environment(work: str) -> None:
    keep = {name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL", "TZ") if name in os.environ}
    os.environ.clear()
    os.environ.update(keep, HOME=work, TMPDIR=work, MPLBACKEND="Agg", MPLCONFIGDIR=work, OMP_NUM_THREADS="1",
                      OPENBLAS_NUM_THREADS="1")
    tempfile.tempdir = work
    sys.path[:] = [entry for entry in sys.path if entry not in ("", os.path.dirname(os.path.abspath(__file__)))]
    sys.path.insert(0, work)
    sys.argv = [""]


def _serve(conn: socket.socket, options: argparse.Namespace) -> None:
    message, images = frames.receive(conn)
    interpreter = Interpreter(images, options.max_output_kib << 10, options.max_images)
    signal.signal(signal.SIGINT, interpreter.on_interrupt)
    os.close(LOG_FD)
    frames.send(conn, {"status": "ready"})
    while True:
        try:
            message, _ = frames.receive(conn)
        except EOFError:
            return
        result, pngs = interpreter.run(message["code"])
        frames.send(conn, result, pngs)


# -- the supervisor --------------------------------------------------------------------------------------------------
class Supervisor:
    """Relays between the client and one session, and ends the session when time or the client is gone."""

    def __init__(self, client: socket.socket, options: argparse.Namespace) -> None:
        self.client, self.options = client, options
        self.private = "namespaces" in options.controls
        self.work = options.work if self.private else tempfile.mkdtemp(prefix="session-", dir=options.work)
        self.pid = 0
        self.inner: socket.socket

    def run(self) -> None:
        os.setsid()
        isolation.adopt_orphans()
        if "user" in self.options.controls:
            if not self.private and os.geteuid() == 0:
                os.chown(self.work, 65534, 65534)
            isolation.drop_root()
        if self.private:
            isolation.unshare(["user", "mount", "pid", "ipc", "uts"])
        isolation.die_with_parent()
        self.inner, other = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            _child(self._session, other)
        other.close()
        try:
            self._relay()
        except (EOFError, OSError, frames.FrameError) as exc:
            _log(f"session ends: {type(exc).__name__} {exc}".rstrip())
        finally:
            self._kill()
            if not self.private:
                shutil.rmtree(self.work, ignore_errors=True)

    def _session(self, conn: socket.socket) -> None:
        self.client.close()
        self.inner.close()
        session(conn, self.options, self.work)

    def _relay(self) -> None:
        self._pass_in(*self._from_client())                 # images
        self.client.sendall(self._from_session(time.monotonic() + 60.0))
        while True:
            self._wait_for_client()
            header, text, payload = self._from_client()
            message, _ = frames.unpack(text, payload)
            if not self._answer(message, header + text + payload):
                return

    def _answer(self, message: dict[str, Any], raw: bytes) -> bool:
        """Run one cell. False when the session is gone."""
        timeout = min(float(message["timeout"]), 3600.0)
        started = time.monotonic()
        status, reply = "ok", b""
        try:
            self.inner.settimeout(30.0)
            self.inner.sendall(raw)
            reply = self._from_session(started + timeout)
        except TimeoutError:
            os.kill(self.pid, signal.SIGINT)
            try:
                reply = self._from_session(time.monotonic() + INTERRUPT_GRACE_S)
                status = "interrupted"
            except TimeoutError:
                status = "killed"
            except (EOFError, OSError, frames.FrameError):
                status = "died"
        except (EOFError, ConnectionError, frames.FrameError):
            status = "died"
        if not reply:
            self._kill()
        verdict = {"status": status, "seconds": round(time.monotonic() - started, 4)}
        self.client.sendall(frames.pack(verdict) + reply)
        return bool(reply)

    def _from_client(self) -> tuple[bytes, bytes, bytes]:
        try:
            header = frames.read_exactly(self.client, frames.HEADER.size)
        except EOFError:
            raise ClientGone from None
        json_size, blob_size = frames.sizes(header)
        return header, frames.read_exactly(self.client, json_size), frames.read_exactly(self.client, blob_size)

    def _pass_in(self, *parts: bytes) -> None:
        for part in parts:
            self.inner.sendall(part)

    def _from_session(self, deadline: float) -> bytes:
        """One whole frame, unparsed. Raises TimeoutError, EOFError, FrameError; EOFError too when the client left."""
        data = bytearray()
        need = frames.HEADER.size
        while len(data) < need:
            self._wait_for_session(deadline)
            chunk = self.inner.recv(min(need - len(data), 1 << 20))
            if not chunk:
                raise EOFError("the session closed its end")
            data += chunk
            if len(data) == frames.HEADER.size:
                need += sum(frames.sizes(bytes(data), MAX_REPLY_JSON, MAX_REPLY_BLOBS))
        return bytes(data)

    def _wait_for_session(self, deadline: float) -> None:
        poll = select.poll()
        poll.register(self.inner, select.POLLIN)
        poll.register(self.client, select.POLLRDHUP)
        events = dict(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))
        if self.client.fileno() in events:
            raise ClientGone
        if not events:
            raise TimeoutError

    def _wait_for_client(self) -> None:
        poll = select.poll()
        poll.register(self.client, select.POLLIN | select.POLLRDHUP)
        poll.register(self.inner, select.POLLRDHUP)     # the session died, or spoke out of turn and will be found out
        poll.poll()

    def _kill(self) -> None:
        """SIGKILL the session; its PID namespace, or failing that every descendant, goes with it."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = 0
        while not self.private and (rest := _children()):   # orphans come to us: this process adopts them
            for pid in rest:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


class ClientGone(SystemExit):
    """The client hung up: nobody is left to answer."""


def _children() -> list[int]:
    with open(f"/proc/self/task/{os.getpid()}/children") as handle:
        return [int(pid) for pid in handle.read().split()]


def _child(body: Any, *args: Any) -> None:
    """Run `body` in a fresh fork and never return from it."""
    code = 1
    try:
        body(*args)
        code = 0
    except SystemExit:
        code = 0
    except BaseException as exc:  # noqa: B036,B902,BLE001 - a fork must not return into its parent's code
        _log(f"{getattr(body, '__qualname__', body)}: {type(exc).__name__}: {exc}")
    finally:
        os._exit(code)


def _log(line: str) -> None:
    try:
        os.write(LOG_FD, f"sandbox: {line}\n".encode())
    except OSError:   # the server's end of the log is gone
        pass


# -- the template ----------------------------------------------------------------------------------------------------
def preload() -> None:
    """Import and warm up what sessions will share."""
    import warnings

    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy
    import PIL.Image
    warnings.filterwarnings("ignore", module="matplotlib")
    PIL.Image.init()
    figure = plt.figure()
    figure.add_subplot().text(0.5, 0.5, "warm")
    figure.canvas.draw()
    plt.close("all")
    numpy.dot(numpy.ones((2, 2)), numpy.ones((2, 2)))


class Template:
    """Accepts connections, forks supervisors, reaps them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(options.socket)
        self.listener.listen(1024)
        self.lifeline: socket.socket | None = None

    def run(self) -> None:
        """Serve until the lifeline ends."""
        signal.signal(signal.SIGCHLD, lambda *_: None)      # interrupts nothing (PEP 475), but wakes the poll
        wake_read, wake_write = self.wake = socket.socketpair()
        for end in self.wake:
            end.setblocking(False)
        signal.set_wakeup_fd(wake_write.fileno())
        poll = select.poll()
        poll.register(self.listener, select.POLLIN)
        poll.register(wake_read, select.POLLIN)
        deadline = time.monotonic() + 60.0
        while self.lifeline is not None or time.monotonic() < deadline:
            for fd, _ in poll.poll(1000):
                if fd == wake_read.fileno():
                    wake_read.recv(4096)
                    _reap()
                elif self.lifeline is not None and fd == self.lifeline.fileno():
                    return
                else:
                    self._accept(poll)

    def _accept(self, poll: select.poll) -> None:
        conn, _ = self.listener.accept()
        if self.lifeline is None:
            self.lifeline = conn
            frames.send(conn, {"status": "ready", "controls": self.options.controls})
            poll.register(conn, select.POLLRDHUP | select.POLLHUP)
            return
        if os.fork() == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for end in (self.listener, self.lifeline, *self.wake):
                end.close()
            _child(Supervisor(conn, self.options).run)
        conn.close()


def _reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--socket", required=True, help="unix socket to listen on")
    parser.add_argument("--work", required=True, help="folder (mount point) where sessions work")
    parser.add_argument("--ready-fd", type=int, default=-1, help="descriptor closed as soon as the socket listens")
    parser.add_argument("--memory-mib", type=int, default=2048, help="address space of one process of a session")
    parser.add_argument("--processes", type=int, default=64, help="processes and threads of one session")
    parser.add_argument("--disk-mib", type=int, default=64, help="files of one session")
    parser.add_argument("--max-output-kib", type=int, default=64, help="stdout and stderr kept per cell, each")
    parser.add_argument("--max-images", type=int, default=8, help="images returned per cell")
    parser.add_argument("--require", default="", help="comma-separated controls without which the template refuses")
    options = parser.parse_args(argv)
    os.umask(0o077)
    options.limits = isolation.Limits(
        memory_bytes=options.memory_mib << 20, processes=options.processes, file_bytes=options.disk_mib << 20)
    preload()
    isolation.open_to_nobody(sorted({os.path.realpath(path) for path in (sys.base_prefix, sys.prefix)}))
    networkless = isolation.isolate_network()
    options.controls = isolation.probe(options.work, [entry for entry in sys.path if os.path.isdir(entry)])
    options.controls += ["network"] if networkless else []
    missing = [name for name in options.require.split(",") if name and name not in options.controls]
    if missing:
        sys.exit(f"sandbox: refusing to start: {', '.join(missing)} not available here")
    template = Template(options)
    if options.ready_fd >= 0:
        os.close(options.ready_fd)
    gc.collect()
    gc.freeze()
    template.run()


if __name__ == "__main__":
    main()
