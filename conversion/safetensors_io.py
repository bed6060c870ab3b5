"""Tensors of a Hugging Face folder, read and written one at a time.

The safetensors format is an unsigned 64-bit header length, a JSON header `{name: {dtype, shape, data_offsets}}` and the
tensors' bytes (https://huggingface.co/docs/safetensors). Reading by offset instead of through a memory map keeps the
resident memory at one tensor, and checks a file's length before a byte of it is used.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from nemo_ext.errors import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
FORMAT = {"format": "pt"}  # the metadata without which transformers refuses a file
MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `file`, byte `offset`, `dtype`, `shape`."""

    file: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> torch.Tensor:
        """The tensor, in memory of its own. Raises UserError if the file has shrunk meanwhile."""
        tensor = torch.empty(self.shape, dtype=self.dtype)
        if not self.nbytes:
            return tensor
        raw = memoryview(tensor.view(-1).view(torch.uint8).numpy())
        with open(self.file, "rb", buffering=0) as stream:
            stream.seek(self.offset)
            done = 0
            while done < self.nbytes:
                count = stream.readinto(raw[done:])
                if not count:
                    raise UserError(f"{self.file} is truncated: copy it again")
                done += count
        return tensor

    def write(self, tensor: torch.Tensor) -> None:
        """Put the tensor at its place in a file that `create` has made. ValueError if dtype or shape are others."""
        raw = self.raw(tensor)
        with open(self.file, "r+b", buffering=0) as stream:
            stream.seek(self.offset)
            done = 0
            while done < self.nbytes:
                done += stream.write(raw[done:])

    def raw(self, tensor: torch.Tensor) -> memoryview:
        """The bytes to store. ValueError if dtype or shape are others."""
        if tensor.dtype != self.dtype or tuple(tensor.shape) != self.shape:
            raise ValueError(f"{self.file}: got {tensor.dtype} {tuple(tensor.shape)}, announced {self.dtype} {self.shape}")
        return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file; raises UserError if it is truncated or not safetensors."""
    header, start, size = _header(file)
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            (begin, end), shape = entry["data_offsets"], tuple(entry["shape"])
            info = TensorInfo(file, start + begin, DTYPES[entry["dtype"]], shape)
            understood = begin >= 0 and all(isinstance(n, int) and n >= 0 for n in shape)
        except (KeyError, TypeError, ValueError):
            understood = False
        if not understood:
            raise UserError(f"{file}: tensor {name} has an entry that is not understood: {entry}")
        if end - begin != info.nbytes:
            raise UserError(f"{file}: tensor {name} says {end - begin} bytes but its shape and dtype need {info.nbytes}")
        if info.offset + info.nbytes > size:
            raise UserError(
                f"{file} is truncated: tensor {name} ends at byte {info.offset + info.nbytes} of {size}; copy it again"
            )
        tensors[name] = info
    return tensors


def read_metadata(file: Path) -> dict[str, str] | None:
    """The `__metadata__` of one safetensors file, None where it has none."""
    return _header(file)[0].get("__metadata__")


def _header(file: Path) -> tuple[dict, int, int]:
    """The JSON header, the byte at which the tensors begin, and the file's size."""
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            first = stream.read(8)
            length = struct.unpack("<Q", first)[0] if len(first) == 8 else MAX_HEADER_BYTES + 1
            if length > MAX_HEADER_BYTES or 8 + length > size:
                raise UserError(f"{file} is truncated or not a safetensors file: copy it again")
            header = json.loads(stream.read(length))
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from error
    except ValueError:
        header = None
    if not isinstance(header, dict):
        raise UserError(f"{file} has a corrupt safetensors header: copy it again")
    return header, 8 + length, size


def open_folder(folder: Path) -> dict[str, TensorInfo]:
    """All tensors of a Hugging Face folder: `model.safetensors`, or the shards that `model.safetensors.index.json` lists.

    Raises UserError naming a missing shard, a shard without a tensor that the index places in it, or a folder that only
    has pickled `.bin` weights.
    """
    index = folder / INDEX
    if index.is_file():
        try:
            weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
            shards = sorted(set(weight_map.values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index} is not a safetensors index: copy it again") from error
        missing = [shard for shard in shards if not (folder / shard).is_file()]
        if missing:
            raise UserError(f"{folder} lacks {len(missing)} of its {len(shards)} shards, first {missing[0]}: download it again")
        tensors: dict[str, TensorInfo] = {}
        for shard in shards:
            tensors.update(read_header(folder / shard))
        for name, shard in weight_map.items():
            if name not in tensors:
                raise UserError(f"{folder / shard} lacks tensor {name}, which {index.name} places there: download it again")
        return tensors
    single = folder / SINGLE
    if single.is_file():
        return read_header(single)
    if next(folder.glob("*.bin"), None) or next(folder.glob("*.pth"), None):
        raise UserError(f"{folder} has pickled .bin weights, which can run code: save it as safetensors first (save_pretrained)")
    raise UserError(f"{folder} has no {SINGLE} and no {INDEX}")


def files_of(tensors: Mapping[str, TensorInfo]) -> list[Path]:
    """The files that hold `tensors`, sorted."""
    return sorted({info.file for info in tensors.values()})


def create(
    file: Path, specs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str] | None = FORMAT
) -> dict[str, TensorInfo]:
    """Make a safetensors file for the tensors of `specs`, {name: (dtype, shape)}, in that order; return where each is to be
    written. Until then their bytes are zero."""
    header: dict[str, dict] = {} if metadata is None else {"__metadata__": dict(metadata)}
    offset = 0
    for name, (dtype, shape) in specs.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    with open(file, "wb") as stream:
        stream.write(struct.pack("<Q", len(raw)) + raw)
        stream.truncate(8 + len(raw) + offset)
    return read_header(file)


def write_file(file: Path, specs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], tensors: Iterable[torch.Tensor]) -> None:
    """Write one safetensors file; `tensors` come in the order of `specs`, `{name: (dtype, shape)}`, one in memory at a time."""
    for info, tensor in zip(create(file, specs).values(), tensors, strict=True):
        info.write(tensor)
