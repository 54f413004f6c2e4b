"""Whose doing the end of a session was, by what its supervisor saw. The words are sandbox/supervisor.py's."""
from __future__ import annotations

import enum
import re

ENDED_ITSELF, OVER_LIMIT, CROWDED_OUT, KILLED, NO_PROCESS = b"x", b"m", b"n", b"k", b"f"
INTERRUPTED, STARVED = b"i", b"s"
"""What a supervisor says of a cell whose time is up."""


class Blame(enum.Enum):
    """Three values: what is not known to be the policy's is never charged to it."""

    POLICY = "policy"
    OURS = "ours"
    UNKNOWN = "unknown"


def slug(how: str) -> str:
    """The words of a loss as a metric's name."""
    return re.sub(r"[^a-z0-9]+", "_", how.lower())[:40].strip("_")


def who_ended(evidence: bytes, *, template_ended: bool = False, abandoned: bool = False,
              alone: bool = False) -> tuple[Blame, str]:
    """(whose doing, how it ended: empty where its code simply ended it).

    `evidence` is the supervisor's last word, empty when it had none; `template_ended`: everything ended at that time;
    `abandoned`: nobody waited for its cell any more; `alone`: nobody's code but the session's own runs where its supervisor
    does.
    """
    if abandoned:
        return Blame.OURS, "its last cell took longer than the server waits"
    if evidence == ENDED_ITSELF:
        return Blame.POLICY, ""
    if evidence == OVER_LIMIT:
        return Blame.POLICY, "it held more memory than a session may"
    if evidence == CROWDED_OUT:
        return Blame.OURS, "the memory for all sessions was used up while it was within its limit"
    if evidence == NO_PROCESS:
        return Blame.OURS, "no process is left for it"
    if template_ended:
        return Blame.OURS, "its sandbox died"
    if evidence == KILLED:
        return Blame.UNKNOWN, "it was killed from outside"
    return (Blame.POLICY, "its code ended its supervisor") if alone else (Blame.UNKNOWN, "it ended without a word")


def who_took_the_time(said: bytes | None, alone: bool = False) -> tuple[Blame, str]:
    """(whose doing, why) of a cell that was not done at its time limit.

    `said`: its supervisor's word at the interrupt, empty when it was gone, None when it had none; `alone` as above.
    """
    if said == INTERRUPTED:
        return Blame.POLICY, "it ran, slept or waited for something of its own"
    if said == STARVED:
        return Blame.OURS, "the processors were taken by others for most of its cell's time"
    if said == b"" and alone:
        return Blame.POLICY, "its code ended its supervisor"
    return Blame.UNKNOWN, "its cell could not be interrupted at its time limit, and nobody can say why"
