"""Python sessions in hardened containers of a Docker engine.

Two modes behind one interface. "shared" (the default): a container is a shard whose warm template forks many sessions,
each into its own user, PID, mount, IPC and UTS namespaces without capabilities and under a second seccomp filter.
"strict": one container per session, from a warm pool.

What confines a container is in docker_container.py; the only thing mounted is the socket by which its template calls
this process, read-only. It ends by itself when this process does, because its template watches that connection; `reap`
removes what an engine's failure may have left.
"""
from __future__ import annotations

import asyncio
import itertools
import logging
import os
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import docker
import docker.errors
import requests

from hdpo.pictures import opened
from hdpo.toolserver.backends.docker_container import (
    SESSION_PROCESSES,
    ContainerLimits,
    called_by,
    connect,
    reap,
    remove,
    run_container,
)
from hdpo.toolserver.cgroups import SessionGroups, session_groups
from hdpo.toolserver.owner import OwnedFolder, reap_folders
from hdpo.toolserver.sandbox_frames import FrameError
from hdpo.toolserver.sandbox_link import SessionLink, Template
from hdpo.toolserver.sandbox_pool import SessionPool
from hdpo.toolserver.sessions import SandboxError

log = logging.getLogger(__name__)
IMAGE = "hdpo-sandbox:latest"
START_TIMEOUT_S = 120.0
MAX_SESSION_MIB, SESSION_SHARE = 2048, 0.5
"""Memory of one session in a container of many: at most this much, and at most this part of the container's."""
OWN_PROCESSES = 63
"""Of a container, beside its sessions'."""
BYTES_PER_PIXEL = 24
"""Memory to expect of a session for each pixel of its pictures: decoded (4), as an array (3), another one, and one of floats."""
ROUNDING = 1e-6
MAX_STARTING = 8
"""Containers that start side by side."""
MAX_OPEN_FAILURES = 3
"""Sessions in a row a shard may fail to give before it is asked for no more."""


@dataclass(slots=True)
class Shard(Template):
    """A running container, its sessions, and how many in a row it has failed to give."""

    container: Any
    sessions: dict[str, float] = field(default_factory=dict)      # part of the container that each takes up
    failures: int = 0

    @property
    def usable(self) -> bool:
        return not self.ended and self.failures < MAX_OPEN_FAILURES

    @property
    def room(self) -> float:
        """Part of it that no session takes up."""
        return max(0.0, 1 - sum(self.sessions.values())) if self.usable else 0.0


