"""Python sessions as plain processes of this machine, forked from one warm template (sandbox/worker.py).

For machines without a container engine. It uses every control the kernel grants an ordinary process (own user, PID,
mount and network namespaces, seccomp, resource limits, scrubbed environment) but the kernel is shared and the host's
files are readable: it is NO security boundary. `toolserver/backends/docker_sandbox.py` is.
"""
from __future__ import annotations

import asyncio
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from hdpo.errors import UserError
from hdpo.toolserver.sandbox_frames import FrameError, read_frame
from hdpo.toolserver.sandbox_link import SessionPool, Template, socket_folder
from hdpo.toolserver.sessions import SandboxError

log = logging.getLogger(__name__)
START_TIMEOUT_S = 90.0
"""Time for the template to import numpy and matplotlib on a busy machine, seconds."""


def worker_folder() -> Path:
    """Folder of sandbox/worker.py: HDPO_SANDBOX_DIR, the checkout's, or the installed package's. Raises UserError."""
    package = Path(__file__).resolve().parents[2]
    named = os.environ.get("HDPO_SANDBOX_DIR")
    folders = [Path(named)] if named else [package.parents[1] / "sandbox", package / "sandbox"]
    for folder in folders:
        if (folder / "worker.py").is_file():
            return folder
    raise UserError(f"{folders[0]}/worker.py: not found; set HDPO_SANDBOX_DIR to the sandbox folder of the repository")


class ProcessSandbox(SessionPool):
    """One template process. Everything it forks ends with this process, however that ends.

    `options` are further command-line options of sandbox/worker.py.
    """

    def __init__(self, options: Sequence[str] = ()) -> None:
        super().__init__()
        self._options = list(options)
        self._process: asyncio.subprocess.Process | None = None
        self._template: Template | None = None
        self._folder: Path | None = None
        self._starting = asyncio.Lock()
        self.controls: list[str] = []

    async def start(self) -> None:
        """Start the template now instead of at the first session. Raises SandboxError or UserError."""
        await self._template_for("")

    async def _template_for(self, session_id: str) -> Template:
        async with self._starting:
            if self._template is None or self._template.ended:
                await self._stop()
                self._template = await self._launch()
            return self._template

    async def _launch(self) -> Template:
        self._folder = socket_folder()
        self._folder.chmod(0o711)     # sessions run as nobody and must reach their own folder, and only that
        (self._folder / "work").mkdir()
        (self._folder / "work").chmod(0o711)
        path = str(self._folder / "socket")
        ready, theirs = os.pipe()
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, str(worker_folder() / "worker.py"), "--socket", path, "--ready-fd", str(theirs),
                "--work", str(self._folder / "work"), *self._options, stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, env=_environment(), cwd="/", pass_fds=(theirs,), start_new_session=True)
        finally:
            os.close(theirs)
        try:
            await asyncio.wait_for(_wait_readable(ready), START_TIMEOUT_S)
            reader, lifeline = await asyncio.open_unix_connection(path)
            message, _ = await asyncio.wait_for(read_frame(reader), START_TIMEOUT_S)
        except (OSError, EOFError, FrameError) as exc:
            await self._stop()
            raise SandboxError(f"the sandbox template did not start: {str(exc) or type(exc).__name__}") from exc
        finally:
            os.close(ready)
        self.controls = [str(name) for name in message.get("controls", [])]
        log.warning("process sandbox: NO security boundary, for trusted or toy use; in force: %s",
                    ", ".join(self.controls) or "resource limits only")
        return Template(self._folder, reader, lifeline, self.controls)

    async def _stop(self) -> None:
        if self._template is not None:
            self._template.lifeline.close()
            self._template = None
        if self._process is not None:
            if self._process.returncode is None:
                self._process.kill()
            await self._process.wait()
            self._process = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    async def shutdown(self) -> None:
        """End all sessions, the template and its folder."""
        await super().shutdown()
        async with self._starting:
            await self._stop()


async def _wait_readable(fd: int) -> None:
    """Until the other end writes or is closed."""
    loop, ready = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(fd, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(fd)


def _environment() -> dict[str, str]:
    """What the template may know: where programs, fonts and locales are. Nothing else is inherited."""
    keep = ("PATH", "HOME", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH")
    threads = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    return {name: os.environ[name] for name in keep if name in os.environ} | threads | {"MPLBACKEND": "Agg"}
