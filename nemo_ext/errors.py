"""Errors meant for people: one line, no stack trace, and the exit code that goes with it."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from pathlib import Path


class UserError(Exception):
    """Bad input: what is wrong, where, and what to do, in one line. Exit code 2."""

    exit_code = 2


class RunError(Exception):
    """A run that started and failed (a dead rank, a full disk, a loss that is not a number). Exit code 1."""

    exit_code = 1


FULL = (errno.ENOSPC, errno.EDQUOT)
FULL_WORDS = ("No space left on device", "Disk quota exceeded")
WRITER_WORDS = ("inline_container.cc", "PytorchStreamWriter", "file write failed")  # what torch.save says, whatever the cause
ALMOST_NOTHING = 16 << 20  # bytes
# What gloo and NCCL say on the ranks that live when another one has died.
LOST_WORDS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused",
              "remote process exited", "Timed out waiting", "ncclRemoteError", "ncclSystemError")  # fmt: skip


def explain(error: BaseException, folder: str | Path) -> str:
    """One line for people about what ended a run whose files are in `folder`.

    A full disk is said in many ways, also by the processes that write a checkpoint: all become the same line.
    """
    if isinstance(error, (UserError, RunError)):
        return str(error).split("\n")[0]  # Fiddle appends paragraphs about what it was building
    if is_full(error, folder):
        return f"the disk is full: {folder}: make space, the same command continues from the newest checkpoint"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename or folder}"
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def is_full(error: BaseException, folder: str | Path) -> bool:
    """Whether `error`, or what caused it, is a disk without space."""
    for each in _chain(error):
        text = str(each)
        if isinstance(each, OSError) and each.errno in FULL or any(words in text for words in FULL_WORDS):
            return True
        if any(words in text for words in WRITER_WORDS):
            return free_bytes(folder) < ALMOST_NOTHING
    return False


def is_lost_connection(error: BaseException) -> bool:
    """Whether `error` only says that another rank is gone: the cause is there."""
    return any(words in str(each) for each in _chain(error) for words in LOST_WORDS)


def free_bytes(folder: str | Path) -> int:
    """Free bytes of the file system that holds `folder` (or will, when it is made)."""
    path = Path(folder).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
