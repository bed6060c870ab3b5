"""Which tensor lies in which file of a Hugging Face folder, and in what order: recorded, restored, or newly laid out.

A folder is written as one `model.safetensors`, or as several shards with an index. The order within a file decides every byte of
it, so that the record of an imported folder lets an export give the same files back.
"""

from __future__ import annotations

import collections
import functools
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from conversion import safetensors_io
from conversion.atomic import Unfinished
from conversion.dtypes import DTYPES, NAMES
from conversion.safetensors_io import TensorInfo
from conversion.workers import Progress

LAYER = re.compile(r"(.*?\blayers\.)(\d+)(\..*)")
Specs = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]  # {name: (dtype, shape)}


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its name, the names of its tensors in order, and its `__metadata__`."""

    file: str
    tensors: tuple[str, ...]
    metadata: Mapping[str, str] | None


def record(folder: Path, source: Mapping[str, TensorInfo], dtypes: Mapping[str, torch.dtype]) -> dict[str, Any]:
    """The files of a Hugging Face folder as JSON, with those of its tensors that `dtypes`, {name: dtype}, has.

    Compact: tensors of layers that follow each other in the same order are listed once with the layers' numbers, and of the
    dtypes the most frequent one and the exceptions. `restore` reads it back.
    """
    usual = collections.Counter(dtypes.values()).most_common(1)[0][0]
    shards = []
    for file, infos in itertools.groupby(sorted(source.items(), key=lambda item: (item[1].file, item[1].offset)), _file):
        names = [name for name, info in infos if name in dtypes]
        if names:
            metadata = safetensors_io.read_metadata(file)
            shards.append({"file": file.name, "metadata": metadata, "tensors": list(_folded(names))})
    index, metadata = folder / safetensors_io.INDEX, None
    if index.is_file():
        metadata = json.loads(index.read_text()).get("metadata")
        if metadata and "total_size" in metadata and dtypes != {name: info.dtype for name, info in source.items()}:
            metadata["total_size"] = sum(nbytes((dtype, source[name].shape)) for name, dtype in dtypes.items())
    return {
        "index_metadata": metadata,
        "dtype": NAMES[usual],
        "other_dtypes": {name: NAMES[dtype] for name, dtype in dtypes.items() if dtype != usual},
        "shards": shards,
    }


def restore(recorded: Mapping[str, Any]) -> tuple[list[Shard], dict[str, torch.dtype]]:
    """The shards that `record` describes and {tensor: dtype} of all their tensors."""
    shards = [Shard(s["file"], tuple(_unfolded(s["tensors"])), s["metadata"]) for s in recorded["shards"]]
    usual, others = recorded["dtype"], recorded["other_dtypes"]
    return shards, {name: DTYPES[others.get(name, usual)] for shard in shards for name in shard.tensors}


def lay_out(specs: Specs, max_bytes: int) -> list[Shard]:
    """Shards of at most `max_bytes` each (a larger tensor has one of its own), filled in the order of `specs`.

    Within a file the tensors are sorted by name, as the safetensors package has them.
    """
    groups: list[list[str]] = [[]]
    filled = 0
    for name, spec in specs.items():
        size = nbytes(spec)
        if groups[-1] and filled + size > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    if len(groups) == 1:
        return [Shard(safetensors_io.SINGLE, tuple(sorted(groups[0])), safetensors_io.FORMAT)]
    return [
        Shard(f"model-{i:05d}-of-{len(groups):05d}.safetensors", tuple(sorted(group)), safetensors_io.FORMAT)
        for i, group in enumerate(groups, 1)
    ]


def write(
    unfinished: Unfinished,
    layout: Iterable[Shard],
    specs: Specs,
    read: Callable[[str], torch.Tensor],
    progress: Progress | None = None,
) -> None:
    """Write the files of `layout` into the unfinished folder, one after another, with one tensor, `read(name)`, in memory.

    What an earlier process has written stays. `progress(done, total, "B")` follows. Raises UserError if the disk is too small.
    """
    layout = list(layout)
    sizes = {shard.file: [nbytes(specs[name]) for name in shard.tensors] for shard in layout}
    unfinished.check_space({unfinished.path / file: sum(each) for file, each in sizes.items()})
    total, before = sum(map(sum, sizes.values())), 0

    def report(done: int) -> None:
        if progress:
            progress(done, total, "B")

    for shard in layout:
        file = unfinished.path / shard.file
        if not unfinished.finished(file):
            for count in unfinished.grow(file, *_growing(shard, specs, read)):
                report(before + sum(sizes[shard.file][:count]))
            unfinished.finish(file)
        before += sum(sizes[shard.file])
        report(before)


def _growing(
    shard: Shard, specs: Specs, read: Callable[[str], torch.Tensor]
) -> tuple[Callable[[Path], None], list[Callable[[], memoryview]]]:
    """What `Unfinished.grow` wants to know of a safetensors file."""

    def begin(file: Path) -> None:
        places = safetensors_io.create(file, {name: specs[name] for name in shard.tensors}, shard.metadata)
        os.truncate(file, min((place.offset for place in places.values()), default=file.stat().st_size))

    def raw(name: str) -> memoryview:
        dtype, shape = specs[name]
        return TensorInfo(Path(shard.file), 0, dtype, tuple(shape)).raw(read(name))

    return begin, [functools.partial(raw, name) for name in shard.tensors]


def write_index(folder: Path, shards: Iterable[Shard], specs: Specs, metadata: Mapping[str, Any] | None) -> None:
    """Write `model.safetensors.index.json`; `metadata` None means computed: bytes and parameters of the tensors."""
    if metadata is None:
        metadata = {
            "total_parameters": sum(math.prod(shape) for _, shape in specs.values()),
            "total_size": sum(map(nbytes, specs.values())),
        }
    index = {"metadata": metadata, "weight_map": {name: shard.file for shard in shards for name in shard.tensors}}
    (folder / safetensors_io.INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def nbytes(spec: tuple[torch.dtype, tuple[int, ...]]) -> int:
    """Bytes of a tensor of this dtype and shape."""
    dtype, shape = spec
    return math.prod(shape) * dtype.itemsize


def _file(item: tuple[str, TensorInfo]) -> Path:
    return item[1].file


def _folded(names: Iterable[str]) -> Iterator[str | dict[str, Any]]:
    """["x", "layers.0.a", "layers.0.b", "layers.1.a", "layers.1.b"] -> "x", {"i": "0-1", "names": ["layers.{i}.a", ...]}."""
    layers = ((layer, tuple(group)) for layer, group in itertools.groupby(names, _layer))
    same = itertools.groupby(layers, lambda item: None if item[0] is None else tuple(map(_template, item[1])))
    for templates, group in same:
        if templates is None:
            yield from itertools.chain.from_iterable(plain for _, plain in group)
        else:
            yield {"i": _ranges([layer for layer, _ in group]), "names": list(templates)}


def _unfolded(entries: Iterable[str | dict[str, Any]]) -> Iterator[str]:
    for entry in entries:
        if isinstance(entry, str):
            yield entry
        else:
            for part in entry["i"].split(","):
                first, _, last = part.partition("-")
                for layer in range(int(first), int(last or first) + 1):
                    yield from (name.replace("{i}", str(layer)) for name in entry["names"])


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 10, 3] -> "0-2,10,3"."""
    runs = itertools.groupby(enumerate(numbers), lambda item: item[1] - item[0])
    ends = [(run[0][1], run[-1][1]) for run in (list(group) for _, group in runs)]
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ends)


def _layer(name: str) -> int | None:
    match = LAYER.fullmatch(name)
    return int(match[2]) if match else None


def _template(name: str) -> str:
    return LAYER.sub(r"\1{i}\3", name, count=1)
