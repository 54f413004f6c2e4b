"""Several nodes find each other: bounded waits that end in one line, and the network interface to talk over.

A launcher that can't reach node 0, or a node that never comes, otherwise shows as a time-out of minutes to half an hour
inside a collective, with a traceback. Standard library only, besides the store that the launcher already runs.
"""
from __future__ import annotations

import contextlib
import datetime
import fcntl
import os
import socket
import struct
import time

from hdpo.errors import ConfigError

_SIOCGIFADDR = 0x8915


def join_timeout_s() -> float:
    """Longest wait of a node for the others, seconds (JOIN_TIMEOUT_S, default 600)."""
    text = os.environ.get("JOIN_TIMEOUT_S") or "600"
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"JOIN_TIMEOUT_S: not a number of seconds: {text}") from None


def wait_for_master(address: str, port: int, node: int, timeout_s: float) -> None:
    """Return once node 0 listens at `address`:`port`. Raises ConfigError with one line when it can't be reached."""
    started, problem = time.monotonic(), ""
    while True:
        try:
            with socket.create_connection((address, port), timeout=min(5.0, timeout_s)):
                return
        except socket.gaierror as exc:
            raise ConfigError(f"node {node}: MASTER_ADDR {address} is no known host name or address ({exc.strerror})") from None
        except OSError as exc:
            problem = exc.strerror or str(exc)
        if time.monotonic() - started > timeout_s:
            raise ConfigError(
                f"node {node}: no answer from MASTER_ADDR {address}, MASTER_PORT {port}, within {timeout_s:g} s ({problem}); is "
                "NODE_RANK=0 running there, and the port open?")
        time.sleep(0.2)


def wait_for_ranks(timeout_s: float | None = None) -> None:
    """Return once the ranks of all nodes have been started, or raise ConfigError that names the nodes which have not.

    Asks the launcher's store, before torch.distributed is initialised; without a launcher, or on one node, does nothing.
    """
    nodes = int(os.environ.get("GROUP_WORLD_SIZE", 1))
    if nodes == 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    from torch.distributed import TCPStore

    use_interface_towards(os.environ["MASTER_ADDR"])
    limit = join_timeout_s() if timeout_s is None else timeout_s
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=False, timeout=datetime.timedelta(seconds=limit), wait_for_workers=False)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store.add(f"hdpo/{attempt}/node/{os.environ['GROUP_RANK']}", 1)
    deadline = time.monotonic() + limit
    while missing := [node for node in range(nodes) if not store.check([f"hdpo/{attempt}/node/{node}"])]:
        if time.monotonic() > deadline:
            raise ConfigError(
                f"node{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))} of {nodes} did not come to "
                f"{address}:{port} within {limit:g} s; start the same command there, with NODE_RANK={missing[0]}, or set NNODES")
        time.sleep(0.2)


def use_interface_towards(address: str) -> None:
    """Let gloo and NCCL talk over the interface that reaches node 0, unless the user has named one.

    Both otherwise take what the host's own name resolves to, which is a loopback address on many machines.
    """
    name = interface_towards(address)
    if name:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", name)


def interface_towards(address: str) -> str:
    """Name of the local interface whose address is used to reach `address`; empty when that can't be told."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))    # sends nothing: only asks the routing table
        mine = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):    # an interface without an IPv4 address
                reply = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(reply[20:24]) == mine:
                    return name
    return ""
