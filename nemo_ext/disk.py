"""Making sure that what was written is on the disk."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from nemo_ext.errors import UserError

LOCK = ".lock"  # in a folder that one command at a time writes


def sync(path: str | os.PathLike) -> None:
    """Flush a file's content, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: str | os.PathLike) -> None:
    """Flush a folder and everything in it to the disk."""
    for path in [Path(folder), *Path(folder).rglob("*")]:
        sync(path)


def write_atomic(path: str | os.PathLike, data: str | bytes) -> None:
    """Replace the file at `path` by `data` (text as UTF-8): beside it, synced, renamed. Readers see the old file or the new."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


@contextlib.contextmanager
def held(folder: Path, patience: float = 0) -> Iterator[None]:
    """Make `folder`, which `out=` names, and hold it: two commands never write into one, also not on two nodes that share it.

    The system lets go when the holder dies; a file server may learn of a dead node late, for which there are `patience` seconds.
    Raises UserError if the folder cannot be written, another command holds it, or its file system has no locks.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / LOCK, "w")
    except OSError as error:
        what = "" if error.filename in (None, str(folder)) else f": {error.filename}"
        raise UserError(f"out={folder} cannot be written: {error.strerror}{what}") from None
    with lock:
        _lock(lock, folder, patience)
        yield


def _lock(file: IO, folder: Path, patience: float) -> None:
    end = time.monotonic() + patience
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= end:
                raise UserError(f"out={folder}: another command is running there") from None
            time.sleep(1)
        except OSError as error:
            why = f"its file system has no locks ({error.strerror}): mount it with them (Lustre: -o flock)"
            raise UserError(f"out={folder}: {why}, or give an out= elsewhere") from None
