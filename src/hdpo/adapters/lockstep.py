"""One engine in parts on several ranks, as tensor parallelism makes it, behind the interface of an engine of one's own.

Each part schedules by itself and must reach the decisions of the others: all are given the same requests and aborts in the
same order and are stepped together. So a rank's operations are queued, and every step begins with a word from all ranks
(a few integers); the queued operations themselves travel only when there are any. Each rank rolls out its own trajectories
and gets its own completions. A rank that fails leaves the others waiting: naming it is the watchdog's business.
"""
from __future__ import annotations

import dataclasses
import datetime
import zlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from hdpo.errors import RequestRefused
from hdpo.protocols import Engine, GenerateRequest
from hdpo.types import Completion

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from hdpo.checksums import Checksum, Comparison

PICTURE_BYTES = 1 << 30
"""Host memory for pictures that the ranks have seen already, so that a trajectory's next turn need not send them again."""

_TIMEOUT = datetime.timedelta(hours=2)   # how long a rank may be late; one that died is found long before
_Operation = tuple[str, GenerateRequest | None]   # id and request; None drops it


def neighbours(ranks: int) -> dist.ProcessGroup:
    """This rank's group of so many consecutive ranks, over the CPU. Collective over all ranks."""
    group, _ = dist.new_subgroups(ranks, timeout=_TIMEOUT, backend="gloo")
    return group


class LockstepEngine:
    """`protocols.SharedEngine`: `part` is this rank's part of the engine that the ranks of `group` drive together.

    Raises RuntimeError, on every rank, when the parts no longer generate the same.
    """

    def __init__(self, part: Engine, group: dist.ProcessGroup) -> None:
        self.max_model_len = part.max_model_len
        self._part, self._group = part, group
        self._rank, self._ranks = dist.get_rank(group), dist.get_world_size(group)
        self._queued: list[_Operation] = []
        self._pictures = _Pictures()
        self._own: list[tuple[str, Completion]] = []   # finished and not yet returned
        self._refused: list[RequestRefused] = []
        self._history = 0   # of all that was generated, in one number

    # --- generation ---------------------------------------------------------------------------------------------

    def add_request(self, request_id: str, request: GenerateRequest) -> None:
        """Queue one generation for the next step, which raises RequestRefused for one that the parts refuse."""
        self._queued.append((request_id, request))

    def abort(self, request_ids: Sequence[str]) -> None:
        """Drop requests; an aborted request is never returned by `step`. Unknown ids are ignored."""
        self._queued += [(request_id, None) for request_id in request_ids]
        self._refused = [refused for refused in self._refused if refused.request_id not in request_ids]
        self._own = [(request_id, completion) for request_id, completion in self._own if request_id not in request_ids]

    def so_far(self, request_id: str) -> Completion:
        """What a request has sampled until now: ABORTED, unless it has ended and was not returned yet."""
        return dict(self._own).get(request_id) or self._part.so_far(f"{self._rank}/{request_id}")

    def step(self) -> list[tuple[str, Completion]]:
        """Advance the requests of all ranks unless one of them holds; return those of this rank that finished."""
        self._advance()
        if self._refused:
            raise self._refused.pop(0)
        own, self._own = self._own, []
        return own

    def hold(self) -> None:
        self._advance(hold=True)

    def finish(self) -> None:
        while not self._advance(done=True):
            pass

    def num_unfinished(self) -> int:
        return self._part.num_unfinished() + len(self._refused) + sum(request is not None for _, request in self._queued)

    def _advance(self, *, hold: bool = False, done: bool = False) -> bool:
        """Hear from all ranks; step, unless one of them holds. Returns whether all are done."""
        word = torch.tensor([bool(self._queued), hold, done, self._history])
        words = [torch.empty_like(word) for _ in range(self._ranks)]
        dist.all_gather(words, word, group=self._group)
        queued, holding, finishing, histories = torch.stack(words, 1).tolist()
        if len(set(histories)) > 1:
            raise RuntimeError(f"rollout.tensor_parallel={self._ranks}: the parts of the engine no longer generate the same")
        if not any(holding):
            if any(queued):
                self._hand_over()
            if self._part.num_unfinished():
                self._take(self._part.step())
        return all(finishing)

    def _hand_over(self) -> None:
        """Give what all ranks have queued to this part, in the order of the ranks."""
        operations: list[list[_Operation]] = [[] for _ in range(self._ranks)]
        mine = [(name, request and self._pictures.without_known(request)) for name, request in self._queued]
        dist.all_gather_object(operations, mine, group=self._group)
        operations[self._rank], self._queued = mine, []
        for rank, its_operations in enumerate(operations):
            for name, request in its_operations:
                if request is None:
                    self._part.abort([f"{rank}/{name}"])
                    continue
                try:
                    self._part.add_request(f"{rank}/{name}", self._pictures.with_known(request))
                except RequestRefused as exc:   # on every rank alike
                    if rank == self._rank:
                        self._refused.append(RequestRefused(exc, name))
        self._pictures.trim(PICTURE_BYTES)

    def _take(self, finished: list[tuple[str, Completion]]) -> None:
        for name, completion in finished:
            self._history ^= zlib.crc32(array("q", completion.token_ids).tobytes(), zlib.crc32(name.encode()))
            rank, _, own_name = name.partition("/")
            if int(rank) == self._rank:
                self._own.append((own_name, completion))

    # --- weights: every part takes its own of them -------------------------------------------------------------------

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        self._part.load_weights(weights, version)

    def compare_weights(self, sent: Mapping[str, Checksum]) -> Comparison:
        return self._part.compare_weights(sent)

    def sleep(self) -> None:
        self._queued.clear()
        self._pictures = _Pictures()
        self._part.sleep()

    def wake(self) -> None:
        self._part.wake()

    def close(self) -> None:
        self._part.close()
        dist.destroy_process_group(self._group)


class _Pictures:
    """Pictures by key, the same on every rank because all ranks see the same requests in the same order."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, Image] = OrderedDict()   # the least recently used first
        self._bytes = 0

    def without_known(self, request: GenerateRequest) -> GenerateRequest:
        """What to send of a request."""
        if not request.image_keys:
            return request
        images: list[Any] = [None if key in self._known else image for key, image in zip(request.image_keys, request.images)]
        return dataclasses.replace(request, images=tuple(images))

    def with_known(self, request: GenerateRequest) -> GenerateRequest:
        """The request as it was."""
        if not request.image_keys:
            return request
        for key, image in zip(request.image_keys, request.images):
            self._bytes += 0 if key in self._known else _size(image)
            self._known[key] = self._known.pop(key, image)
        return dataclasses.replace(request, images=tuple(self._known[key] for key in request.image_keys))

    def trim(self, limit: int) -> None:
        """Forget the least recently used beyond `limit` bytes."""
        while self._bytes > limit:
            _, image = self._known.popitem(last=False)
            self._bytes -= _size(image)


def _size(image: Image) -> int:
    return image.width * image.height * len(image.getbands())
