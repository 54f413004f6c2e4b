"""Python sessions as plain processes of this machine, forked from one warm template (sandbox/worker.py).

For machines without a container engine. It uses every control the kernel grants an ordinary process (own user, PID,
mount and network namespaces, seccomp, resource limits, scrubbed environment) but the kernel is shared and the host's
files are readable: it is NO security boundary. `toolserver/backends/docker_sandbox.py` is.
"""
from __future__ import annotations

import asyncio
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from hdpo.errors import ConfigError, UserError
from hdpo.toolserver.cgroups import session_groups
from hdpo.toolserver.owner import OwnedFolder, reap_folders
from hdpo.toolserver.sandbox_frames import FrameError
from hdpo.toolserver.sandbox_link import Template
from hdpo.toolserver.sandbox_pool import SessionPool
from hdpo.toolserver.sessions import SandboxError

log = logging.getLogger(__name__)
START_TIMEOUT_S = 90.0
"""Time for the template to import numpy and matplotlib on a busy machine, seconds."""
NO_NAMESPACES = (
    "the process sandbox needs unprivileged user namespaces, which this machine forbids: without them the model's code runs "
    "as you, with your keys, files and processes in reach. Use tools.sandbox=docker, or allow them (as root: sysctl -w "
    "kernel.apparmor_restrict_unprivileged_userns=0, or user.max_user_namespaces=10000); tools.i_trust_the_model=true "
    "(--i-trust-the-model) runs it all the same")


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

    `options` are further command-line options of sandbox/worker.py. `trusted` starts it even where sessions can't be kept
    apart from this user's other processes and files; otherwise that is a ConfigError. `memory_mib` bounds one session.
    """

    def __init__(self, options: Sequence[str] = (), trusted: bool = False, memory_mib: int = 2048) -> None:
        super().__init__()
        self._memory_mib = memory_mib
        self._options, self._trusted = list(options), trusted
        self._process: asyncio.subprocess.Process | None = None
        self._template: Template | None = None
        self._folder: OwnedFolder | None = None
        self._starting = asyncio.Lock()
        self.controls: list[str] = []

    async def start(self) -> None:
        """Start the template now instead of at the first session. Raises SandboxError, ConfigError or UserError."""
        await self._template_for("")

    async def _template_for(self, session_id: str) -> Template:
        async with self._starting:
            if self._template is None or self._template.ended:
                await self._stop()
                self._template = await self._launch()
            return self._template

    async def _launch(self) -> Template:
        reap_folders("process")
        self._folder = OwnedFolder("process")
        self._folder.path.chmod(0o711)     # sessions run as nobody and must reach their own folder, and only that
        work = self._folder.path / "work"
        work.mkdir()
        work.chmod(0o711)
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        try:
            with theirs:
                self._process = await asyncio.create_subprocess_exec(
                    sys.executable, str(worker_folder() / "worker.py"), "--lifeline-fd", str(theirs.fileno()),
                    "--work", str(work), "--memory-mib", str(self._memory_mib), *self._options,
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                    env=_environment(), cwd="/", pass_fds=(theirs.fileno(),), start_new_session=True)
            groups = session_groups(self._process.pid, self._memory_mib << 20)
            template = await asyncio.wait_for(Template.greet(ours, groups), START_TIMEOUT_S)
        except (OSError, EOFError, FrameError, SandboxError) as exc:
            await self._stop()
            raise SandboxError(f"the sandbox template did not start: {str(exc) or type(exc).__name__}") from exc
        self.controls = template.controls
        if "namespaces" not in self.controls and not self._trusted:
            self._template = template
            await self._stop()
            raise ConfigError(NO_NAMESPACES)
        log.warning("process sandbox: NO security boundary, for trusted or toy use; in force: %s",
                    ", ".join(self.controls) or "resource limits only")
        return template

    async def _stop(self) -> None:
        template, self._template = self._template, None
        if template is not None:
            template.close()
        if self._process is not None:
            if self._process.returncode is None:
                self._process.kill()
            await self._process.wait()
            self._process = None
        if template is not None:
            await template.forget_groups()
        if self._folder is not None:
            self._folder.remove()
            self._folder = None

    async def shutdown(self) -> None:
        """End all sessions, the template and its folder."""
        await super().shutdown()
        async with self._starting:
            await self._stop()


def _environment() -> dict[str, str]:
    """What the template may know: where programs, fonts and locales are. Nothing else is inherited."""
    keep = ("PATH", "HOME", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH")
    threads = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    return {name: os.environ[name] for name in keep if name in os.environ} | threads | {"MPLBACKEND": "Agg"}
