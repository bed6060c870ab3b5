"""Megatron's distributed checkpoint format (`torch_dist`), written and read piece by piece, without a model or a process group.

The format is torch.distributed.checkpoint's: `*.distcp` files with one `torch.save` record per chunk of a tensor, a pickled
`.metadata` that says for every chunk its file, offset and length, and beside them Megatron's `metadata.json` and `common.pt`.
A loader finds its part of every tensor by the chunks' offsets, so that the layout of the run that loads does not matter.
"""

from __future__ import annotations

import functools
import io
import json
import math
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, _StorageInfo

from conversion import workers as threads
from conversion.atomic import Unfinished
from conversion.workers import Progress
from nemo_ext.errors import UserError

# Files do not depend on the number of threads, so that another number can go on with them after a kill
FILES, MAX_FILE_BYTES = LIMITS = 8, 2**30
RECORD_BYTES = 2048  # of a record beyond the tensor, at most
BACKEND = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}
# What NeMo writes with a model: how to read the keys (`sharded_state_dict_metadata` of its MegatronStrategy)
CONTENT_METADATA = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}


@dataclass(frozen=True)
class Chunk:
    """A piece of a tensor: where it starts in the whole, its shape there, and how to get it.

    `read()` returns a tensor with as many elements as `shape`, in its order.
    """

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


@dataclass
class StoredTensor:
    """A tensor of the checkpoint: whole shape, dtype, and the chunks that cover it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: list[Chunk] = field(default_factory=list)


def write(
    folder: Path,
    tensors: Mapping[str, StoredTensor],
    objects: Mapping[str, Any],
    progress: Progress | None = None,
    workers: int = 2,
    unfinished: Unfinished | None = None,
) -> None:
    """Write a checkpoint of `tensors` and pickled `objects` into `folder`.

    `workers` threads each write one file at a time and hold one chunk of a tensor. `progress(done, total, "B")` follows. An
    exception of a `read()` is raised here. `folder` may lie in a folder that is `unfinished`: then the files that an earlier
    process has finished stay, and UserError is raised first if the disk is too small.
    """
    folder.mkdir(exist_ok=True)
    records = [(key, index, chunk) for key, tensor in tensors.items() for index, chunk in enumerate(tensor.chunks)]
    sizes = [math.prod(chunk.shape) * tensors[key].dtype.itemsize for key, _, chunk in records]
    groups = {
        folder / f"__0_{number}{DEFAULT_SUFFIX}": group
        for number, group in enumerate(_groups(sizes, max(FILES, -(-sum(sizes) // MAX_FILE_BYTES))), 1)
    }
    places: dict[Path, list[tuple[int, int]]] = {}
    if unfinished:
        unfinished.check_space({file: sum(sizes[i] + RECORD_BYTES for i in group) for file, group in groups.items()})
        places = {file: facts["places"] for file in groups if (facts := unfinished.finished(file))}

    def write_file(file: Path) -> Iterator[int]:
        written = []
        with open(file, "wb") as stream:
            for i in groups[file]:
                key, _, chunk = records[i]
                tensor = chunk.read().to(tensors[key].dtype).reshape(chunk.shape).contiguous()
                if tensor.untyped_storage().nbytes() != tensor.nbytes:
                    tensor = tensor.clone()  # torch.save writes the whole storage
                start = stream.tell()
                torch.save(tensor, stream)
                written.append((start, stream.tell() - start))
                yield sizes[i]
        if unfinished:
            unfinished.finish(file, places=written)
        places[file] = written

    jobs = [functools.partial(write_file, file) for file in groups if file not in places]
    threads.run(jobs, workers, sum(sizes), sum(sizes[i] for file in places for i in groups[file]), progress)

    storage: dict[dcp.MetadataIndex, _StorageInfo] = {}
    for file, group in groups.items():
        for i, (start, length) in zip(group, places[file], strict=True):
            key, index, chunk = records[i]
            storage[dcp.MetadataIndex(key, torch.Size(chunk.offset), index)] = _StorageInfo(file.name, start, length)
    storage |= _write_objects(folder, f"__0_0{DEFAULT_SUFFIX}", objects)
    _write_metadata(folder, tensors, objects, storage)


def _write_metadata(
    folder: Path,
    tensors: Mapping[str, StoredTensor],
    objects: Iterable[str],
    storage: dict[dcp.MetadataIndex, _StorageInfo],
) -> None:
    described = {
        key: dcp.TensorStorageMetadata(
            dcp.TensorProperties(dtype=tensor.dtype),
            torch.Size(tensor.shape),
            [dcp.ChunkStorageMetadata(torch.Size(chunk.offset), torch.Size(chunk.shape)) for chunk in tensor.chunks],
        )
        for key, tensor in tensors.items()
    }
    described |= {key: dcp.BytesStorageMetadata() for key in objects}
    with open(folder / ".metadata", "wb") as stream:
        pickle.dump(dcp.Metadata(state_dict_metadata=described, planner_data={}, storage_data=storage), stream)
    torch.save({"content_metadata": CONTENT_METADATA}, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps(BACKEND))


def _write_objects(folder: Path, name: str, objects: Mapping[str, Any]) -> dict[dcp.MetadataIndex, _StorageInfo]:
    written = {}
    with open(folder / name, "wb") as stream:
        for key, value in objects.items():
            buffer = io.BytesIO()
            torch.save([value], buffer)  # Megatron stores a list of the objects under a key
            start = stream.tell()
            stream.write(buffer.getbuffer())
            written[dcp.MetadataIndex(key)] = _StorageInfo(name, start, buffer.tell())
    return written


def _groups(sizes: Sequence[int], count: int) -> list[list[int]]:
    """Consecutive indices in at most `count` groups of about the same size."""
    limit = sum(sizes) / count
    groups: list[list[int]] = [[]]
    filled = 0
    for i, size in enumerate(sizes):
        if groups[-1] and filled >= limit * len(groups):
            groups.append([])
        groups[-1].append(i)
        filled += size
    return groups


@dataclass(frozen=True)
class SavedChunk:
    """A piece of a tensor in a checkpoint: where it starts in the whole, its shape, and the bytes of its `torch.save` record."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    file: Path
    start: int
    length: int

    def read(self) -> torch.Tensor:
        """The piece, in memory of its own; UserError if the record is not what the metadata says."""
        try:
            with open(self.file, "rb", buffering=0) as stream:
                tensor = torch.load(_Window(stream, self.start, self.length), map_location="cpu", weights_only=True)
            return tensor.reshape(self.shape)
        except OSError as error:
            raise UserError(f"cannot read {self.file}: {error.strerror or error}") from error
        except (RuntimeError, ValueError, AttributeError, EOFError, KeyError, pickle.UnpicklingError) as error:
            raise UserError(f"{self.file} is corrupt at byte {self.start}: copy the checkpoint again") from error


