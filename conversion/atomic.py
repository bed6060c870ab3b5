"""Folders and files that appear under their final name only when everything in them is on disk, and that go on after a kill.

What is being written lies beside the final place in a hidden folder, `.NAME.unfinished`, with a journal of the files that are
finished and of how far a long one has come. The journal is locked as long as its writer lives, so that two of them never write
one folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from nemo_ext.disk import sync, sync_tree
from nemo_ext.errors import RunError, UserError, free_bytes, is_full

JOURNAL = ".finished.jsonl"  # a line with the key, then a line per finished file, and per GROWTH bytes of one that grows
GROWTH = 1 << 28
GIB = 2**30


class Unfinished:
    """A folder, or a file in one, that is not yet under its final name; `path` is the folder, `final` the name."""

    def __init__(self, path: Path, final: Path, journal: BinaryIO) -> None:
        self.path, self.final = path, final
        self._journal = journal
        self._finished: dict[str, dict[str, Any]] = {}
        self._begun: dict[str, dict[str, Any]] = {}  # files that grow: as far as they are on disk
        self.kept = False  # True: all is written, and no error that comes yet is about it

    def finished(self, file: Path) -> dict[str, Any] | None:
        """What `finish` was told of this file, also by an earlier process; None while it is not complete."""
        return self._finished.get(self._name(file))

    def finish(self, file: Path, **facts: Any) -> None:
        """Flush a complete file to disk and note it with `facts` (JSON), so that it is not written again. Thread-safe."""
        name = self._name(file)
        self._finished[name] = self._note(file, **facts)
        self._begun.pop(name, None)

    def grow(
        self, file: Path, begin: Callable[[Path], None], pieces: Iterable[Callable[[], bytes | memoryview]]
    ) -> Iterator[int]:
        """Write a file piece by piece, and yield after each how many of them it has; then `finish` it.

        `begin` makes the file with what stands before the pieces. Where an earlier process came to lies in the journal, a note
        every `GROWTH` bytes: the pieces before it are not asked for again, and counted in the first number.
        """
        begun = self._begun.get(self._name(file))
        if begun is None:
            begin(file)
        done, noted = (begun["pieces"], begun["bytes"]) if begun else (0, 0)
        if done:
            os.truncate(file, noted)
            yield done
        with open(file, "ab", buffering=0) as stream:
            for piece in itertools.islice(pieces, done, None):
                rest = memoryview(piece())
                while rest:
                    rest = rest[stream.write(rest) :]
                done += 1
                if (size := stream.tell()) - noted >= GROWTH:
                    self._begun[self._name(file)], noted = self._note(file, pieces=done), size
                yield done

    def _note(self, file: Path, **facts: Any) -> dict[str, Any]:
        sync(file)
        line = {"file": self._name(file), "bytes": file.stat().st_size, **facts}
        self._journal.write(json.dumps(line).encode() + b"\n")  # unbuffered: one write call
        os.fsync(self._journal.fileno())
        return line

    def resume(self, key: str) -> None:
        """Find what an earlier process with this key has written; everything else is removed from the folder."""
        head = json.dumps({"key": key}).encode()
        self._journal.seek(0)
        content = self._journal.read()
        lines = content.splitlines()
        if key and lines[:1] == [head]:
            for line in lines[1:]:
                with contextlib.suppress(ValueError, OSError):  # cut off by a kill; gone since
                    self._found(json.loads(line))
            if not content.endswith(b"\n"):
                self._journal.write(b"\n")
        else:
            self._journal.truncate(0)
            self._journal.write(head + b"\n")
        for path in sorted(self.path.rglob("*"), reverse=True):  # what is in a folder before the folder
            if path.is_dir():
                with contextlib.suppress(OSError):  # holds finished files
                    path.rmdir()
            elif self._name(path) not in {JOURNAL, *self._finished, *self._begun}:
                path.unlink()

    def _found(self, entry: dict[str, Any]) -> None:
        """Take a line of the journal, which says more than those before it about the same file, for what the file still is."""
        name, size = entry["file"], (self.path / entry["file"]).stat().st_size
        self._finished.pop(name, None)
        self._begun.pop(name, None)
        if "pieces" in entry and size >= entry["bytes"]:
            self._begun[name] = entry
        elif "pieces" not in entry and size == entry["bytes"]:
            self._finished[name] = entry

    @property
    def any_kept(self) -> bool:
        """Whether there is anything to go on from."""
        return bool(self._finished or self._begun)

    def check_space(self, sizes: dict[Path, int]) -> None:
        """Raises UserError if the files of `sizes`, {file: bytes}, do not fit on the disk; finished ones are there already."""
        begun = {name: entry["bytes"] for name, entry in self._begun.items()}
        needed = sum(size - begun.get(self._name(file), 0) for file, size in sizes.items() if self.finished(file) is None)
        free = free_bytes(self.path)
        if needed > free:
            there = sum(sizes.values()) - needed
            besides = f" besides the {there / GIB:.2f} GiB that are converted" if there else ""
            raise UserError(
                f"{self.final} needs {needed / GIB:.2f} GiB{besides}, its disk has {free / GIB:.2f} GiB free: "
                "make space or choose another place"
            )

    def check_sizes(self) -> None:
        """Raises OSError unless every finished file still has the size it was finished with."""
        for name, facts in self._finished.items():
            if (size := (self.path / name).stat().st_size) != facts["bytes"]:
                raise OSError(f"{name} has {size} bytes and not {facts['bytes']}: it changed while it was written")

    def _name(self, file: Path) -> str:
        return str(file.relative_to(self.path))


@contextlib.contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """Yield an empty folder beside `final`; afterwards flush it to disk and rename it to `final`.

    An exception removes the folder. A killed process leaves it under a hidden name, which the next call for the same `final`
    takes away. Raises UserError if `final` is there, is being written by another process, or cannot be made.
    """
    with resumable_folder(final, "") as unfinished:
        yield unfinished.path


@contextlib.contextmanager
def resumable_folder(final: Path, key: str) -> Iterator[Unfinished]:
    """Like `new_folder`, for long work: files that were finished by an earlier call with the same `key` are still there.

    `key` stands for everything that decides the content (see `fingerprint`); with another one, or an empty one, the folder
    starts empty. UserError and RunError remove the folder, unless it is `kept`; a kill, a signal or a full disk keep what is
    finished.
    """
    with _resumable(final, key, refuse_taken, _publish_folder) as unfinished:
        yield unfinished


@contextlib.contextmanager
def resumable_file(final: Path, key: str) -> Iterator[Unfinished]:
    """`resumable_folder` for a single file, which is written as `path / final.name`. What is at `final` is never replaced."""
    with _resumable(final, key, refuse_file, _publish_file) as unfinished:
        yield unfinished


@contextlib.contextmanager
def _resumable(
    final: Path, key: str, refuse: Callable[[Path], None], publish: Callable[[Path, Path], None]
) -> Iterator[Unfinished]:
    final = Path(final).absolute()
    partial = final.parent / f".{final.name}.unfinished"
    refuse(final)
    with contextlib.ExitStack() as stack:
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            partial.mkdir(exist_ok=True)
            unfinished = Unfinished(partial, final, stack.enter_context(_locked(partial / JOURNAL, final)))
            unfinished.resume(key)
        except OSError as error:
            raise UserError(f"cannot write in {final.parent}: {error.strerror or error}") from error
        try:
            refuse(final)  # another process may have finished it just before this one took the lock
            yield unfinished
            unfinished.check_sizes()
            sync_tree(partial)
            publish(partial, final)
            sync(final.parent)
        except BaseException as error:
            full = is_full(error, partial)
            useful = unfinished.kept or not isinstance(error, (UserError, RunError))
            if not (key and useful and unfinished.any_kept):
                _remove(partial)
            if full:
                raise UserError(f"the disk of {final} is full: make space, the same command goes on") from error
            if isinstance(error, OSError):
                raise UserError(_explain(error, partial, final)) from error
            raise


def _publish_folder(partial: Path, final: Path) -> None:
    if final.exists():
        final.rmdir()
    os.rename(partial, final)
    (final / JOURNAL).unlink()


def _publish_file(partial: Path, final: Path) -> None:
    os.rename(partial / final.name, final)
    _remove(partial)


def fingerprint(sources: Iterable[Path], *options: Any) -> str:
    """A `key`: sha256 of the sources' names, sizes and modification times, and of `options` (what JSON or str can say)."""
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in sources]
    return hashlib.sha256(json.dumps([stats, options], default=str).encode()).hexdigest()


