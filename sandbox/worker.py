"""The warm template: forks one session per trajectory. Runs in a container or as a plain process; knows no training.

    python worker.py --connect /run/hdpo/socket --work /work [--memory-mib 2048 ...]

Processes of one session:

    template      imported everything once, single-threaded, forks when the server asks it to
      supervisor  outside the session's PID namespace; holds it to its limits, kills it when the client is gone
        session   init of its own PID namespace; runs the model's code; its death takes all its descendants

The template has one connection, to the server: it makes it itself, or inherits it, so there is nothing that a session, or
anyone, could connect to. Each byte on it brings two sockets, a session's control (supervisor.py) and its conversation, and
maybe a control group to join.
When the connection ends, the template ends, and everything with it. When the client hangs up a control socket, for
whatever reason, that session is killed.

Conversation, in frames: {"op": "open"} + images -> {"status": "ready"}; then any number of cells, each answered by what it
did and PNG files, which the client must treat as hostile. The clock is the client's too.
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

import frames
import isolation
from cell import Capture, Interpreter, reap
from processes import PAGE
from session import own_environment
from supervisor import Supervisor, run_in_fork
from watch import Room

NO_PROCESS = b"f"
"""Said on a session's control socket instead of a supervisor's words: the system refused the fork."""


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
    interpreter = Interpreter(1 << 16, 1)
    interpreter.begin([])
    interpreter.streams = Capture(1 << 16, os.memfd_create("out")), Capture(1 << 16, os.memfd_create("err"))
    for code in ["1 + 1", "print('x')", "1 / 0", "import io\nImage.new('RGB', (2, 2)).save(io.BytesIO(), 'PNG')"] * 10:
        result, images = interpreter.run(code)
        frames.pack_answer(result, images)
    for stream in interpreter.streams:
        os.close(stream.fd)
    sys.modules["__main__"], sys.stdout, sys.stderr = kept
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Template:
    """Forks supervisors as the server asks for them, reaps them."""

    def __init__(self, lifeline: socket.socket, options: argparse.Namespace) -> None:
        self.lifeline, self.options = lifeline, options

    def run(self) -> None:
        """Serve until the lifeline ends."""
        signal.signal(signal.SIGCHLD, lambda *_: None)      # interrupts nothing (PEP 475), but wakes the poll
        wake_read, wake_write = self.wake = socket.socketpair()
        for end in self.wake:
            end.setblocking(False)
        signal.set_wakeup_fd(wake_write.fileno())
        poll = select.poll()
        poll.register(self.lifeline, select.POLLIN)
        poll.register(wake_read, select.POLLIN)
        frames.send(self.lifeline, {"status": "ready", "protocol": frames.PROTOCOL, "controls": self.options.controls})
        while True:
            for fd, _ in poll.poll():
                if fd == wake_read.fileno():
                    wake_read.recv(4096)
                    reap()
                elif not self._serve():
                    return

    def _serve(self) -> bool:
        """Start the session that is asked for; False at the end of the lifeline."""
        order, fds, _, _ = socket.recv_fds(self.lifeline, 1, 3)
        if len(fds) >= 2:
            with socket.socket(fileno=fds[0]) as client, socket.socket(fileno=fds[1]) as data:
                for fd in fds:
                    os.set_inheritable(fd, False)
                self._fork(client, data, fds[2] if len(fds) > 2 else -1)
        for fd in fds[2:]:
            os.close(fd)
        return order != b""

    def _fork(self, client: socket.socket, data: socket.socket, group: int) -> None:
        try:
            pid = isolation.fork()
        except OSError:           # no process or no memory left: this session can't be had, the others go on
            client.send(NO_PROCESS)
            return
        if pid == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for end in (self.lifeline, *self.wake):
                end.close()
            run_in_fork(Supervisor(client, data, group, self.options).run)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--connect", default="", help="unix socket of the server")
    parser.add_argument("--lifeline-fd", type=int, default=-1, help="instead of --connect: an inherited connection to it")
    parser.add_argument("--work", required=True, help="folder (mount point) where sessions work")
    parser.add_argument("--address-mib", type=int, default=2048, help="address space of one process of a session")
    parser.add_argument("--memory-mib", type=int, default=2048, help="memory of one session; 0: all of its container's")
    parser.add_argument("--processes", type=int, default=64,
                        help="processes and threads of one session; 0: as many as its container may have")
    parser.add_argument("--disk-mib", type=int, default=64, help="files of one session")
    parser.add_argument("--max-output-kib", type=int, default=64, help="stdout and stderr kept per cell, each")
    parser.add_argument("--max-images", type=int, default=8, help="images returned per cell")
    parser.add_argument("--matplotlib-config", default="", help="folder with a ready font cache, copied to the work folder")
    parser.add_argument("--require", default="", help="comma-separated controls without which the template refuses")
    options = parser.parse_args(argv)
    lifeline = socket.socket(fileno=options.lifeline_fd) if options.lifeline_fd >= 0 else socket.socket(socket.AF_UNIX)
    if options.connect:
        lifeline.connect(options.connect)
    lifeline.set_inheritable(False)
    try:
        prepare(options)
    except (OSError, ImportError, RuntimeError) as exc:      # a container that removes itself takes its log with it
        frames.send(lifeline, {"status": "refused", "why": f"{type(exc).__name__}: {exc}"})
        raise
    Template(lifeline, options).run()


def prepare(options: argparse.Namespace) -> None:
    """Everything that comes before the first session. Raises RuntimeError when a required control is missing."""
    os.umask(0o077)
    preload(options.matplotlib_config, options.work)
    isolation.open_to_nobody(sorted({os.path.realpath(path) for path in (sys.base_prefix, sys.prefix)}))
    networkless = isolation.isolate_network()
    options.controls = isolation.probe(options.work, [entry for entry in sys.path if os.path.isdir(entry)])
    options.controls += ["network"] if networkless else []
    missing = [name for name in options.require.split(",") if name and name not in options.controls]
    if missing:
        raise RuntimeError(f"refusing to start: {', '.join(missing)} not available here")
    address, memory = options.address_mib << 20, options.memory_mib << 20
    if memory:      # one process alone meets MemoryError before its session is over the limit
        with open("/proc/self/statm") as file:
            address = min(address, memory + int(file.read().split()[0]) * PAGE)
    options.room = Room()
    options.limits = isolation.Limits(address, memory, options.processes, options.disk_mib << 20)
    own_environment(options.work)
    options.own_main = sys.modules["__main__"]      # kept: its end would touch all that it has
    options.interpreter = Interpreter(options.max_output_kib << 10, options.max_images)
    gc.collect()
    gc.freeze()


if __name__ == "__main__":
    main()
