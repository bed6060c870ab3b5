"""Folders of prepared data, named by a hash of all that decides their content.

    cache/<key>/              finished: holds its metadata as the sign of it
    cache/<key>.partial/      being built, or left by a builder that was killed: the next one goes on in it
    cache/fingerprints.json   digests of files already read

A builder holds a lock on the key, so that of two the second waits and finds the work done.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Self

from nemo_ext.data import readers
from nemo_ext.data.sources import Source
from nemo_ext.disk import sync, write_atomic
from nemo_ext.errors import UserError


def built(
    cache: Path,
    settings: list[Any],
    sign: str,
    build: Callable[[Path], dict],
    gives_up_on: tuple[type[Exception], ...] = (UserError,),
) -> dict:
    """The metadata of the folder that `settings` name: read from its file `sign`, or built by `build(partial folder)`.

    "key" is added to it. An error of `gives_up_on` removes the partial folder; after a kill or another one it stays, since the
    same blocks will be asked for again.
    """
    key = hashlib.blake2b(json.dumps(settings).encode(), digest_size=16).hexdigest()
    final, done = cache / key, cache / key / sign
    if not done.is_file():
        with _locked(cache / f"{key}.lock"):
            if not done.is_file():
                partial = cache / f"{key}.partial"
                partial.mkdir(exist_ok=True)
                try:
                    meta = build(partial)
                except gives_up_on:
                    shutil.rmtree(partial)
                    raise
                write_atomic(partial / sign, json.dumps({**meta, "key": key}, indent=2))
                sync(partial)
                if final.exists():  # a folder without its sign is not ours to trust
                    shutil.rmtree(final)
                partial.rename(final)
                sync(cache)
        (cache / f"{key}.lock").unlink(missing_ok=True)
    return json.loads(done.read_text())


class Prepared:
    """What prepared documents and conversations share: dataclasses of `sources`, whose fields that are not given are sums over
    them."""

    source_type: ClassVar[type]

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            if not each.init:
                object.__setattr__(self, each.name, sum(getattr(source, each.name) for source in self.sources))

    def blend(self) -> list[list]:
        """[[weight, train prefix, held-out prefix or None], …], what the data modules take."""
        return [[s.weight, s.train_prefix, s.heldout_prefix] for s in self.sources]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Self:
        values = json.loads(text)
        values = {f.name: values[f.name] for f in dataclasses.fields(cls) if f.init}
        return cls(**{**values, "sources": [cls.source_type(**s) for s in values["sources"]]})


def content_of(source: Source, cache: Path) -> str:
    """Digest of the bytes of all files of a source in their order; names do not count, types do."""
    if source.kind == "hub":
        return f"hub {readers.load_dataset(source)._fingerprint}"
    known = Fingerprints(cache / "fingerprints.json")
    digests = [f"{''.join(path.suffixes[-2:]).lower()} {known.digest(path)}" for path in source.files]
    known.save()
    if source.kind == "files" and source.chosen and source.files[0].stat().st_size == 0:
        raise UserError(f"{source.files[0]}: the file is empty")
    return hashlib.blake2b("\n".join([source.kind, *digests]).encode(), digest_size=16).hexdigest()


class Fingerprints:
    """Digests of files by path, size and time of change, so that a second run does not read the data again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.changed = False
        try:
            self.known: dict[str, list] = json.loads(path.read_text())
        except (OSError, ValueError):
            self.known = {}

    def digest(self, path: Path) -> str:
        stat = path.stat()
        state = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
        name = str(path.absolute())
        if self.known.get(name, [None])[:-1] == state:
            return self.known[name][-1]
        try:
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
        if time.time_ns() - stat.st_mtime_ns > 2_000_000_000:  # a younger file may change again within its time stamp
            self.known[name] = [*state, digest]
            self.changed = True
        return digest

    def save(self) -> None:
        if self.changed:
            write_atomic(self.path, json.dumps(self.known))


@contextlib.contextmanager
def writing(cache: Path) -> Iterator[None]:
    """What the file system refuses, as one line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{cache}: the disk is full: make room; the same command goes on where it stopped") from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise UserError(f"{error.filename or cache}: {error.strerror}") from None
        raise


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One builder at a time. The system lets go of the lock when its holder dies."""
    import fcntl

    while True:
        with open(path, "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                current = os.stat(path).st_ino == os.fstat(file.fileno()).st_ino
            except FileNotFoundError:
                current = False
            if current:  # and not a file that the builder before us has removed
                yield
                return


@contextlib.contextmanager
def durable(path: Path) -> Iterator:
    with open(path, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
