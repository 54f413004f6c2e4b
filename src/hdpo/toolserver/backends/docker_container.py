"""One hardened container: its controls, how it is started, and how none is left behind.

Checked before any code runs, and refused when missing: limits on memory, processes and CPU and seccomp (the engine says
so); inside, an unprivileged user, seccomp and in shared mode namespaces (the worker tries them). Always set, and enforced
by every engine: no network, read-only root, no capabilities, no new privileges, private IPC. AppArmor and SELinux are not
needed and not checked; in shared mode the engine's AppArmor profile is taken off, because it forbids the mounts by which
sessions are kept apart, and the worker's second seccomp filter forbids them again once they are made.
"""
from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docker
import docker.errors
import docker.types
import requests

from hdpo.errors import ConfigError
from hdpo.toolserver.owner import is_gone

log = logging.getLogger(__name__)
OWNER_LABEL, RUN_LABEL = "hdpo.sandbox.owner", "hdpo.sandbox.run"
ENGINE_TIMEOUT_S = 60
SESSION_PROCESSES = 64
"""Processes and threads of one session."""

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

    memory_mib: int
    processes: int
    session_mib: int           # of it, one session; 0: all, its sessions are one
    cpus: float = 0.0          # 0: all cores of the machine
    work_mib: int = 64         # tmpfs outside of sessions; each session brings its own


def connect(image: str, allow_weaker: bool) -> tuple[Any, bool]:
    """(client of the engine in DOCKER_HOST or on this machine, whether it uses AppArmor). Raises ConfigError when there is
    no engine, no `image`, or a control is missing and not `allow_weaker`."""
    try:
        client = docker.from_env(timeout=ENGINE_TIMEOUT_S)
        info = client.info()
        client.images.get(image)
    except docker.errors.ImageNotFound:
        raise ConfigError(f"no image {image}: build it with `make sandbox`") from None
    except (docker.errors.DockerException, requests.RequestException, OSError) as exc:
        raise ConfigError(f"no Docker engine: {exc}; start one, or use --sandbox process for trusted code") from None
    missing = missing_controls(info)
    if missing and not allow_weaker:
        raise ConfigError(f"this Docker engine lacks {', '.join(missing)}: refusing to run the model's code on it")
    for name in missing:
        log.warning("docker sandbox without %s, as asked", name)
    return client, any("apparmor" in option for option in info.get("SecurityOptions") or [])


def run_container(client: Any, image: str, path: Path, user: int, limits: ContainerLimits, owner: str, run: str,
                  shared: bool, apparmor: bool, require: str) -> Any:
    """Start a worker, as `user`, that connects to the socket at `path`, which is all it sees of this machine's files."""
    memory = f"{limits.memory_mib}m"
    security = ["no-new-privileges:true"]
    if shared:
        profile = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
            {"names": _DENIED, "action": "SCMP_ACT_ERRNO", "errnoRet": 1}]}
        security += [f"seccomp={json.dumps(profile)}"] + (["apparmor=unconfined"] if apparmor else [])
    return client.containers.run(
        image, detach=True, auto_remove=True, user=f"{user}:{user}", network_mode="none", read_only=True,
        command=["--connect", "/run/hdpo/socket", "--work", "/work", "--require", require,
                 "--memory-mib", str(limits.session_mib), "--processes", str(SESSION_PROCESSES if shared else 0)],
        tmpfs={"/work": f"rw,nosuid,nodev,size={limits.work_mib}m,mode=0700,uid={user},gid={user}"},
        volumes={str(path): {"bind": "/run/hdpo/socket", "mode": "ro"}}, cap_drop=["ALL"], security_opt=security,
        pids_limit=limits.processes, mem_limit=memory, memswap_limit=memory, shm_size="16m", ipc_mode="private",
        nano_cpus=int((limits.cpus or os.cpu_count() or 1) * 1e9), oom_score_adj=500, hostname="sandbox",
        ulimits=[docker.types.Ulimit(name="core", soft=0, hard=0)],
        labels={OWNER_LABEL: owner, RUN_LABEL: run},
        log_config=docker.types.LogConfig(type="json-file", config={"max-size": "1m", "max-file": "1"}))


def missing_controls(info: dict[str, Any]) -> list[str]:
    """What an engine's `info` says it can't enforce, of what a container here relies on."""
    missing = [name for key, name in (
        ("MemoryLimit", "memory limits"), ("PidsLimit", "process limits"), ("CpuCfsQuota", "CPU limits"))
        if not info.get(key)]
    if not any("seccomp" in option for option in info.get("SecurityOptions") or []):
        missing.append("seccomp")
    return missing


def reap(client: Any) -> int:
    """Remove sandbox containers whose owner is gone for certain; returns their number. A running one of an owner that
    can't be judged from here ends by itself as soon as it loses its connection to that owner."""
    count = 0
    for container in client.containers.list(all=True, filters={"label": OWNER_LABEL}, ignore_removed=True):
        if is_gone(container.labels[OWNER_LABEL]):
            remove(container)
            count += 1
    return count


def remove(container: Any) -> None:
    """Kill and remove; gone already is as good."""
    try:
        container.remove(force=True, v=True)
    except (docker.errors.DockerException, requests.RequestException) as exc:
        if "404" not in str(exc) and "409" not in str(exc):   # not found; removal already in progress
            log.warning("can't remove a sandbox container: %s", exc)


async def called_by(container: Any, listener: socket.socket) -> socket.socket:
    """The connection that the container's template makes as its first act. Raises EOFError when it ends before."""
    loop = asyncio.get_running_loop()
    while True:
        try:
            conn, _ = await asyncio.wait_for(loop.sock_accept(listener), 1.0)
            return conn
        except TimeoutError:
            try:
                await asyncio.to_thread(container.reload)
            except docker.errors.NotFound:
                raise EOFError("the container ended at its start") from None
