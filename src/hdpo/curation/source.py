"""The sources that can be read, and the rows of one."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hdpo.curation.readers import chats, long_strings
from hdpo.curation.record import Record
from hdpo.data.store import Row, RowStore

READERS: dict[str, Callable[[Row, int, Sequence[Path]], Record]] = {
    "deepeyes": chats.deepeyes,
    "v_interaction": long_strings.v_interaction,
    "thyme": long_strings.thyme,
    "openmm": chats.openmm,
    "coldstart": chats.coldstart,
    "demonstrations": chats.demonstrations,
}
"""Name, as `--source NAME=FILE` and `curation.sources` give it -> (row, its number, folders of its pictures) -> record."""


@dataclass(frozen=True, slots=True)
class Source:
    name: str            # of its reader
    rows: RowStore
