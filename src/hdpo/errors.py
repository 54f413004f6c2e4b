"""The few failures hdpo names, and the one place where foreign exceptions are given one of those names.

A failure a user can mend derives from `UserError`: the command line prints its single line and exits 2, which also tells
the launcher that a restart would not help. A failure of the world around the policy (sandbox, search, judge, engine)
derives from `InfrastructureError`: it is never charged to the policy. Everything else is a bug and keeps its traceback.
"""
from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

USER_STATUS, WORLD_STATUS = 2, 3
"""Exit statuses: bad input that only the user can mend; the world, or another rank, failed."""


class HdpoError(Exception):
    """Root of every exception raised on purpose."""


class UserError(HdpoError):
    """Bad input. The message is one line that names the field or file and the way out."""


class ConfigError(UserError):
    """An unknown key, a wrong type or values that contradict each other."""


class DataError(UserError):
    """A data file, row or image that cannot be used."""


class ModelError(UserError):
    """A model folder that is missing, incomplete or of an unsupported family."""


class CheckpointError(UserError):
    """A checkpoint that is missing, truncated or belongs to another configuration."""


class InfrastructureError(HdpoError):
    """The world failed, not the policy: trajectories it touches leave both channels."""


class ToolServerError(InfrastructureError):
    """The tool server is unreachable, or failed to answer within its deadline."""


class JudgeError(InfrastructureError):
    """The judge gave no usable verdict."""


class RequestRefused(InfrastructureError):
    """The engine can't take one request, `request_id`: that ends its trajectory, and nothing else."""

    def __init__(self, reason: object, request_id: str) -> None:
        super().__init__(reason, request_id)
        self.reason, self.request_id = " ".join(str(reason).split()), request_id

    def __str__(self) -> str:
        return self.reason


class RankError(InfrastructureError):
    """Another rank died, hangs or failed; the message names it with its host and phase."""


class UnscoredLimitError(InfrastructureError):
    """More trajectories of a step are unscored than the run allows."""


class ParityError(HdpoError):
    """Trainer and engine disagree on log-probabilities; the message names the likely cause."""


class NonFiniteError(HdpoError):
    """A loss or gradient is NaN or infinite."""


@contextlib.contextmanager
def boundary(error: type[HdpoError], what: str, *catch: type[BaseException]) -> Iterator[None]:
    """Re-raise any of `catch` (default: Exception) as `error("{what}: {reason}")`, keeping the cause.

    For process and network boundaries only; inside the library exceptions pass through untouched.
    """
    try:
        yield
    except HdpoError:
        raise
    except (catch or (Exception,)) as exc:   # noqa: B030
        reason = str(exc) or type(exc).__name__
        raise error(f"{what}: {reason}") from exc


_said: set[str] = set()


def say(problem: object, about: str = "") -> None:
    """Print an error as one line, unless this process or another rank on this machine has printed it already.

    `about` is the error itself where ranks word it differently: the one that has it, and those that end because of it.
    """
    texts = {str(problem), about or str(problem)}
    said = bool(texts & _said)
    _said.update(texts)
    if said or not _first_of_machine(about or str(problem)):
        return
    rank = os.environ.get("RANK")
    where = "" if rank is None or os.environ.get("WORLD_SIZE") == "1" else f" (rank {rank})"
    start = "" if rank is None else "\n"      # a progress bar may have left its line unfinished
    print(f"{start}hdpo{where}: error: {problem}", file=sys.stderr, flush=True)


def _first_of_machine(text: str) -> bool:
    """Whether no other rank of this attempt has come here with `text`: torch's agent gives its ranks folders side by side."""
    own = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", os.devnull))
    if own.name != "error.json":
        return True
    try:
        (own.parent.parent / f"said_{hashlib.sha256(text.encode()).hexdigest()[:16]}").touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:      # a full disk must not silence an error
        return True
    return True
