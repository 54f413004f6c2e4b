"""Several nodes find each other: bounded waits that end in one line, and the network interface to talk over.

A launcher that can't reach node 0 otherwise shows as a time-out after many minutes, with a traceback. Standard library
only.
"""
from __future__ import annotations

import contextlib
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


def choose_interface() -> None:
    """On several nodes, let gloo and NCCL talk over the interface that reaches node 0, unless the user has named one.

    Both otherwise take what the host's own name resolves to, which is a loopback address on many machines.
    """
    several = int(os.environ.get("WORLD_SIZE", 1)) > int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    name = interface_towards(os.environ["MASTER_ADDR"]) if several and "MASTER_ADDR" in os.environ else ""
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
