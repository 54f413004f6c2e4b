"""Python sessions in hardened containers of a Docker engine.

Two modes behind one interface. "shared" (the default): a container is a shard whose warm template forks many sessions,
each into its own user, PID, mount, IPC and UTS namespaces without capabilities and under a second seccomp filter.
"strict": one container per session, from a warm pool.

A container has no network, a read-only root, no capabilities, no new privileges, a seccomp profile and limits on
memory, processes and CPU; the only thing mounted is the folder of its socket. It ends by itself when this process
does, because its template watches a connection to it; `reap` removes what an engine's failure may have left.
"""
from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import docker
import docker.errors
import docker.types
import requests

from hdpo.errors import ConfigError
from hdpo.toolserver.sandbox_link import FrameError, SessionPool, read_frame, socket_folder
from hdpo.toolserver.sessions import SandboxError

log = logging.getLogger(__name__)
IMAGE = "hdpo-sandbox:latest"
OWNER_LABEL, RUN_LABEL = "hdpo.sandbox.owner", "hdpo.sandbox.run"
START_TIMEOUT_S = 120.0
ENGINE_TIMEOUT_S = 60
MAX_OPEN_FAILURES = 3
"""Sessions in a row a shard may fail to give before it is thrown away."""

_DENIED = [
    "acct", "add_key", "bpf", "chroot", "delete_module", "fanotify_init", "finit_module", "fsconfig", "fsmount", "fsopen",
    "fspick", "init_module", "io_uring_enter", "io_uring_register", "io_uring_setup", "ioperm", "iopl", "kexec_file_load",
    "kexec_load", "keyctl", "lookup_dcookie", "modify_ldt", "move_mount", "name_to_handle_at", "nfsservctl",
    "open_by_handle_at", "open_tree", "perf_event_open", "pidfd_getfd", "pivot_root", "process_madvise",
    "process_vm_readv", "process_vm_writev", "ptrace", "quotactl", "reboot", "request_key", "setns", "settimeofday",
    "stime", "swapoff", "swapon", "syslog", "umount2", "userfaultfd", "vhangup"]
"""System calls no process of a shard may make. `unshare`, `mount` and `mount_setattr` must stay for the set-up of a
session, which then denies them to itself before any of the model's code runs."""


@dataclass(frozen=True, slots=True)
class ContainerLimits:
    """What one container may use."""

    memory_mib: int = 8192
    processes: int = 2048
    cpus: float = 0.0          # 0: all cores of the machine
    work_mib: int = 64         # tmpfs outside of sessions; each session brings its own


@dataclass(slots=True)
class Shard:
    """A running container and the connection whose end is its end."""

    container: Any
    folder: Path
    lifeline: asyncio.StreamWriter
    reader: asyncio.StreamReader
    controls: list[str]
    sessions: set[str] = field(default_factory=set)
    failures: int = 0

    @property
    def socket(self) -> str:
        return str(self.folder / "socket")

    @property
    def alive(self) -> bool:
        return not (self.reader.at_eof() or self.lifeline.is_closing()) and self.failures < MAX_OPEN_FAILURES


