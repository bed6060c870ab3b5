"""Folders that appear under their final name only when everything in them is on disk."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from nemo_ext.disk import sync, sync_tree
from nemo_ext.errors import UserError


@contextlib.contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """Yield an empty folder beside `final`; afterwards flush it to disk and rename it to `final`.

    An exception removes the folder. A killed process leaves it under a hidden name with the host and process id, and
    the next call for the same `final` on that host removes it. Raises UserError if `final` is there or cannot be made.
    """
    final = Path(final).absolute()
    if final.exists() and not _is_empty_folder(final):
        raise UserError(f"{final} exists already: delete it or choose another folder")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _remove_orphans(final)
        partial = final.parent / f".{final.name}.partial-{socket.gethostname()}-{os.getpid()}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    except OSError as error:
        raise UserError(f"cannot write in {final.parent}: {error.strerror or error}") from error
    try:
        yield partial
        sync_tree(partial)
        if final.exists():
            final.rmdir()
        os.rename(partial, final)
        sync(final.parent)
    except OSError as error:
        raise UserError(f"cannot write {final}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and next(path.iterdir(), None) is None


def _remove_orphans(final: Path) -> None:
    prefix = f".{final.name}.partial-{socket.gethostname()}-"
    for leftover in final.parent.glob(f"{_escape(prefix)}*"):
        pid = leftover.name.removeprefix(prefix)
        if pid.isdigit() and not Path("/proc", pid).exists():
            shutil.rmtree(leftover, ignore_errors=True)


def _escape(text: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in text)
