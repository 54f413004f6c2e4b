"""The warm template: forks one session per trajectory. Runs in a container or as a plain process; knows no training.

    python worker.py --socket /run/x/socket --work /run/x/work [--memory-mib 2048 ...]

Processes of one session:

    template      imported everything once, single-threaded, accepts connections and forks
      supervisor  outside the session's PID namespace; interrupts the session when told to, kills it when the client is gone
        session   init of its own PID namespace; runs the model's code; its death takes all its descendants

A client connects and passes one end of a socket pair with its first byte. The connection is the session's life: when
the client hangs up, for whatever reason, the session is killed; a byte `i` interrupts the running cell. The first
connection passes nothing and stands for the server: when it ends, the template ends, and everything with it.

Conversation over the socket pair, in frames: {"op": "open"} + images -> {"status": "ready"}; then any number of
{"op": "run", "code"} -> {"ok", "stdout", "stderr"} + PNG files, which the client must treat as hostile. The clock is
the client's too.
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
import time

import frames
import isolation
from cell import Capture, Interpreter, reap
from supervisor import Supervisor, run_in_fork


def preload(matplotlib_config: str, work: str) -> None:
    """Import and warm up what sessions will share. matplotlib insists on a writable folder for its font cache."""
    import warnings
    if matplotlib_config:
        os.environ["MPLCONFIGDIR"] = shutil.copytree(matplotlib_config, os.path.join(work, ".matplotlib"))

    import matplotlib.font_manager
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
    rehearse()
    fonts = getattr(matplotlib.font_manager, "_get_font", None)
    if fonts is not None:      # its hook empties this cache in every fork, which costs each of them 0.5 MB; empty, it does not
        fonts.cache_clear()


def rehearse() -> None:
    """Run cells as a session would: what Python caches, imports late and specialises is then done once and shared.

    Without it every session does so in pages of its own, 0.6 MB each.
    """
    kept = sys.modules["__main__"], sys.stdout, sys.stderr
    interpreter = Interpreter([], 1 << 16, 1)
    interpreter.streams = Capture(1 << 16, os.memfd_create("out")), Capture(1 << 16, os.memfd_create("err"))
    for code in ["1 + 1", "print('x')", "1 / 0", "import io\nImage.new('RGB', (2, 2)).save(io.BytesIO(), 'PNG')"] * 10:
        result, images = interpreter.run(code)
        frames.unpack(frames.pack(result, images)[frames.HEADER.size:], b"")
    for stream in interpreter.streams:
        os.close(stream.fd)
    sys.modules["__main__"], sys.stdout, sys.stderr = kept
    signal.signal(signal.SIGINT, signal.default_int_handler)


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
                    reap()
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
            run_in_fork(Supervisor(conn, self.options).run)
        conn.close()


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
    parser.add_argument("--matplotlib-config", default="", help="folder with a ready font cache, copied to the work folder")
    parser.add_argument("--require", default="", help="comma-separated controls without which the template refuses")
    options = parser.parse_args(argv)
    try:
        template = start(options)
    except (OSError, ImportError, RuntimeError) as exc:
        with open(options.socket + ".error", "w") as note:   # a container that removes itself takes its log with it
            note.write(f"{type(exc).__name__}: {exc}")
        raise
    template.run()


def start(options: argparse.Namespace) -> Template:
    """Everything up to the listening socket. Raises RuntimeError when a required control is missing."""
    os.umask(0o077)
    options.limits = isolation.Limits(
        memory_bytes=options.memory_mib << 20, processes=options.processes, file_bytes=options.disk_mib << 20)
    preload(options.matplotlib_config, options.work)
    isolation.open_to_nobody(sorted({os.path.realpath(path) for path in (sys.base_prefix, sys.prefix)}))
    networkless = isolation.isolate_network()
    options.controls = isolation.probe(options.work, [entry for entry in sys.path if os.path.isdir(entry)])
    options.controls += ["network"] if networkless else []
    missing = [name for name in options.require.split(",") if name and name not in options.controls]
    if missing:
        raise RuntimeError(f"refusing to start: {', '.join(missing)} not available here")
    template = Template(options)
    if options.ready_fd >= 0:
        os.close(options.ready_fd)
    gc.collect()
    gc.freeze()
    return template


if __name__ == "__main__":
    main()
