"""Records out of sources, each with its place, in blocks that worker processes share (see readers for blocks of text)."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from nemo_ext.data import readers
from nemo_ext.data.chat.formats import Conversation, check_columns, parse
from nemo_ext.data.readers import BLOCK_ROWS, Block
from nemo_ext.data.sources import RECORDS, Source, file_kind
from nemo_ext.errors import UserError


def _from_zero() -> int:
    return 0


@dataclass(frozen=True)
class Place:
    """Where a record stands. Lines are counted only when somebody reads the place."""

    name: str
    what: str  # "line", "record", "row"
    number: int
    first: Callable[[], int] = _from_zero

    def __str__(self) -> str:
        return f"{self.name}, {self.what} {self.first() + self.number}"


@dataclass(frozen=True)
class Reader:
    """From sources to conversations; pickled to worker processes. `columns` names fields of unusual records (`formats.parse`).

    Sources of fewer than `in_process` bytes are not worth starting processes for.
    """

    in_process: ClassVar[int] = 4 << 20

    columns: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_columns(self.columns)

    def key(self, source: Source) -> list[Any]:
        """What decides the conversations beside the files' content."""
        return [sorted(self.columns.items())]

    def plan(self, source: Source) -> Iterator[Block]:
        return plan(source)

    def conversations(self, block: Block, inline: Path) -> Iterator[tuple[Place, Callable[[], Conversation]]]:
        """The place of each conversation of a block, and what parses it, raising UserError for a bad one. `inline` is a file for
        what a record holds and samples refer to; conversations of text need none."""
        for place, record in records(block):
            yield place, lambda place=place, record=record: parse(record, place, self.columns)


def plan(source: Source) -> Iterator[Block]:
    """The blocks of a source in reading order: files of lines and of columns are read by the workers, JSON arrays, CSV and data
    sets here."""
    if source.kind in ("dataset", "hub"):
        yield from _dataset_blocks(source)
        return
    if source.kind != "files":
        raise UserError(f"data={source.name}: not a source of conversations: name a file, a folder or a data set")
    for kind, files in itertools.groupby(source.files, key=lambda path: file_kind(path, RECORDS)):
        for path in files:
            if kind == "lines":
                yield from readers._line_blocks(path)
            elif kind == "parquet":
                yield from readers._group_blocks(path, None)
            else:
                yield from _cut(path, _array(path) if kind == "array" else _table(path))


def records(block: Block) -> Iterator[tuple[Place, dict]]:
    """The records of a block in order. Raises UserError, naming the place, for broken files and what is not an object."""
    read = {"lines": _read_lines, "data": _read_lines, "group": _read_group, "rows": lambda b: iter(b.data)}[block.kind]
    for place, record in read(block):
        if not isinstance(record, dict):
            raise UserError(f"{place}: a {type(record).__name__} instead of an object of named fields")
        yield place, record


def _read_lines(block: Block) -> Iterator[tuple[Place, Any]]:
    path = block.files[0]
    data, first_line = readers.lines_of(block)
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n")):
        if not line or line.isspace():
            continue
        place = Place(str(path), "line", number, first_line)
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{place}: not JSON: {error.msg} at column {error.colno}") from None
        except UnicodeDecodeError:
            readers._decode(line, path, first_line() + number)
            raise
        yield place, record


def _read_group(block: Block) -> Iterator[tuple[Place, Any]]:
    path = block.files[0]
    file = readers._parquet(path)
    row = sum(file.metadata.row_group(g).num_rows for g in range(block.start))
    for batch in file.iter_batches(BLOCK_ROWS, row_groups=[block.start]):
        for record in batch.to_pylist():
            yield Place(str(path), "row", row), record
            row += 1


def _dataset_blocks(source: Source) -> Iterator[Block]:
    dataset = readers.load_dataset(source).with_format(None)
    total = readers.size_of(source)[0]
    for start in range(0, len(dataset), BLOCK_ROWS):
        columns = dataset[start : start + BLOCK_ROWS]
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        data = tuple((Place(source.name, "row", start + i), row) for i, row in enumerate(rows))
        yield Block("rows", (Path(source.name),), total * len(data) // len(dataset), start=start, data=data)


def _cut(path: Path, rows: Iterator[tuple[Place, Any]]) -> Iterator[Block]:
    every = list(rows)
    size = path.stat().st_size
    for start in range(0, len(every), BLOCK_ROWS):
        data = tuple(every[start : start + BLOCK_ROWS])
        yield Block("rows", (path,), size * len(data) // len(every), start=start, data=data)


def _text(path: Path) -> str:
    with readers._open(path) as file:
        return readers._decode(readers._read(file, path), path, 1).removeprefix("\ufeff")


def _array(path: Path) -> Iterator[tuple[Place, Any]]:
    """The records of a JSON array, a single object, or lines of JSON in a file that calls itself .json."""
    text = _text(path)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if not error.msg.startswith("Extra data") or not text.lstrip().startswith("{"):
            raise UserError(f"{path}, line {error.lineno}: not JSON: {error.msg} at column {error.colno}") from None
        for place, record in _read_lines(Block("data", (path,), 0, start=1, data=text.encode())):
            yield Place(str(path), "line", 1 + place.number), record
        return
    for number, record in enumerate(content if isinstance(content, list) else [content], 1):
        yield Place(str(path), "record", number), record


def _table(path: Path) -> Iterator[tuple[Place, dict[str, str]]]:
    """The rows of a CSV or TSV file whose first line names the columns (RFC 4180)."""
    csv.field_size_limit(1 << 30)
    tabs = any(suffix.lower() == ".tsv" for suffix in path.suffixes)
    reader = csv.reader(io.StringIO(_text(path), newline=""), delimiter="\t" if tabs else ",", strict=True)
    try:
        names = next(reader, [])
        line = reader.line_num + 1
        for row in reader:
            if row:
                if len(row) != len(names):
                    raise UserError(f"{path}, line {line}: {len(row)} fields where the first line names {len(names)}")
                yield Place(str(path), "line", line), dict(zip(names, row, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not CSV: {error}") from None
