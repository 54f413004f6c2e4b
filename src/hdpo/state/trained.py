"""What the trainer computed for the tokens of a step's rollouts, beside the dump: rollouts/trainer/step_*.rank*.parquet.

Rows move between ranks before they are trained, so the rank that has a row's log-probs is not the one that dumps its rollout.
Each writes what it has, keyed by (group, sample), and a reader joins them: nothing is gathered. A row without an advantage is
not computed by the trainer and is in no part.
"""
from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hdpo.errors import DataError, boundary

_SCHEMA = pa.schema([("group", pa.int64()), ("sample", pa.int64()), ("log_probs", pa.list_(pa.float32())),
                     ("updated", pa.list_(pa.float32()))])


@dataclass(frozen=True, slots=True)
class TrainedRow:
    """Natural log-probs of a row's sampled tokens, in order: `log_probs` under the weights that sampled it, `updated` under those
    of the optimizer step that it was first trained in (empty in the first mini-batch, where they are the same weights)."""

    group: int             # of its prompt among the step's
    sample: int            # of the rollout in its group
    log_probs: list[float]
    updated: list[float]

    @property
    def nbytes(self) -> int:
        return 4 * (len(self.log_probs) + len(self.updated)) + 40


def write_trained(folder: Path, step: int, rows: Sequence[TrainedRow], rank: int, world: int,
                  byte_limit: int | None = None) -> Path:
    """This rank's part for `step`, whole or not at all; as many rows as `byte_limit` holds.

    Rank 0 removes what more ranks left.
    """
    kept, held = [], 0
    for row in rows:
        held += row.nbytes
        if byte_limit is not None and held > byte_limit:
            break
        kept.append(row)
    folder = folder / "trainer"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step:06d}.rank{rank}.parquet"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        pq.write_table(pa.table({name: [getattr(row, name) for row in kept] for name in _SCHEMA.names}, schema=_SCHEMA),
                       temporary, compression="zstd", use_dictionary=False)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    for stale in folder.glob(f"step_{step:06d}.rank*.parquet") if rank == 0 else ():
        if int(stale.name.removesuffix(".parquet").rpartition(".rank")[2]) >= world:
            stale.unlink(missing_ok=True)
    return path


def trained_parts(folder: Path, step: int) -> list[Path]:
    """The files about a step of the dumps in `folder`."""
    return sorted((folder / "trainer").glob(f"step_{step:06d}.rank*.parquet"))


def read_trained(part: Path) -> pa.Table:
    """Raises DataError when it can't be read."""
    with boundary(DataError, f"{part}: not readable", pa.ArrowException, OSError):
        return pq.read_table(part)


def find_trained(tables: Sequence[pa.Table], group: int, sample: int) -> tuple[list[float], list[float]] | None:
    """(log_probs, updated) of a rollout, see TrainedRow; None where the trainer has none."""
    for table in tables:
        found = table.filter((pc.field("group") == group) & (pc.field("sample") == sample))
        if found.num_rows:
            row = found.slice(0, 1).to_pylist()[0]
            return row["log_probs"], row["updated"]
    return None
