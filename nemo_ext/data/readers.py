"""Documents out of sources, in blocks that worker processes share.

A source is planned into blocks: small enough to spread over processes and to show progress, and the same on every machine for
the same content, whatever the number of workers. Text and Markdown: one document a file. JSONL, Parquet and Hugging Face data
sets: one document a row. Uncompressed files are read by the workers; compressed lines and rows of data sets, which can only
be read in order, are read here and handed over.
"""

from __future__ import annotations

import functools
import gzip
import itertools
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from nemo_ext.data.sources import Source, file_kind
from nemo_ext.errors import UserError

BLOCK_BYTES = 8 << 20
BLOCK_FILES = 512
BLOCK_ROWS = 4096
BATCH_BYTES = 1 << 20


@dataclass(frozen=True)
class Block:
    """A piece of a source. `size` is its share of the bytes on disk, for progress. It is pickled to a worker.

    texts: `files`, a document each. lines: the lines of `files[0]` that begin in bytes [start, stop), or those in `data`, of
    which the first is line `start` of the file. group: row group `start` of the Parquet file. rows: `data`, of which the first
    is row `start`.
    """

    kind: Literal["texts", "lines", "data", "group", "rows"]
    files: tuple[Path, ...]
    size: int
    start: int = 0
    stop: int = 0
    data: bytes | tuple = b""
    may_be_empty: bool = True


def plan(source: Source, text_key: str) -> Iterator[Block]:
    """The blocks of a source in reading order. The source is of kind "files", "dataset" or "hub" (see corpus for python-docs)."""
    if source.kind in ("dataset", "hub"):
        yield from _row_blocks(source, text_key)
        return
    for kind, files in itertools.groupby(source.files, key=file_kind):
        if kind == "text":
            yield from _text_blocks(list(files), source.chosen)
        elif kind == "lines":
            for path in files:
                yield from _line_blocks(path)
        else:
            for path in files:
                yield from _group_blocks(path, text_key)


