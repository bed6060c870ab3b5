"""A GGUF file's metadata and tensors, read in a tenth of a second and one tensor at a time.

Format: github.com/ggml-org/ggml, docs/gguf.md. The `gguf` package's reader makes several objects for each of a vocabulary's
strings, which takes seconds; this one reads the same bytes straight into Python values, and tensors by their offset.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_ext.errors import UserError

if TYPE_CHECKING:
    import numpy

Metadata = dict[str, Any]

VERSIONS = (2, 3)
CHUNK_ELEMENTS = 1 << 22  # of a tensor, converted at once
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # GGUF's value types
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GGUFTensor:
    """Where a tensor lies and how it is stored: ggml `kind`, `shape` with rows first, byte `offset` and length."""

    file: Path
    name: str
    kind: int  # gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    def chunks(self) -> Iterator[numpy.ndarray]:
        """The tensor's values as fp32, some rows at a time: each `[rows, columns]`, a vector as one row.

        Raises UserError where the file has shrunk meanwhile, and for a type that the `gguf` package cannot dequantize.
        """
        import numpy
        from gguf import GGMLQuantizationType, dequantize

        columns = self.shape[-1] if self.shape else 1
        rows = self.elements // columns
        row_bytes = self.nbytes // rows
        step = max(1, CHUNK_ELEMENTS // columns)
        with open(self.file, "rb") as stream:
            stream.seek(self.offset)
            for start in range(0, rows, step):
                count = min(step, rows - start)
                data = numpy.empty((count, row_bytes), dtype=numpy.uint8)
                if stream.readinto(memoryview(data.reshape(-1))) != data.size:
                    raise UserError(f"{self.file} is truncated: copy it again")
                try:
                    yield dequantize(data, GGMLQuantizationType(self.kind)).reshape(count, columns)
                except NotImplementedError as error:
                    raise UserError(f"{self.file}: tensor {self.name} cannot be dequantized: {error}") from error

    def values(self) -> numpy.ndarray:
        """The whole tensor as fp32."""
        import numpy

        return numpy.concatenate(list(self.chunks())).reshape(self.shape)


@dataclass(frozen=True)
class GGUFFile:
    """What a GGUF file holds; `tensors` by name, in the file's order."""

    path: Path
    metadata: Metadata
    tensors: dict[str, GGUFTensor]


def read(path: Path) -> GGUFFile:
    """Metadata and the places of the tensors.

    Raises UserError for a file that is not GGUF, truncated, of the other byte order or a version that is not known, and for
    one part of a split file.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is not there")
    with open(path, "rb") as stream:
        if stream.read(4) != b"GGUF":
            raise UserError(f"{path} is not a GGUF file")
        size = path.stat().st_size
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            try:
                metadata, infos, end = _header(_Cursor(content, path))
            except (struct.error, IndexError, OverflowError, MemoryError, UnicodeDecodeError) as error:
                raise UserError(f"{path} is truncated or corrupt: copy it again ({error})") from error
    if metadata.get("split.count", 1) > 1:
        raise UserError(f"{path} is one of {metadata['split.count']} parts: join them first (llama-gguf-split --merge)")
    tensors = {}
    for name, kind, shape, offset in infos:
        tensor = _tensor(path, name, kind, shape, end + offset)
        if tensor.offset + tensor.nbytes > size:
            raise UserError(
                f"{path} is truncated: tensor {name} ends at byte {tensor.offset + tensor.nbytes} of {size}; copy it again"
            )
        if name in tensors:
            raise UserError(f"{path} is corrupt: it has tensor {name} twice")
        tensors[name] = tensor
    return GGUFFile(path, metadata, tensors)


class _Cursor:
    """Reads little-endian values one after another; past the end it raises struct.error or IndexError."""

    def __init__(self, content: mmap.mmap, path: Path) -> None:
        self.content, self.path, self.position = content, path, 4

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self.content, self.position)
        self.position += struct.calcsize(f"<{code}")
        return value

    def scalars(self, code: str, count: int) -> list:
        form = f"<{count}{code}"
        values = struct.unpack_from(form, self.content, self.position)
        self.position += struct.calcsize(form)
        return list(values)

    def string(self) -> str:
        start = self.position + 8
        (length,) = struct.unpack_from("<Q", self.content, self.position)
        self.position = start + length
        if self.position > len(self.content):
            raise IndexError("a string goes past the end of the file")
        return self.content[start : self.position].decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise IndexError(f"value type {kind} is not known")
        item, count = self.scalar("I"), self.scalar("Q")
        if count > len(self.content):
            raise IndexError("an array goes past the end of the file")
        if item in _SCALARS:
            return self.scalars(_SCALARS[item], count)
        return [self.value(item) for _ in range(count)]


def _header(cursor: _Cursor) -> tuple[Metadata, list[tuple[str, int, tuple[int, ...], int]], int]:
    """Metadata, (name, kind, shape, offset) of the tensors, and where their data begin."""
    version = cursor.scalar("I")
    if version & 0xFFFF == 0:
        raise UserError(f"{cursor.path} is a big-endian GGUF file; only little-endian ones are read")
    if version not in VERSIONS:
        raise UserError(f"{cursor.path} is of GGUF version {version}; known: {', '.join(map(str, VERSIONS))}")
    tensors, keys = cursor.scalar("Q"), cursor.scalar("Q")
    metadata: Metadata = {}
    for _ in range(keys):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.scalar("I"))
    infos = []
    for _ in range(tensors):
        name = cursor.string()
        shape = tuple(reversed(cursor.scalars("Q", cursor.scalar("I"))))
        infos.append((name, cursor.scalar("I"), shape, cursor.scalar("Q")))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise IndexError(f"the alignment is {alignment}")
    return metadata, infos, -(-cursor.position // alignment) * alignment


def _tensor(path: Path, name: str, kind: int, shape: tuple[int, ...], offset: int) -> GGUFTensor:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (ValueError, KeyError):
        raise UserError(f"{path}: tensor {name} is of ggml type {kind}, which is not known") from None
    elements = math.prod(shape)
    if not shape or not elements or shape[-1] % block:
        raise UserError(f"{path} is corrupt: tensor {name} has shape {shape} and is stored in blocks of {block}")
    return GGUFTensor(path, name, kind, shape, offset, elements // block * block_bytes)
