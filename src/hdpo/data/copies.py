"""A data file's rows as one uncompressed Arrow file that all processes of a node memory-map.

A copy is made once, by whichever process comes first; the others wait for it. It is named by the file's fingerprint: its
name, size, modification time, and a hash of its first and last 64 KiB. The folder it lies in plays no part, so a data set
that was moved is not copied again; a file that was written anew is. Copies may be deleted at any time when no run uses them,
and those that none has used for KEPT_DAYS days are, when another one is made.

    {cache}/{fingerprint}/rows.arrow    the rows, as `datasets` maps them
    {cache}/{fingerprint}/copy.json     what they are; written last, so a copy without it is none

Nodes may share the folder. Where its file system has no locks, or none between nodes, the work is done more than once and
nothing else is lost: each process writes to files of its own name and renames them when they are whole.
"""
from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from hdpo.data.sources import ROW_COLUMN, first_columns, plain, plain_type, read_file
from hdpo.errors import DataError
from hdpo.progress import progress

FORMAT = 1
"""Of the copies; a copy of another format is made again."""
KEPT_DAYS = 30
ABANDONED_S = 3600
"""Nobody has written to a file for so long that is not whole yet: its process was killed."""
_EDGE = 64 << 10
_SPARE_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Copy:
    """`columns` of JSON rows are those of the first row; `as_text` says that rows are JSON text."""

    arrow: Path
    num_rows: int
    columns: tuple[str, ...]
    as_text: bool
    fingerprint: str


def cache_folder(setting: str = "") -> Path:
    """Where copies are kept: the setting, or a folder of the user's own on this node's disk (TMPDIR, /var/tmp or /tmp).

    Raises DataError if it can't be written, or belongs to somebody else.
    """
    local = next((folder for folder in (os.environ.get("TMPDIR"), "/var/tmp") if folder and os.access(folder, os.W_OK)),
                 tempfile.gettempdir())
    folder = Path(setting).expanduser() if setting else Path(local) / f"hdpo-rows-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        ours = setting or folder.stat().st_uid == os.getuid()
    except OSError as exc:
        raise DataError(f"{folder}: copies of data files can't be kept there ({exc.strerror}); set data.cache") from exc
    if not ours or not os.access(folder, os.W_OK | os.X_OK):
        raise DataError(f"{folder}: copies of data files can't be kept there (not writable by this user); set data.cache")
    return folder


def fingerprint(file: Path) -> str:
    """32 hexadecimal digits that change when the file does. Raises DataError for a file that can't be read."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        with file.open("rb") as opened:
            status = os.fstat(opened.fileno())
            digest.update(json.dumps([FORMAT, file.name, status.st_size, status.st_mtime_ns]).encode())
            digest.update(opened.read(_EDGE))
            if status.st_size > _EDGE:
                opened.seek(-min(_EDGE, status.st_size - _EDGE), os.SEEK_END)
                digest.update(opened.read(_EDGE))
    except OSError as exc:
        raise DataError(f"{file}: the data file can't be read ({exc.strerror})") from exc
    return digest.hexdigest()


@contextlib.contextmanager
def once(path: Path) -> Iterator[None]:
    """Hold a lock named by `path` over the processes of this node. Raises DataError where no file can be made."""
    try:
        lock = path.open("w")
    except OSError as exc:
        raise unwritable(path, "what is known of the data", exc) from exc
    with lock:
        with contextlib.suppress(OSError):      # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def keep(path: Path, content: str) -> None:
    """Write a file as a whole or not at all. Raises OSError."""
    partial = _partial(path)
    try:
        partial.write_text(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    """`path` while this process writes it."""
    return path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")


def unwritable(path: Path, what: str, exc: OSError) -> DataError:
    return DataError(f"{exc.filename or path}: {what} can't be written ({exc.strerror}); free some space, or set data.cache to a "
                     "folder on another disk")


def copy_of(file: Path, cache: Path) -> Copy:
    """The file's copy in `cache`, made now if there is none. Raises DataError naming the file, or the cache if it is full."""
    name = fingerprint(file)
    folder = cache / name
    found = _existing(folder, name)
    if found is None:
        with once(cache / f"{name}.lock"):
            found = _existing(folder, name) or _make(file, folder, name)
    with contextlib.suppress(OSError):      # of another user
        os.utime(folder / "copy.json")      # when it was used last
    return found


