"""Ranks and the small collectives of the control plane; one process when there is no launcher.

Objects and counts travel over a gloo group on the CPU, so that no metric, verdict or plan ever touches the device
stream. Gradients and gathered weights are the policy's own business.
"""
from __future__ import annotations

import datetime
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hdpo.errors import HdpoError, UserError, say
from hdpo.ranks.watchdog import Limits, Watchdog

MESSAGE_BYTES = 64 << 20
"""Largest message from rank to rank."""


def local_device() -> torch.device:
    """The device of this rank: of a node's ranks each has one of its own."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")


class World:
    """Rank and size of this run. Collectives: connect, gather, broadcast, sum, max, any, barrier.

    With `limits`, ranks watch each other from `connect` to `close` (see watchdog.py).
    """

    def __init__(self, timeout_s: float = 7200.0, limits: Limits | None = None) -> None:
        self.rank = int(os.environ.get("RANK", 0))
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.node = int(os.environ.get("GROUP_RANK", os.environ.get("NODE_RANK", 0)))
        self._timeout = datetime.timedelta(seconds=timeout_s)
        self._group: dist.ProcessGroup | None = None
        self.store: dist.Store | None = None    # shared by all ranks once connected; None in a world of one
        self._claimed: dict[str, int] = {}
        self._limits = limits
        self._watchdog: Watchdog | None = None
        self._queues = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def connect(self) -> World:
        """Open the control group. Where no policy has initialised torch.distributed (evaluation), gloo is its default."""
        if self.size > 1 and self._group is None:
            join_after_restart("gloo")
            if not dist.is_initialized():
                dist.init_process_group("gloo", timeout=self._timeout)
            self._group = dist.new_group(backend="gloo", timeout=self._timeout)
            self.store = self._open_store()
            if self._limits is not None and self._limits.silent_s > 0:
                self._watchdog = Watchdog(self.store, self.rank, self.size, self._limits)
        return self

    def phase(self, name: str, step: int | None = None) -> None:
        """Tell the other ranks what this one begins to do; `step` steps are done. Not a collective."""
        if self._watchdog is not None:
            self._watchdog.phase(name, step)

    def progress(self) -> None:
        """Tell the other ranks that something within the phase was finished. From any thread; not a collective."""
        if self._watchdog is not None:
            self._watchdog.progress()

    def failed(self, exc: BaseException) -> HdpoError | None:
        """This rank is about to end with `exc`: say so and tell the others. Returns the error to end with instead when
        another rank is to blame.
        """
        # An error of our own names its cause. Any other may be a collective that broke because its peer did.
        own = isinstance(exc, HdpoError) and not isinstance(exc.__cause__, RuntimeError)
        verdict = None if own or self._watchdog is None else self._watchdog.blame()
        if verdict is not None:
            say(verdict.line, verdict.cause)
            return verdict.error()
        if isinstance(exc, HdpoError):
            say(exc)     # now: the others end as soon as they know, and the launcher ends this rank with them
        if self._watchdog is not None:
            reason = str(exc) if isinstance(exc, HdpoError) else f"{type(exc).__name__}: {exc}".splitlines()[0]
            self._watchdog.failed(reason, mendable=isinstance(exc, UserError))
        return None

    def close(self) -> None:
        """Stop watching and being watched; the last thing a rank does. Rank 0 waits for the others."""
        if self._watchdog is not None:
            self._watchdog.close()
            self._watchdog = None

    def _open_store(self) -> dist.Store:
        """A key-value store on rank 0's host, for what is not a collective: shared counters and signs of life."""
        host = os.environ.get("MASTER_ADDR", "127.0.0.1") if self.is_main else ""
        mine = dist.TCPStore(host, _free_port(), self.size, True, self._timeout, wait_for_workers=False) if host else None
        host, port = self.broadcast((host, mine.port if mine is not None else 0))
        return mine or dist.TCPStore(host, port, self.size, False, self._timeout)

    def claim(self, counter: str, count: int = 1) -> int:
        """Take the next `count` numbers of a counter that all ranks share: returns the first. Not a collective."""
        if self.store is None:
            self._claimed[counter] = self._claimed.get(counter, 0) + count
            return self._claimed[counter] - count
        return self.store.add(f"claim/{counter}", count) - count

    def queue(self) -> Callable[..., int]:
        """A new counter that all ranks claim from: each call gives the next number, to one rank; called with n it takes n numbers
        and gives the first, so that 0 looks how many are taken. Ranks ask for queues in the same order, which needs no
        communication."""
        self._queues += 1
        return partial(self.claim, f"queue/{self._queues}")

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value on every rank."""
        if self._group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def exchange(self, outgoing: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        """`outgoing[r]` are CPU tensors for rank r; returns the tensors from each rank, this rank's own without a copy.

        Only shapes go to all ranks; the contents go straight from rank to rank, in messages of at most MESSAGE_BYTES,
        one neighbour at a time.
        """
        if self._group is None:
            return [list(tensors) for tensors in outgoing]
        shapes = self.gather([[(tensor.dtype, tensor.shape) for tensor in tensors] for tensors in outgoing])
        incoming = [[torch.empty(shape, dtype=dtype) for dtype, shape in sent[self.rank]] for sent in shapes]
        incoming[self.rank] = list(outgoing[self.rank])
        for distance in range(1, self.size):
            target, source = (self.rank + distance) % self.size, (self.rank - distance) % self.size
            pending = [dist.irecv(part, source, self._group, tag) for tag, part in _messages(incoming[source])]
            pending += [dist.isend(part, target, self._group, tag) for tag, part in _messages(outgoing[target])]
            for message in pending:
                assert message is not None
                message.wait()
        return incoming

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise float64 sums over ranks."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: list[float]) -> list[float]:
        return self._reduce(values, dist.ReduceOp.MAX)

    def any(self, flag: bool) -> bool:
        return self.max([float(flag)])[0] > 0

    def barrier(self) -> None:
        if self._group is not None:
            dist.barrier(group=self._group)

    def _reduce(self, values: list[float], op: Any) -> list[float]:
        if self._group is None or not values:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, op=op, group=self._group)
        return [float(v) for v in tensor]


def join_after_restart(backend: str) -> None:
    """Open the process group of ranks that a launcher has started again (`--max_restarts`).

    With static rendezvous, accelerate's default, torch's agent keeps its store over a restart, and the addresses of the
    dead ranks are still in it: each attempt needs keys of its own.
    """
    env = os.environ
    attempt = int(env.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if attempt and env.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and not dist.is_initialized():
        agent = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=False)
        store = dist.PrefixStore(f"restart_{attempt}", agent)
        dist.init_process_group(backend, store=store, rank=int(env["RANK"]), world_size=int(env["WORLD_SIZE"]))


def _messages(tensors: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """(tag, bytes) of each message that the tensors make; writing into the bytes writes into a contiguous tensor."""
    parts = [part for tensor in tensors if tensor.numel()
             for part in tensor.contiguous().view(-1).view(torch.uint8).split(MESSAGE_BYTES)]
    return enumerate(parts)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