class DockerSandbox(SessionPool):
    """Sessions in containers of `image`. See the module for the two modes.

    `memory_mib` and `cpus` bound one container; 0 is 8 GiB shared or 2 GiB strict, and all cores. `sessions_per_container`
    bounds a shard (shared mode); sessions with large pictures take up more than one such place. `warm` is the number of
    containers kept ready (strict mode). `allow_weaker` starts even where the engine lacks a control; otherwise that is a
    ConfigError naming it.
    """

    def __init__(self, image: str = IMAGE, mode: Literal["shared", "strict"] = "shared", run: str = "run",
                 memory_mib: int = 0, cpus: float = 0.0, sessions_per_container: int = 64, warm: int = 4,
                 allow_weaker: bool = False) -> None:
        super().__init__()
        self.image, self.mode, self.run_name = image, mode, run
        shared = mode == "shared"
        memory = memory_mib or (8192 if shared else 2048)
        self.per_container = sessions_per_container if shared else 1
        self.limits = ContainerLimits(
            memory, processes=self.per_container * (SESSION_PROCESSES + 1) + OWN_PROCESSES,      # all, with a supervisor each
            session_mib=min(MAX_SESSION_MIB, int(SESSION_SHARE * memory)) if shared else 0, cpus=cpus)
        self.warm = 1 if shared else warm
        self.allow_weaker = allow_weaker
        self._shards: list[Shard] = []
        self._assigned: dict[str, Shard] = {}
        self._waiting: dict[object, float] = {}      # parts of a container that sessions without a place will take up
        self._refill: asyncio.Task[None] | None = None
        self._starting: set[asyncio.Task[Shard]] = set()
        self._folder: OwnedFolder | None = None
        self._numbers = itertools.count()
        self._client: Any = None
        self._apparmor = False

    # -- sessions ----------------------------------------------------------------------------------------------------
    async def start(self) -> None:
        """Check the engine, remove leftovers of dead owners, start the first containers. Raises ConfigError."""
        self._client, self._apparmor = await asyncio.to_thread(connect, self.image, self.allow_weaker)
        await asyncio.to_thread(reap, self._client)
        reap_folders("docker")      # after their containers, which are judged by what lies in them
        self._folder = OwnedFolder("docker")
        await self._grow(self.warm)
        log.info("docker sandbox (%s): %s; in force inside: %s", self.mode, self.image, ", ".join(self._shards[0].controls))

    async def _template_for(self, session_id: str) -> Template:
        shard = self._assigned.get(session_id)
        if shard is None or shard.ended:
            self._leave(session_id)
            shard = await self._take_place(session_id, self._part(session_id))
            if self.mode == "strict" and (self._refill is None or self._refill.done()):
                self._refill = asyncio.create_task(self._keep_warm())
        return shard

    def _part(self, session_id: str) -> float:
        """Of a container, that the session takes up: a place, or more by the pixels of its pictures."""
        session = self._sessions.get(session_id)
        pixels = 0 if session is None or self.mode == "strict" else sum(map(_pixels, session.images))
        return min(1.0, max(1 / self.per_container, BYTES_PER_PIXEL * pixels / (self.limits.memory_mib << 20)))

    async def _take_place(self, session_id: str, part: float) -> Shard:
        """The emptiest shard where the session finds room; as many are started as those that wait will fill. Raises
        SandboxError when none can be had."""
        me, failure = object(), None
        try:
            while True:
                self._discard_dead()
                if session_id not in self._sessions:
                    raise SandboxError("the session was closed")
                shard = max(self._shards, key=lambda shard: shard.room, default=None)
                if shard is not None and shard.room >= part - ROUNDING:
                    shard.sessions[session_id] = part
                    self._assigned[session_id] = shard
                    return shard
                if failure is not None and not self._starting:
                    raise failure
                self._waiting[me] = part
                if len(self._starting) < min(MAX_STARTING, _containers(self._waiting.values())):
                    self._start(1)
                done, _ = await asyncio.wait(self._starting, return_when=asyncio.FIRST_COMPLETED)
                failure = next((exc for task in done if not task.cancelled() and (exc := task.exception())), None)
        finally:
            self._waiting.pop(me, None)

    def _leave(self, session_id: str) -> Shard | None:
        shard = self._assigned.pop(session_id, None)
        if shard is not None:
            shard.sessions.pop(session_id, None)
        return shard

    def _open_failed(self, session_id: str) -> None:
        shard = self._leave(session_id)
        if shard is not None:
            shard.failures += 1

    async def _connect(self, session_id: str, images: Sequence[bytes]) -> tuple[Template, SessionLink]:
        template, link = await super()._connect(session_id, images)
        if (shard := self._assigned.get(session_id)) is not None:     # not closed in the meantime
            shard.failures = 0
        return template, link

    async def close(self, session_id: str) -> None:
        await super().close(session_id)
        shard = self._leave(session_id)
        if shard is not None and self.mode == "strict":
            await self._discard(shard)

    async def shutdown(self) -> None:
        """End all sessions, containers and their folders."""
        if self._refill is not None:
            await self._refill
        await asyncio.gather(*self._starting, return_exceptions=True)   # what is on its way must be there to be removed
        self._assigned.clear()
        await super().shutdown()
        await asyncio.gather(*(self._discard(shard) for shard in list(self._shards)))
        if self._folder is not None:
            self._folder.remove()
        if self._client is not None:
            await asyncio.to_thread(self._client.close)

    # -- containers --------------------------------------------------------------------------------------------------
    async def _keep_warm(self) -> None:
        try:
            missing = self.warm - len(self._starting) - sum(not shard.sessions for shard in self._shards)
            if missing > 0:
                await self._grow(missing)
        except SandboxError as exc:   # the next session will ask for a container itself, and say so if there is none
            log.warning("%s", exc)

    async def _grow(self, count: int) -> list[Shard]:
        return [await asyncio.shield(task) for task in self._start(count)]

    def _start(self, count: int) -> list[asyncio.Task[Shard]]:
        """Start containers. A caller that gives up waiting doesn't stop them: they serve the next one."""
        tasks = [asyncio.create_task(self._start_shard()) for _ in range(count)]
        self._starting.update(tasks)
        for task in tasks:
            task.add_done_callback(self._started)
        return tasks

    def _started(self, task: asyncio.Task[Shard]) -> None:
        self._starting.discard(task)
        if not task.cancelled() and task.exception() is None:
            self._shards.append(task.result())

    async def _start_shard(self) -> Shard:
        assert self._folder is not None
        number = next(self._numbers)
        path = self._folder.path / str(number)
        container = None
        with socket.socket(socket.AF_UNIX) as listener:      # gone as soon as the template has called
            try:
                listener.setblocking(False)
                listener.bind(str(path))
                path.chmod(0o666)      # the folder around it is this user's alone
                listener.listen(1)
                container = await asyncio.to_thread(self._run_container, path)
                conn = await asyncio.wait_for(called_by(container, listener), START_TIMEOUT_S)
                groups = await asyncio.to_thread(self._groups, container)
                return await asyncio.wait_for(
                    Shard.greet(conn, groups, alone=self.mode == "strict", container=container), START_TIMEOUT_S)
            except (docker.errors.DockerException, requests.RequestException, OSError, EOFError, FrameError, SandboxError) as exc:
                if container is not None:
                    await asyncio.to_thread(remove, container)
                why = str(exc) or type(exc).__name__
                if "namespaces" in why:
                    why += "; allow unprivileged user namespaces on this machine, or use --sandbox docker-strict"
                raise SandboxError(f"no sandbox container: {why}") from exc
            finally:
                path.unlink(missing_ok=True)

    def _run_container(self, path: Path) -> Any:
        assert self._folder is not None
        shared = self.mode == "shared"
        require = "" if self.allow_weaker else "user,seccomp" + (",namespaces" if shared else "")
        user = os.getuid() or 65534     # never root inside
        return run_container(self._client, self.image, path, user, self.limits, self._folder.label, self.run_name, shared,
                             self._apparmor, require)

    def _groups(self, container: Any) -> SessionGroups | None:
        container.reload()
        return session_groups(container.attrs["State"]["Pid"], self.limits.session_mib << 20, must_contain=container.id)

    def _discard_dead(self) -> None:
        """Containers that ended, and those that give no sessions any more once nobody works in them."""
        for shard in [shard for shard in self._shards if shard.ended or not (shard.usable or shard.sessions)]:
            asyncio.ensure_future(self._discard(shard))
            self._shards.remove(shard)

    async def _discard(self, shard: Shard) -> None:
        if shard in self._shards:
            self._shards.remove(shard)
        shard.close()
        await asyncio.to_thread(remove, shard.container)
        await shard.forget_groups()


def _containers(parts: Iterable[float]) -> int:
    """How many containers sessions that take up these parts of one will fill, first come, first placed."""
    rooms: list[float] = []
    for part in parts:
        place = next((k for k, room in enumerate(rooms) if room >= part - ROUNDING), None)
        if place is None:
            rooms.append(1 - part)
        else:
            rooms[place] -= part
    return len(rooms)


def _pixels(data: bytes) -> int:
    """Of an encoded picture, by its header; 0 where a session will refuse it."""
    try:
        with opened(data) as image:
            return image.width * image.height
    except Exception:  # noqa: BLE001 - Pillow's plugins raise whatever a damaged file leads them to
        return 0