def refuse_taken(final: Path) -> None:
    """Raises UserError if there is something at `final` other than an empty folder."""
    if final.is_symlink() or (final.exists() and not (final.is_dir() and next(final.iterdir(), None) is None)):
        raise UserError(f"{final} exists already: delete it or choose another folder")


def refuse_file(final: Path) -> None:
    """Raises UserError if there is anything at `final`."""
    if final.is_symlink() or final.exists():
        raise UserError(f"{final} exists already: delete it or choose another file")


@contextlib.contextmanager
def _locked(journal: Path, final: Path) -> Iterator[BinaryIO]:
    """The journal, open and locked; UserError where another process has it."""
    with open(journal, "a+b", buffering=0) as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = os.fstat(stream.fileno()).st_ino == journal.stat().st_ino  # else its holder has just moved it away
        except (BlockingIOError, FileNotFoundError):
            ours = False
        if not ours:
            raise UserError(f"{final} is being written by another process: wait for it or choose another place")
        yield stream


def _remove(partial: Path) -> None:
    """Delete the folder, under another name, so that the next process can begin at once."""
    doomed = partial.with_name(f"{partial.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        os.rename(partial, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _explain(error: OSError, partial: Path, final: Path) -> str:
    """One line for a failed read or write; what lies in the partial folder is called by its final name."""
    where = Path(error.filename) if isinstance(error.filename, str) else partial
    if where.is_relative_to(partial):
        return f"cannot write {final}: {error.strerror or error}"
    return f"{where}: {error.strerror or error}"