class DockerSandbox(SessionPool):
    """Sessions in containers of `image`. See the module for the two modes.

    `sessions_per_container` bounds a shard (shared mode), `warm` is the number of containers kept ready (strict mode).
    `allow_weaker` starts even where the engine lacks a control; otherwise that is a ConfigError naming it.
    """

    def __init__(self, image: str = IMAGE, mode: Literal["shared", "strict"] = "shared", run: str = "run",
                 limits: ContainerLimits | None = None, sessions_per_container: int = 64, warm: int = 4,
                 allow_weaker: bool = False) -> None:
        super().__init__()
        self.image, self.mode, self.run_name = image, mode, run
        self.limits = limits or ContainerLimits(**({} if mode == "shared" else {"memory_mib": 2048, "processes": 128}))
        self.per_container = sessions_per_container if mode == "shared" else 1
        self.warm = warm if mode == "strict" else 1
        self.allow_weaker = allow_weaker
        self._shards: list[Shard] = []
        self._assigned: dict[str, Shard] = {}
        self._growing = asyncio.Lock()
        self._refill: asyncio.Task[None] | None = None
        self._starting: set[asyncio.Task[Shard]] = set()
        self._client: Any = None

    # -- sessions ----------------------------------------------------------------------------------------------------
    async def start(self) -> None:
        """Check the engine, remove leftovers of dead owners, start the first containers. Raises ConfigError."""
        await asyncio.to_thread(self._connect_engine)
        await asyncio.to_thread(reap, self._client)
        await self._grow(self.warm)
        log.info("docker sandbox (%s): %s; in force inside: %s", self.mode, self.image, ", ".join(self._shards[0].controls))

    async def _socket_for(self, session_id: str) -> str:
        shard = self._assigned.get(session_id)
        if shard is None or not shard.alive:
            shard = await self._free_shard()
            self._assign(session_id, shard)
        return shard.socket

    async def _free_shard(self) -> Shard:
        self._discard_dead()
        free = [shard for shard in self._shards if shard.alive and len(shard.sessions) < self.per_container]
        if not free:
            async with self._growing:
                free = [shard for shard in self._shards if shard.alive and len(shard.sessions) < self.per_container]
                if not free:
                    free = await self._grow(1)
        if self.mode == "strict" and (self._refill is None or self._refill.done()):
            self._refill = asyncio.create_task(self._keep_warm())
        return min(free, key=lambda shard: len(shard.sessions))

    def _assign(self, session_id: str, shard: Shard) -> None:
        if (before := self._assigned.pop(session_id, None)) is not None:
            before.sessions.discard(session_id)
        self._assigned[session_id] = shard
        shard.sessions.add(session_id)

    def _open_failed(self, session_id: str) -> None:
        shard = self._assigned.pop(session_id, None)
        if shard is not None:
            shard.sessions.discard(session_id)
            shard.failures += 1

    async def close(self, session_id: str) -> None:
        await super().close(session_id)
        shard = self._assigned.pop(session_id, None)
        if shard is not None:
            shard.sessions.discard(session_id)
            if self.mode == "strict":
                await self._discard(shard)

    async def shutdown(self) -> None:
        """End all sessions, containers and their folders."""
        if self._refill is not None:
            await self._refill
        await asyncio.gather(*self._starting, return_exceptions=True)   # what is on its way must be there to be removed
        self._assigned.clear()
        await super().shutdown()
        await asyncio.gather(*(self._discard(shard) for shard in list(self._shards)))
        if self._client is not None:
            await asyncio.to_thread(self._client.close)

    # -- containers --------------------------------------------------------------------------------------------------
    async def _keep_warm(self) -> None:
        try:
            async with self._growing:
                missing = self.warm - sum(not shard.sessions for shard in self._shards)
                if missing > 0:
                    await self._grow(missing)
        except SandboxError as exc:   # the next session will ask for a container itself, and say so if there is none
            log.warning("%s", exc)

    async def _grow(self, count: int) -> list[Shard]:
        """Start containers. A caller that gives up waiting doesn't stop them: they serve the next one."""
        tasks = [asyncio.create_task(self._start_shard()) for _ in range(count)]
        self._starting.update(tasks)
        for task in tasks:
            task.add_done_callback(self._started)
        return [await asyncio.shield(task) for task in tasks]

    def _started(self, task: asyncio.Task[Shard]) -> None:
        self._starting.discard(task)
        if not task.cancelled() and task.exception() is None:
            self._shards.append(task.result())

    async def _start_shard(self) -> Shard:
        folder = socket_folder()
        user = os.getuid() or 65534     # never root inside; a root server hands the folder to nobody
        os.chown(folder, user, -1)
        container = None
        try:
            container = await asyncio.to_thread(self._run_container, folder, user)
            reader, writer, controls = await asyncio.wait_for(_lifeline(str(folder / "socket"), container), START_TIMEOUT_S)
            return Shard(container, folder, writer, reader, controls)
        except (docker.errors.DockerException, requests.RequestException, OSError, EOFError, FrameError) as exc:
            said = (folder / "socket.error").read_text() if (folder / "socket.error").is_file() else ""
            if container is not None:
                await asyncio.to_thread(_remove, container)
            shutil.rmtree(folder, ignore_errors=True)
            raise SandboxError(f"no sandbox container: {said or exc or type(exc).__name__}") from exc

    def _run_container(self, folder: Path, user: int) -> Any:
        limits = self.limits
        memory = f"{limits.memory_mib}m"
        shared = self.mode == "shared"
        profile = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
            {"names": _DENIED, "action": "SCMP_ACT_ERRNO", "errnoRet": 1}]}
        security = ["no-new-privileges:true"] + ([f"seccomp={json.dumps(profile)}"] if shared else [])
        require = "user,seccomp" + (",namespaces" if shared else "")
        return self._client.containers.run(
            self.image, detach=True, auto_remove=True, user=f"{user}:{user}", network_mode="none", read_only=True,
            command=["--socket", "/run/hdpo/socket", "--work", "/work", "--require", "" if self.allow_weaker else require],
            tmpfs={"/work": f"rw,nosuid,nodev,size={limits.work_mib}m,mode=0700,uid={user},gid={user}"},
            volumes={str(folder): {"bind": "/run/hdpo", "mode": "rw"}}, cap_drop=["ALL"], security_opt=security,
            pids_limit=limits.processes, mem_limit=memory, memswap_limit=memory, shm_size="16m", ipc_mode="private",
            nano_cpus=int((limits.cpus or os.cpu_count() or 1) * 1e9), oom_score_adj=500, hostname="sandbox",
            ulimits=[docker.types.Ulimit(name="core", soft=0, hard=0)],
            labels={OWNER_LABEL: owner(), RUN_LABEL: self.run_name},
            log_config=docker.types.LogConfig(type="json-file", config={"max-size": "1m", "max-file": "1"}))

    def _discard_dead(self) -> None:
        for shard in [shard for shard in self._shards if not shard.alive]:
            asyncio.ensure_future(self._discard(shard))
            self._shards.remove(shard)

    async def _discard(self, shard: Shard) -> None:
        if shard in self._shards:
            self._shards.remove(shard)
        shard.lifeline.close()
        await asyncio.to_thread(_remove, shard.container)
        shutil.rmtree(shard.folder, ignore_errors=True)

    def _connect_engine(self) -> None:
        try:
            self._client = docker.from_env(timeout=ENGINE_TIMEOUT_S)
            info = self._client.info()
            self._client.images.get(self.image)
        except docker.errors.ImageNotFound:
            raise ConfigError(f"no image {self.image}: build it with `make sandbox`") from None
        except (docker.errors.DockerException, requests.RequestException, OSError) as exc:
            raise ConfigError(f"no Docker engine: {exc}; start one, or use --sandbox process for trusted code") from None
        missing = missing_controls(info)
        if missing and not self.allow_weaker:
            raise ConfigError(f"this Docker engine lacks {', '.join(missing)}: refusing to run the model's code on it")
        for name in missing:
            log.warning("docker sandbox without %s, as asked", name)


