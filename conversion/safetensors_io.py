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

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
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


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file; raises UserError if it is truncated or not safetensors."""
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
    except ValueError as error:
        raise UserError(f"{file} has a corrupt safetensors header: copy it again") from error
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            begin, end = entry["data_offsets"]
            info = TensorInfo(file, 8 + length + begin, DTYPES[entry["dtype"]], tuple(entry["shape"]))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{file}: tensor {name} has an entry that is not understood: {entry}") from error
        if end - begin != info.nbytes:
            raise UserError(f"{file}: tensor {name} says {end - begin} bytes but its shape and dtype need {info.nbytes}")
        if info.offset + info.nbytes > size:
            raise UserError(
                f"{file} is truncated: tensor {name} ends at byte {info.offset + info.nbytes} of {size}; copy it again"
            )
        tensors[name] = info
    return tensors


def open_folder(folder: Path) -> dict[str, TensorInfo]:
    """All tensors of a Hugging Face folder: `model.safetensors`, or the shards that `model.safetensors.index.json` lists.

    Raises UserError naming a missing shard, a shard without a tensor that the index places in it, or a folder that only
    has pickled `.bin` weights.
    """
    index = folder / "model.safetensors.index.json"
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
    single = folder / "model.safetensors"
    if single.is_file():
        return read_header(single)
    if next(folder.glob("*.bin"), None) or next(folder.glob("*.pth"), None):
        raise UserError(f"{folder} has pickled .bin weights, which can run code: save it as safetensors first (save_pretrained)")
    raise UserError(f"{folder} has no model.safetensors and no model.safetensors.index.json")


def files_of(tensors: Mapping[str, TensorInfo]) -> list[Path]:
    """The files that hold `tensors`, sorted."""
    return sorted({info.file for info in tensors.values()})


def write_file(file: Path, specs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], tensors: Iterable[torch.Tensor]) -> None:
    """Write one safetensors file; `tensors` come in the order of `specs`, `{name: (dtype, shape)}`, one in memory at a time."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in specs.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with open(file, "wb") as stream:
        stream.write(struct.pack("<Q", len(raw)) + raw)
        for (name, (dtype, shape)), tensor in zip(specs.items(), tensors, strict=True):
            if tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape):
                raise ValueError(f"{name}: got {tensor.dtype} {tuple(tensor.shape)}, announced {dtype} {shape}")
            stream.write(memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy()))
