"""Where the bytes of an image or a sound are, and what preparation found out about it."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_ext.errors import UserError


@dataclass(frozen=True)
class Location:
    """A whole file; or `length` bytes of it from `offset` (a member of a tar file, what was inline in a record); or a cell of a
    Parquet file: (row group, row in it, column, then names and numbers of what is nested in the value)."""

    path: str
    offset: int = 0
    length: int | None = None
    cell: tuple[int | str, ...] = ()

    def read(self) -> bytes:
        """The bytes. Raises UserError where they are not there."""
        try:
            if self.cell:
                return _cell(self.path, *self.cell)
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                data = file.read(-1 if self.length is None else self.length)
        except OSError as error:
            raise UserError(f"{self}: cannot be read: {error.strerror or error}") from None
        if self.length is not None and len(data) < self.length:
            raise UserError(f"{self}: the file ends before it")
        return data

    def __str__(self) -> str:
        if self.cell:
            group, row, *names = self.cell
            return f"{self.path}, row {row} of row group {group}, {'.'.join(map(str, names))}"
        return self.path if self.length is None else f"{self.path}, byte {self.offset}"

    def below(self, folder: Path) -> Location:
        """The same with a path that was relative to `folder`."""
        return dataclasses.replace(self, path=str(folder / self.path))


@dataclass(frozen=True)
class Media:
    """An image or a sound of a conversation.

    `shape` is (height, width) in pixels or (samples,); `tokens` the placeholders that stand for it; `digest` that of its bytes.
    """

    modality: str
    location: Location
    shape: tuple[int, ...]
    tokens: int
    digest: str = ""


def to_json(media: Iterable[Media]) -> bytes:
    """Media as stored beside a sample; nothing for none."""
    rows = [[m.modality, dataclasses.astuple(m.location), m.shape, m.tokens] for m in media]
    return json.dumps(rows, separators=(",", ":")).encode() if rows else b""


def from_json(data: bytes, folder: Path) -> list[Media]:
    """The reverse; relative paths are below `folder`."""
    rows: list[list[Any]] = json.loads(data) if data else []
    return [
        Media(modality, Location(path, offset, length, tuple(cell)).below(folder), tuple(shape), tokens)
        for modality, (path, offset, length, cell), shape, tokens in rows
    ]


@functools.lru_cache(maxsize=2)
def _column(path: str, group: int, column: str) -> Any:
    """A column of a row group: rows of one are near each other, and decoding it is what takes time."""
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path).read_row_group(group, columns=[column]).column(0)
    except (pyarrow.ArrowException, IndexError) as error:
        raise UserError(f"{path}: row group {group} cannot be read: {str(error).splitlines()[0]}") from None


def _cell(path: str, group: int, row: int, column: str, *names: int | str) -> bytes:
    value = _column(path, group, column)[row].as_py()
    for name in names:
        value = value[name]
    return value
