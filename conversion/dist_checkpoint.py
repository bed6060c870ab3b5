"""Writes Megatron's distributed checkpoint format (`torch_dist`) tensor by tensor, without a model or a process group.

The format is torch.distributed.checkpoint's: `*.distcp` files with one `torch.save` record per chunk of a tensor, a pickled
`.metadata` that says for every chunk its file, offset and length, and beside them Megatron's `metadata.json` and `common.pt`.
A loader finds its part of every tensor by the chunks' offsets, so that the layout of the run that loads does not matter.
"""

from __future__ import annotations

import io
import json
import pickle
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

MAX_FILE_BYTES = 4 * 2**30
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
    progress: Callable[[int, int, str], None] | None = None,
    workers: int = 2,
) -> None:
    """Write a checkpoint of `tensors` and pickled `objects` into an empty `folder`.

    `workers` threads each write their own files and hold one tensor at a time. `progress(done, total, "MB")` is called after
    every chunk. An exception of a `read()` is raised here.
    """
    records = [(key, index, chunk) for key, tensor in tensors.items() for index, chunk in enumerate(tensor.chunks)]
    sizes = [_nbytes(tensors[key].dtype, chunk.shape) for key, _, chunk in records]
    total, done = sum(sizes), 0
    storage: dict[MetadataIndex, _StorageInfo] = {}
    counting = threading.Lock()

    def write_file(number: int, group: Sequence[int]) -> dict[MetadataIndex, _StorageInfo]:
        nonlocal done
        name, written = f"__0_{number}{DEFAULT_SUFFIX}", {}
        with open(folder / name, "wb") as stream:
            for i in group:
                key, index, chunk = records[i]
                tensor = chunk.read().to(tensors[key].dtype).reshape(chunk.shape).contiguous()
                if tensor.untyped_storage().nbytes() != tensor.nbytes:
                    tensor = tensor.clone()  # torch.save writes the whole storage
                start = stream.tell()
                torch.save(tensor, stream)
                where = MetadataIndex(key, torch.Size(chunk.offset), index)
                written[where] = _StorageInfo(name, start, stream.tell() - start)
                with counting:
                    done += sizes[i]
                    if progress:
                        progress(done // 10**6, total // 10**6, "MB")
        return written

    groups = _groups(sizes, max(workers, -(-total // MAX_FILE_BYTES)))
    with ThreadPoolExecutor(workers) as pool:
        for written in pool.map(write_file, range(1, len(groups) + 1), groups):
            storage |= written
    storage |= _write_objects(folder, f"__0_0{DEFAULT_SUFFIX}", objects)

    metadata = Metadata(
        state_dict_metadata={
            **{
                key: TensorStorageMetadata(
                    TensorProperties(dtype=tensor.dtype),
                    torch.Size(tensor.shape),
                    [ChunkStorageMetadata(torch.Size(chunk.offset), torch.Size(chunk.shape)) for chunk in tensor.chunks],
                )
                for key, tensor in tensors.items()
            },
            **{key: BytesStorageMetadata() for key in objects},
        },
        planner_data={},
        storage_data=storage,
    )
    with open(folder / ".metadata", "wb") as stream:
        pickle.dump(metadata, stream)
    torch.save({"content_metadata": CONTENT_METADATA}, folder / "common.pt")
    backend = {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
    (folder / "metadata.json").write_text(json.dumps(backend))


def _write_objects(folder: Path, name: str, objects: Mapping[str, Any]) -> dict[MetadataIndex, _StorageInfo]:
    written = {}
    with open(folder / name, "wb") as stream:
        for key, value in objects.items():
            buffer = io.BytesIO()
            torch.save([value], buffer)  # Megatron stores a list of the objects under a key
            start = stream.tell()
            stream.write(buffer.getbuffer())
            written[MetadataIndex(key)] = _StorageInfo(name, start, buffer.tell())
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


def _nbytes(dtype: torch.dtype, shape: Iterable[int]) -> int:
    return torch.Size(shape).numel() * dtype.itemsize