def missing_controls(info: dict[str, Any]) -> list[str]:
    """What an engine's `info` says it can't enforce, of what a container here relies on."""
    missing = [name for key, name in (
        ("MemoryLimit", "memory limits"), ("PidsLimit", "process limits"), ("CpuCfsQuota", "CPU limits"))
        if not info.get(key)]
    if not any("seccomp" in option for option in info.get("SecurityOptions") or []):
        missing.append("seccomp")
    return missing


def owner() -> str:
    """This process, recognisable even after its PID has been given to another."""
    return f"{os.getpid()}:{_start_time(os.getpid())}"


def _start_time(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except OSError:
        return ""


def reap(client: Any) -> int:
    """Remove sandbox containers whose owner is gone; returns their number."""
    count = 0
    for container in client.containers.list(all=True, filters={"label": OWNER_LABEL}, ignore_removed=True):
        pid, _, started = container.labels[OWNER_LABEL].partition(":")
        if not pid.isdigit() or _start_time(int(pid)) != started:
            _remove(container)
            count += 1
    return count


def _remove(container: Any) -> None:
    """Kill and remove; gone already is as good."""
    try:
        container.remove(force=True, v=True)
    except (docker.errors.DockerException, requests.RequestException) as exc:
        if "404" not in str(exc) and "409" not in str(exc):   # not found; removal already in progress
            log.warning("can't remove a sandbox container: %s", exc)


async def _lifeline(path: str, container: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, list[str]]:
    """Connect as soon as the template listens. Raises EOFError when the container ends before."""
    checked = time.monotonic()
    while True:
        try:
            reader, writer = await asyncio.open_unix_connection(path)
            break
        except OSError:
            await asyncio.sleep(0.02)
        if time.monotonic() - checked > 1.0:
            checked = time.monotonic()
            try:
                await asyncio.to_thread(container.reload)
            except docker.errors.NotFound:
                raise EOFError("the container ended at its start") from None
    message, _ = await read_frame(reader)
    return reader, writer, [str(name) for name in message.get("controls", [])]