def _existing(folder: Path, name: str) -> Copy | None:
    try:
        known = json.loads((folder / "copy.json").read_text())
        copy = Copy(folder / "rows.arrow", known["rows"], tuple(known["columns"]), known["as_text"], name)
        return copy if copy.arrow.stat().st_size == known["bytes"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def mapped(file: Path, cache: Path) -> tuple[Copy, datasets.Dataset]:
    """The file's copy, and its rows in Arrow format. A copy that a disk has damaged is made again."""
    copy = copy_of(file, cache)
    try:
        rows = datasets.Dataset.from_file(str(copy.arrow))
    except (pa.ArrowException, OSError, ValueError):
        (copy.arrow.parent / "copy.json").unlink(missing_ok=True)
        copy = copy_of(file, cache)
        rows = datasets.Dataset.from_file(str(copy.arrow))
    return copy, rows.with_format("arrow")


def _make(file: Path, folder: Path, name: str) -> Copy:
    _forget_old(folder.parent)
    folder.mkdir(exist_ok=True)
    partial = _partial(folder / "rows.arrow")
    try:
        known = _write(file, partial)
        if fingerprint(file) != name:
            raise DataError(f"{file}: the data file was rewritten while it was read; start again when nobody writes it")
        os.replace(partial, folder / "rows.arrow")
        keep(folder / "copy.json", json.dumps({"file": file.name, **known}))
    except OSError as exc:
        raise unwritable(folder, f"the copy of {file}", exc) from exc
    finally:
        partial.unlink(missing_ok=True)
    copy = _existing(folder, name)
    assert copy is not None
    return copy


def _write(file: Path, target: Path) -> dict[str, Any]:
    """Write the rows to `target`; returns what copy.json says of them."""
    source = read_file(file)
    if source.nbytes + _SPARE_BYTES > shutil.disk_usage(target.parent).free:
        raise OSError(errno.ENOSPC, f"{source.nbytes / 2**30:.1f} GiB are needed", str(target.parent))
    rows, schema, columns = 0, None, []
    with contextlib.ExitStack() as stack, progress(f"copying {file.name}", " rows", total=source.num_rows, delay_s=1) as bar:
        for batch in source.batches:
            if schema is None:
                schema = _schema(file, batch.schema)
                writer = stack.enter_context(pa.ipc.new_stream(str(target), schema))
                columns = first_columns(batch)
            try:
                writer.write_batch(plain(batch, schema))
            except pa.ArrowException as exc:
                raise DataError(f"{file}: rows {rows} to {rows + batch.num_rows - 1} can't be copied "
                                f"({' '.join(str(exc).split())})") from exc
            rows += batch.num_rows
            bar.update(batch.num_rows)
    if not rows:
        raise DataError(f"{file}: the data files hold no rows")
    return {"rows": rows, "bytes": target.stat().st_size, "columns": columns, "as_text": batch.schema.names == [ROW_COLUMN]}


def _schema(file: Path, given: pa.Schema) -> pa.Schema:
    """Of the copy. Raises DataError for columns that `datasets` can't map."""
    if twice := [name for place, name in enumerate(given.names) if name in given.names[:place]]:
        raise DataError(f"{file}: has two columns named {twice[0]}; leave one out")
    for field in given:
        try:
            datasets.Features.from_arrow_schema(pa.schema([(field.name, plain_type(field.type))]))
        except (ValueError, pa.ArrowException) as exc:
            raise DataError(f"{file}: column {field.name} has a type that can't be read ({field.type}); leave it out") from exc
    return pa.schema([(field.name, plain_type(field.type)) for field in given])


def _forget_old(cache: Path) -> None:
    """Remove copies that nobody has used for long. A process that still maps one keeps it until it ends."""
    for partial in cache.glob("*/rows.arrow*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - partial.stat().st_mtime > ABANDONED_S:
                partial.unlink()
    for known in cache.glob("*/copy.json"):
        with contextlib.suppress(OSError):
            if time.time() - known.stat().st_mtime > KEPT_DAYS * 86400:
                known.unlink()
                shutil.rmtree(known.parent, ignore_errors=True)
