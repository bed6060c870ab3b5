"""Records with media out of sources: what `nemo_ext.data.chat.records` reads, Parquet files with bytes in them, and shards."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

from nemo_ext.data import readers
from nemo_ext.data.chat import records
from nemo_ext.data.chat.records import Place
from nemo_ext.data.multimodal import formats, shards
from nemo_ext.data.multimodal.formats import Conversation, Found
from nemo_ext.data.multimodal.inputs import Input
from nemo_ext.data.multimodal.media import Location, Media
from nemo_ext.data.readers import Block
from nemo_ext.data.sources import MEDIA, Source, file_kind
from nemo_ext.errors import UserError

BATCH_ROWS = 32  # rows of a Parquet file in memory at once, with their images
PIECE_ROWS, PIECE_BYTES = 256, 1 << 18  # of records a task, whose images take much longer than their texts


@dataclass(frozen=True)
class Reader(records.Reader):
    """Conversations with media for the senses of `inputs`. Every image and sound is decoded once here, so that training finds
    none that cannot be. Paths are relative to `folder`, or to where the file of records lies."""

    in_process: ClassVar[int] = 1 << 16

    columns: Mapping[str, str] = field(default_factory=dict)
    inputs: tuple[Input, ...] = ()
    folder: Path | None = None

    def __post_init__(self) -> None:
        formats.check_columns(self.columns)
        self.check_folder()

    def check_folder(self) -> None:
        if self.folder is not None and not self.folder.is_dir():
            raise UserError(f"images={self.folder}: no such folder")

    def key(self, source: Source) -> list[Any]:
        """The media are not read for it: prepared samples refer to where they lie."""
        folder = None if self.folder is None else str(self.folder.absolute())
        senses = [
            [s.modality, s.tokens, s.encoder.grid, i.input_shape, s.tiling.grids if s.tiling else None]
            for s, i in ((each.sense, each) for each in self.inputs)
        ]
        paths = [str(path.absolute()) for path in source.files]
        described = {
            text: None for path in source.files if file_kind(path, MEDIA) == "shard" for text in shards.description(path)
        }
        return [*super().key(source), folder, paths, list(described), senses]

    def plan(self, source: Source) -> Iterator[Block]:
        shards_of = [path for path in source.files if file_kind(path, MEDIA) == "shard"] if source.kind == "files" else []
        if not shards_of:
            for block in super().plan(source):
                yield from _pieces(block)
            return
        if len(shards_of) < len(source.files):
            other = next(path for path in source.files if path not in shards_of)
            raise UserError(f"data={source.name}: shards and other files ({other.name}) together: name them as two sources")
        for path in shards_of:
            if shards.is_training(path):
                yield Block("texts", (path,), path.stat().st_size)

    def conversations(self, block: Block, inline: Path) -> Iterator[tuple[Place, Callable[[], Conversation]]]:
        if file_kind(block.files[0], MEDIA) == "shard":
            found = _shard(block.files[0])
        elif block.kind == "group":
            found = _group(block)
        else:
            found = records.records(block)
        folder = self.folder or block.files[0].absolute().parent
        with contextlib.ExitStack() as stack:
            store = _Inline(inline, stack)
            for place, record in found:
                yield place, lambda place=place, record=record: self._parse(record, place, folder, store)

    def _parse(self, record: dict, place: Place, folder: Path, store: _Inline) -> Conversation:
        return formats.parse(record, place, self.columns, lambda modality, value: self._media(modality, value, folder, store))

    def _media(self, modality: str, value: Any, folder: Path, store: _Inline) -> Media:
        source = next((each for each in self.inputs if each.sense.modality == modality), None)
        if source is None:
            raise UserError(f"the model has no sense for it: it has {', '.join(i.sense.modality for i in self.inputs) or 'none'}")
        found = formats.payload(value, folder)
        if isinstance(found, Path):
            location = Location(str(found.absolute()))
            if not found.is_file():
                raise UserError(f"{found}: no such file")
            data = location.read()
        else:
            data, location = found.data, found.location
        try:
            shape, tokens = source.inspect(data)
        except UserError as error:
            raise UserError(f"{location}: {error}" if location else str(error)) from None
        return Media(modality, location or store.put(data), shape, tokens, formats.digest(data))


def _pieces(block: Block) -> Iterator[Block]:
    """The same records in smaller blocks."""
    if block.kind == "lines":
        for start in range(block.start, block.stop, PIECE_BYTES):
            stop = min(start + PIECE_BYTES, block.stop)
            yield replace(block, size=stop - start, start=start, stop=stop)
    elif block.kind == "rows":
        for start in range(0, len(block.data), PIECE_ROWS):
            data = block.data[start : start + PIECE_ROWS]
            yield replace(block, size=block.size * len(data) // len(block.data), start=block.start + start, data=data)
    else:
        yield block


class _Inline:
    """A file beside the samples for media that records hold themselves, opened when the first comes."""

    def __init__(self, path: Path, stack: contextlib.ExitStack) -> None:
        self.path, self.stack = path, stack
        self.file: BinaryIO | None = None

    def put(self, data: bytes) -> Location:
        if self.file is None:
            self.file = self.stack.enter_context(open(self.path, "wb"))
        offset = self.file.tell()
        self.file.write(data)
        return Location(self.path.name, offset, len(data))


def _shard(path: Path) -> Iterator[tuple[Place, dict]]:
    for number, (name, record) in enumerate(shards.samples(path), 1):
        yield Place(f"{path}, {name}", "sample", number), record


def _group(block: Block) -> Iterator[tuple[Place, dict]]:
    """Rows of a row group; bytes in them are told where they are."""
    path = block.files[0]
    file = readers._parquet(path)
    first = sum(file.metadata.row_group(g).num_rows for g in range(block.start))
    row = 0
    for batch in file.iter_batches(BATCH_ROWS, row_groups=[block.start]):
        for record in batch.to_pylist():
            placed = {name: _placed(value, str(path), (block.start, row, name)) for name, value in record.items()}
            yield Place(str(path), "row", first + row), placed
            row += 1


def _placed(value: Any, path: str, cell: tuple[int | str, ...]) -> Any:
    if isinstance(value, bytes):
        return Found(value, Location(path, cell=cell))
    if isinstance(value, dict):
        return {name: _placed(each, path, (*cell, name)) for name, each in value.items()}
    if isinstance(value, list):
        return [_placed(each, path, (*cell, number)) for number, each in enumerate(value)]
    return value