def batches(block: Block, text_key: str) -> Iterator[list[str]]:
    """The documents of a block in order, in lists of about a mebibyte of text. Empty documents are left out.

    Raises UserError, naming file and line, for bytes that are not UTF-8, broken JSON and rows without text under `text_key`.
    """
    read = {"texts": _read_texts, "lines": _read_lines, "data": _read_lines, "group": _read_group, "rows": _read_rows}[block.kind]
    batch: list[str] = []
    size = 0
    for text in read(block, text_key):
        if text:
            batch.append(text)
            size += len(text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def size_of(source: Source) -> tuple[int, int]:
    """Bytes on disk of a source, and about how many bytes of text are in it."""
    files = source.files
    if source.kind == "hub":
        files = tuple(Path(file["filename"]) for file in load_dataset(source).cache_files)
    sizes = [(path.stat().st_size, path.suffix.lower()) for path in files]
    return sum(size for size, _ in sizes), sum(
        size * (4 if suffix in (".gz", ".zst", ".parquet") else 1) for size, suffix in sizes
    )


# Text files


def _text_blocks(files: list[Path], chosen: bool) -> Iterator[Block]:
    batch: list[Path] = []
    size = 0
    for path in files:
        batch.append(path)
        size += path.stat().st_size
        if size >= BLOCK_BYTES or len(batch) == BLOCK_FILES:
            yield Block("texts", tuple(batch), size, may_be_empty=not chosen)
            batch, size = [], 0
    if batch:
        yield Block("texts", tuple(batch), size, may_be_empty=not chosen)


def _read_texts(block: Block, text_key: str) -> Iterator[str]:
    for path in block.files:
        with _open(path) as file:
            data = _read(file, path)
        text = _decode(data, path, 1).removeprefix("\ufeff")
        if not text.strip():
            if not block.may_be_empty:
                raise UserError(f"{path}: the file is empty")
            continue
        yield text


def _decode(data: bytes, path: Path, line: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise UserError(
            f"{path}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8: convert the file, e.g. with iconv -t UTF-8"
        ) from None


# Lines of JSON


def _line_blocks(path: Path) -> Iterator[Block]:
    size = path.stat().st_size
    if path.suffix.lower() in (".gz", ".zst"):
        yield from _compressed_blocks(path, size)
        return
    for start in range(0, size, BLOCK_BYTES):
        stop = min(start + BLOCK_BYTES, size)
        yield Block("lines", (path,), stop - start, start, stop)


def _compressed_blocks(path: Path, size: int) -> Iterator[Block]:
    line, reported, rest = 1, 0, b""
    with open(path, "rb") as raw, _open(path, raw) as file:
        while chunk := _read(file, path, BLOCK_BYTES):
            cut = chunk.rfind(b"\n") + 1
            if not cut:
                rest += chunk
                continue
            data, rest = rest + chunk[:cut], chunk[cut:]
            position = min(raw.tell(), size)
            yield Block("data", (path,), position - reported, start=line, data=data)
            line, reported = line + data.count(b"\n"), position
    if rest:
        yield Block("data", (path,), size - reported, start=line, data=rest)


def _read_lines(block: Block, text_key: str) -> Iterator[str]:
    data, first_line = lines_of(block)
    yield from _parse_lines(data, block.files[0], text_key, first_line)


def lines_of(block: Block) -> tuple[bytes, Callable[[], int]]:
    """The whole lines of a block of kind "lines" or "data", and what counts the number of the first one."""
    path = block.files[0]
    if block.kind == "data":
        return block.data, lambda: block.start
    with open(path, "rb") as file:
        if block.start:
            file.seek(block.start - 1)
            file.readline()  # the line that began before this block; nothing where one begins here
        begin = file.tell()
        data = file.read(max(0, block.stop - begin))
        if data and not data.endswith(b"\n"):
            data += file.readline()
    return data, lambda: 1 + _count_lines(path, begin)


def _parse_lines(data: bytes, path: Path, text_key: str, first_line) -> Iterator[str]:
    """Texts of JSON lines; `first_line()` gives the number of the first one, counted only when there is an error to report."""
    for number, line in enumerate(data.split(b"\n")):
        if not line or line.isspace():
            continue
        try:
            text = json.loads(line)[text_key]
            text.encode  # noqa: B018  (a string, as opposed to null, a number, a list)
        except UnicodeDecodeError:
            _decode(line, path, first_line() + number)
            raise
        except json.JSONDecodeError as error:
            if number == 0 and line.startswith(b"\xef\xbb\xbf"):
                line = line[3:]
                yield from _parse_lines(line, path, text_key, first_line)
                continue
            raise UserError(f"{path}, line {first_line() + number}: not JSON: {error.msg} at column {error.colno}") from None
        except (KeyError, TypeError, AttributeError):
            raise UserError(f"{path}, line {first_line() + number}: {_without_text(json.loads(line), text_key)}") from None
        yield text


def _without_text(row: object, text_key: str) -> str:
    if not isinstance(row, dict):
        return f'a {type(row).__name__} instead of an object like {{"{text_key}": "..."}}'
    if text_key in row:
        return f'"{text_key}" is {json.dumps(row[text_key])[:40]}, not a string'
    return f'no "{text_key}": the keys are {", ".join(map(str, row)) or "none"}; choose one with text_key='


def _count_lines(path: Path, position: int) -> int:
    count = 0
    with open(path, "rb") as file:
        while position > 0 and (data := file.read(min(position, BLOCK_BYTES))):
            count += data.count(b"\n")
            position -= len(data)
    return count


def _open(path: Path, raw: BinaryIO | None = None) -> BinaryIO:
    """The decompressed bytes of a file, through `raw` where the caller has opened it."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.open(raw or path, "rb")  # type: ignore[return-value]
    if suffix == ".zst":
        import zstandard

        return zstandard.ZstdDecompressor().stream_reader(raw or open(path, "rb"), read_across_frames=True, closefd=raw is None)
    return raw or open(path, "rb")


def _read(file: BinaryIO, path: Path, size: int = -1) -> bytes:
    """Read, and name the file where its compression is broken (cut off, or not what its name says)."""
    try:
        return file.read(size)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: cannot be decompressed: {error}") from None
    except Exception as error:
        if type(error).__name__ != "ZstdError":
            raise
        raise UserError(f"{path}: cannot be decompressed: {error}") from None


# Parquet and data sets


def _group_blocks(path: Path, text_key: str) -> Iterator[Block]:
    metadata = _parquet(path, text_key).metadata
    size = path.stat().st_size
    if metadata.num_rows == 0:
        return
    for group in range(metadata.num_row_groups):
        yield Block("group", (path,), size // metadata.num_row_groups, start=group)


def _parquet(path: Path, text_key: str | None = None):
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: not a Parquet file: {str(error).splitlines()[0]}") from None
    names = file.schema_arrow.names
    if text_key is None:
        return file
    if text_key not in names:
        raise UserError(f'{path}: no column "{text_key}": the columns are {", ".join(names)}; choose one with text_key=')
    kind = file.schema_arrow.field(text_key).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise UserError(f'{path}: column "{text_key}" is of type {kind}, not string')
    return file


def _read_group(block: Block, text_key: str) -> Iterator[str]:
    file = _parquet(block.files[0], text_key)
    first = sum(file.metadata.row_group(g).num_rows for g in range(block.start))
    for batch in file.iter_batches(BLOCK_ROWS, row_groups=[block.start], columns=[text_key]):
        yield from _checked_rows(batch.column(0).to_pylist(), str(block.files[0]), first, text_key)
        first += batch.num_rows


def _row_blocks(source: Source, text_key: str) -> Iterator[Block]:
    dataset = load_dataset(source)
    name = Path(source.name)
    if text_key not in dataset.column_names:
        columns = ", ".join(dataset.column_names)
        raise UserError(f'data={source.name}: no column "{text_key}": the columns are {columns}; choose one with text_key=')
    total = size_of(source)[0]
    column = dataset.select_columns([text_key]).with_format(None)
    for start in range(0, len(column), BLOCK_ROWS):
        texts = tuple(column[start : start + BLOCK_ROWS][text_key])
        yield Block("rows", (name,), total * len(texts) // len(column), start=start, data=texts)


def _read_rows(block: Block, text_key: str) -> Iterator[str]:
    yield from _checked_rows(block.data, str(block.files[0]), block.start, text_key)


def _checked_rows(texts: list | tuple, name: str, first: int, text_key: str) -> Iterator[str]:
    for row, text in enumerate(texts, first):
        if not isinstance(text, str):
            raise UserError(f'{name}, row {row}: "{text_key}" is {text!r:.40}, not a string')
        yield text


@functools.lru_cache(maxsize=4)
def load_dataset(source: Source):
    """The `datasets.Dataset` of a source: a folder written by `save_to_disk`, or a named one. Of several splits, "train"."""
    import datasets

    try:
        if source.kind == "dataset":
            loaded = datasets.load_from_disk(str(Path(source.name).expanduser()))
        else:
            name, _, config = source.name.removeprefix("hf:").partition(":")
            loaded = datasets.load_dataset(name, config or None)
    except Exception as error:  # the library raises its own, the network's and the file system's
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"data={source.name}: the data set cannot be loaded: {reason}") from None
    if isinstance(loaded, dict):
        if "train" not in loaded:
            raise UserError(f'data={source.name}: no split "train": there are {", ".join(loaded)}')
        loaded = loaded["train"]
    for name, feature in loaded.features.items():
        if (undecoded := _undecoded(feature)) is not feature:
            loaded = loaded.cast_column(name, undecoded)
    return loaded


def _undecoded(feature):
    """A feature whose images and sounds stay the bytes or paths that they are; the same one where it has none."""
    import datasets

    if isinstance(feature, (datasets.Image, datasets.Audio)):
        return type(feature)(decode=False)
    if isinstance(feature, datasets.Sequence) and (inner := _undecoded(feature.feature)) is not feature.feature:
        return datasets.Sequence(inner, feature.length)
    return feature