@dataclass(frozen=True)
class SavedTensor:
    """A tensor of a checkpoint on disk, in chunks that lie as the parallel layout of the run that saved it had them."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[SavedChunk, ...]

    def read(self, *index: int) -> torch.Tensor:
        """The part at `index` along the first axes, such as one layer of a stacked tensor; without it the whole tensor.

        Only the chunks that overlap it are read, one at a time.
        """
        rest = self.shape[len(index) :]
        low = (*index, *[0] * len(rest))
        high = (*(i + 1 for i in index), *rest)
        part = None
        for chunk in self.chunks:
            chunk_high = tuple(map(sum, zip(chunk.offset, chunk.shape, strict=True)))
            begin, end = tuple(map(max, low, chunk.offset)), tuple(map(min, high, chunk_high))
            if any(first >= last for first, last in zip(begin, end, strict=True)):
                continue
            piece = chunk.read().to(self.dtype)
            if (chunk.offset, chunk_high) == (low, high):
                return piece.reshape(rest)
            part = torch.empty((1,) * len(index) + rest, dtype=self.dtype) if part is None else part
            part[_slices(begin, end, low)] = piece[_slices(begin, end, chunk.offset)]
        return torch.empty(rest, dtype=self.dtype) if part is None else part.reshape(rest)


def _slices(begin: Sequence[int], end: Sequence[int], origin: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(first - zero, last - zero) for first, last, zero in zip(begin, end, origin, strict=True))


def read(folder: Path) -> dict[str, SavedTensor]:
    """The tensors of the checkpoint in `folder` by their keys, without those of an optimizer; no weights are read yet.

    Raises UserError: no checkpoint of this format, metadata that is corrupt or holds anything but metadata, a missing or
    truncated file, chunks that do not cover their tensor.
    """
    _check_backend(folder)
    try:
        with open(folder / ".metadata", "rb") as stream:
            metadata = _MetadataUnpickler(stream).load()
        places = {(index.fqn, tuple(index.offset or ())): info for index, info in metadata.storage_data.items()}
        tensors = {
            key: SavedTensor(
                tuple(entry.size),
                entry.properties.dtype,
                tuple(
                    _chunk(folder, tuple(chunk.offsets), tuple(chunk.sizes), places[key, tuple(chunk.offsets)])
                    for chunk in entry.chunks
                ),
            )
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, dcp.TensorStorageMetadata) and not key.startswith("optimizer.")
        }
    except OSError as error:
        raise UserError(f"cannot read {folder / '.metadata'}: {error.strerror or error}") from error
    except UserError:
        raise
    except Exception as error:  # a damaged pickle fails in any way
        raise UserError(f"{folder / '.metadata'} is corrupt: copy the checkpoint again ({type(error).__name__})") from error
    _check_files(chunk for tensor in tensors.values() for chunk in tensor.chunks)
    for key, tensor in tensors.items():
        _check_cover(folder, key, tensor)
    return tensors


def _chunk(folder: Path, offset: tuple[int, ...], shape: tuple[int, ...], place: _StorageInfo) -> SavedChunk:
    if Path(place.relative_path).name != place.relative_path:
        raise UserError(f"{folder / '.metadata'} names a file outside its folder: {place.relative_path}")
    if getattr(place, "transform_descriptors", None):
        raise UserError(f"{folder} is compressed ({', '.join(place.transform_descriptors)}), which is not read")
    return SavedChunk(offset, shape, folder / place.relative_path, place.offset, place.length)


def _check_backend(folder: Path) -> None:
    try:
        backend = json.loads((folder / "metadata.json").read_text())["sharded_backend"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is no Megatron checkpoint: its metadata.json cannot be read") from error
    if backend != BACKEND["sharded_backend"]:
        raise UserError(f"{folder} is a {backend} checkpoint; only {BACKEND['sharded_backend']} is read: save it as that")


def _check_files(chunks: Iterable[SavedChunk]) -> None:
    ends: dict[Path, int] = {}
    for chunk in chunks:
        ends[chunk.file] = max(ends.get(chunk.file, 0), chunk.start + chunk.length)
    for file, end in ends.items():
        try:
            size = file.stat().st_size
        except OSError as error:
            raise UserError(f"cannot read {file}: {error.strerror or error}") from error
        if size < end:
            raise UserError(f"{file} is truncated: it has {size} bytes of {end}; copy the checkpoint again")


def _check_cover(folder: Path, key: str, tensor: SavedTensor) -> None:
    inside = all(
        len(chunk.offset) == len(chunk.shape) == len(tensor.shape)
        and all(0 <= o and o + n <= size for o, n, size in zip(chunk.offset, chunk.shape, tensor.shape, strict=True))
        for chunk in tensor.chunks
    )
    if not inside or sum(math.prod(chunk.shape) for chunk in tensor.chunks) != math.prod(tensor.shape):
        raise UserError(f"{folder}: the chunks of {key} do not cover its shape {list(tensor.shape)}: copy the checkpoint again")


class _Window(io.RawIOBase):
    """`length` bytes of a file from `start`, as a file of their own."""

    def __init__(self, stream: BinaryIO, start: int, length: int) -> None:
        self._stream, self._start, self._length, self._at = stream, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = base + offset
        return self._at

    def readinto(self, buffer: memoryview) -> int:
        view = memoryview(buffer).cast("B")[: max(0, self._length - self._at)]
        self._stream.seek(self._start + self._at)
        done = 0
        while done < len(view) and (count := self._stream.readinto(view[done:])):
            done += count
        self._at += done
        return done


class _Ignored:
    """Stands for what a checkpoint's metadata holds beside the places of tensors, such as the plan by which it was saved."""

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _MetadataUnpickler(pickle.Unpickler):
    """Reads `.metadata`, a pickle, without running anything that it names: known classes of plain data, or UserError."""

    KNOWN = {
        ("torch", "Size"): torch.Size,
        ("torch.serialization", "_get_layout"): _Ignored,
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _StorageInfo,
        ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"): _Ignored,
        ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"): dcp.Metadata,
        **{
            (dcp.__name__, kind.__name__): kind
            for kind in (
                dcp.Metadata, dcp.MetadataIndex, dcp.TensorStorageMetadata, dcp.BytesStorageMetadata, dcp.ChunkStorageMetadata,
                dcp.TensorProperties, dcp.StorageMeta, dcp._MEM_FORMAT_ENCODING,
            )
        },
    }  # fmt: skip
    IGNORED = ("torch.distributed.checkpoint.planner", "megatron.core.dist_checkpointing.strategies.torch", "pathlib")

    def find_class(self, module: str, name: str) -> Any:
        if (known := self.KNOWN.get((module, name))) is not None:
            return known
        if module in self.IGNORED:
            return _Ignored
        if module == "torch" and isinstance(kind := getattr(torch, name, None), torch.dtype):
            return kind
        raise UserError(f"the checkpoint's .metadata names {module}.{name}, which is no metadata: it is not read")
