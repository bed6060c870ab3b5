"""Hugging Face checkpoint -> NeMo 2 checkpoint, streaming: no model is built and no GPU is needed.

The result loads in NeMo (`nl.RestoreConfig(path=..., load_artifacts=False)`) at any tensor, pipeline and virtual-pipeline
layout. Its keys are those NeMo itself writes: the layers of a homogeneous decoder are stacked into one tensor with the layer
as a first axis, `module.decoder.layers.mlp.linear_fc2.weight` of shape [layers, h, ffn]. (A decoder that Megatron calls
heterogeneous - `moe_layer_freq` above 1, heterogeneous block specs - has one key per layer instead; no family here is one.)
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from conversion import dist_checkpoint, families, nemo_folder, safetensors_io, shards
from conversion.atomic import fingerprint, resumable_folder
from conversion.dist_checkpoint import Chunk, StoredTensor
from conversion.dtypes import DTYPES, cast, parse
from conversion.families import Family, Row
from conversion.multimodal import senses_of
from conversion.multimodal.rows import with_senses
from conversion.safetensors_io import TensorInfo
from conversion.workers import Progress
from nemo_ext.architecture import Architecture
from nemo_ext.errors import RunError, UserError

Check = Callable[[Path], Any]  # of the finished folder, before it has its name; gives what conversion.json says of it
BARE = "model."  # prefix of tensor names where the language model is not wrapped
HASHED_AT_ONCE = 1 << 22  # bytes
KEY_PREFIX = "module."  # the attribute of NeMo's GPTModel that holds Megatron's


def convert(
    hf_dir: Path,
    out_dir: Path,
    *,
    dtype: str | None = None,
    progress: Progress | None = None,
    workers: int = 2,
    check: Check | None = None,
    source: str | None = None,
) -> Path:
    """Convert the Hugging Face folder `hf_dir` into the NeMo folder `out_dir` and return that.

    `dtype` is "float32", "bfloat16", "float16" or None to keep each tensor's own. `progress(done, total, "B")` follows the
    writing, which `workers` threads share, each with one Megatron tensor (of one layer) in memory. A conversion that was killed
    goes on where it was, with any number of workers. `source` is what conversion.json calls the source.

    `out_dir` then has `weights/` (the distributed checkpoint), `architecture.json` (`Architecture.to_dict()`), of a model with
    senses `senses.json`, `tokenizer/` (with chat template, processor and generation_config.json) and `conversion.json` (see
    docs/conversion.md), and appears only when all is written and `check` has passed it. Raises UserError: unknown architecture,
    missing or truncated shard, a missing, unexpected or ill-shaped tensor, weights that are not floating point or do not fit
    `dtype`, too small a disk, `out_dir` taken.

    Not carried: buffers that follow from the configuration (rotary frequencies, numbers of positions) and what Gemma 3's language
    model is wrapped with. A copy of a tied embedding under the output's name is carried as the embedding, and written again by
    an export.
    """
    hf_dir = Path(hf_dir)
    config = read_config(hf_dir)
    architecture, senses = families.architecture(config), senses_of(config)
    target = parse(dtype)
    stored = safetensors_io.open_folder(hf_dir)
    family = with_senses(families.family_of(config), architecture, senses, stored)
    prefix = families.base_prefix(family, stored)
    names = tensor_names(family, architecture, stored, prefix, hf_dir)
    tensors = _plan(family, architecture, stored, prefix, target, hf_dir)

    key = fingerprint(
        _files(hf_dir, stored), "hf_to_nemo", dist_checkpoint.LIMITS, {key: (t.shape, t.dtype) for key, t in tensors.items()}
    )
    with resumable_folder(out_dir, key) as unfinished, content_hash(_files(hf_dir, stored)) as digest:
        folder, weights = unfinished.path, unfinished.path / nemo_folder.WEIGHTS
        dist_checkpoint.write(weights, tensors, _extra_states(family, architecture), progress, workers, unfinished)
        _check_written(weights, tensors)
        nemo_folder.copy_tokenizer(hf_dir, folder / nemo_folder.TOKENIZER)
        record = {
            "source": source or str(hf_dir.absolute()),
            "sha256": digest(),
            "dtype": dtype,
            "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}),
            "versions": {package: importlib.metadata.version(package) for package in ("torch", "safetensors")},
            "verified": False,
            "hf_config": config,
        }
        if prefix == BARE or senses:
            record["hf_files"] = shards.record(hf_dir, stored, {name: target or stored[name].dtype for name in names})
        nemo_folder.write_description(folder, architecture, record, senses)
        unfinished.kept = True
        if check:
            nemo_folder.write_description(folder, architecture, record | {"verified": check(folder)}, senses)
    return Path(out_dir)


def read_config(hf_dir: Path) -> dict:
    """The folder's config.json; UserError if it is missing or not JSON."""
    file = hf_dir / "config.json"
    if not file.is_file():
        raise UserError(f"{hf_dir} is not a Hugging Face model folder: it has no config.json")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{file} is not a JSON object")
    return config


def megatron_shape(row: Row, architecture: Architecture) -> tuple[int, ...]:
    """The shape of one Megatron tensor of a row, without the axes along which a checkpoint stacks them."""
    shapes = [families.shape(symbols, architecture) for symbols in row.hf.values()]
    narrow = [torch.empty(rows, *[1] * len(columns), dtype=torch.uint8) for rows, *columns in shapes]  # layouts move rows
    return (len(row.layout.merge(architecture, narrow)), *shapes[0][1:])


@contextlib.contextmanager
def content_hash(files: list[Path]) -> Iterator[Callable[[], str]]:
    """Compute the sha256 over names and contents of `files` while the block runs; what it gives waits for the result."""
    stop = threading.Event()

    def digest(file: Path) -> str:
        found, buffer = hashlib.sha256(), bytearray(HASHED_AT_ONCE)
        with open(file, "rb", buffering=0) as stream:
            while not stop.is_set() and (size := stream.readinto(buffer)):
                found.update(memoryview(buffer)[:size])
        return f"{file.name} {found.hexdigest()}"

    with ThreadPoolExecutor(2) as pool:
        lines = [pool.submit(digest, file) for file in files]
        try:
            yield lambda: hashlib.sha256("\n".join(line.result() for line in lines).encode()).hexdigest()
        finally:
            stop.set()


def _files(hf_dir: Path, tensors: Mapping[str, TensorInfo]) -> list[Path]:
    return [hf_dir / "config.json", *safetensors_io.files_of(tensors)]


def _plan(
    family: Family,
    architecture: Architecture,
    source: Mapping[str, TensorInfo],
    prefix: str,
    dtype: torch.dtype | None,
    hf_dir: Path,
) -> dict[str, StoredTensor]:
    """{key: tensor} of the checkpoint, each chunk ready to be read; refuses a source that does not fit the architecture."""
    tensors = {}
    for row in family.rows_of(architecture):
        inputs = [dict(row_tensors(row, index, architecture, source, prefix, hf_dir)) for index in row.indices(architecture)]
        found = {info.dtype for infos in inputs for info in infos.values()}
        stored = dtype or functools.reduce(torch.promote_types, found)
        shape = megatron_shape(row, architecture)
        axes = tuple(row.axes(architecture).values())
        tensor = StoredTensor((*axes, *shape), stored)
        for index, infos in zip(row.indices(architecture), inputs, strict=True):
            read = functools.partial(_read, row, architecture, infos, stored)
            offset = (*index.values(), *[0] * len(shape))
            tensor.chunks.append(Chunk(offset, (*[1] * len(axes), *shape), read))
        tensors[KEY_PREFIX + row.key] = tensor
    return tensors


def row_tensors(
    row: Row, index: dict[str, int], architecture: Architecture, source: Mapping[str, TensorInfo], prefix: str, hf_dir: Path
) -> Iterator[tuple[str, TensorInfo]]:
    """Names of the Hugging Face tensors of a row and where they lie, checked for shape and kind."""
    for canonical, symbols in row.hf.items():
        name = families.hf_name(canonical, prefix).format(**index)
        info, expected = source[name], families.shape(symbols, architecture)
        if info.shape != expected:
            raise UserError(f"{hf_dir}: tensor {name} has shape {list(info.shape)}, config.json asks for {list(expected)}")
        if info.dtype not in DTYPES.values():
            kind = str(info.dtype).removeprefix("torch.")
            raise UserError(f"{hf_dir}: tensor {name} is {kind}; only {', '.join(DTYPES)} convert (is the checkpoint quantized?)")
        yield name, info


def _read(row: Row, architecture: Architecture, infos: Mapping[str, TensorInfo], dtype: torch.dtype) -> torch.Tensor:
    return row.layout.merge(architecture, [cast(info.read(), dtype, name) for name, info in infos.items()])


def tensor_names(
    family: Family, architecture: Architecture, source: Mapping[str, TensorInfo], prefix: str, hf_dir: Path
) -> list[str]:
    """The tensors of `source` that convert. Refuses missing and unexpected ones; a copy of a tied embedding under the output's
    name is accepted if equal."""
    expected = {
        families.hf_name(canonical, prefix).format(**index)
        for row in family.rows_of(architecture)
        for index in row.indices(architecture)
        for canonical in row.hf
    }
    if missing := sorted(expected - set(source)):
        raise UserError(f"{hf_dir} lacks {len(missing)} of its {len(expected)} tensors, first {missing[0]}")
    unexpected = {name for name in source if name not in expected and not any(part in name for part in family.ignored)}
    output = families.hf_name("lm_head.weight", prefix)
    if architecture.share_embeddings_and_output_weights and output in unexpected:
        embedding = families.hf_name("model.embed_tokens.weight", prefix)
        if not torch.equal(source[output].read(), source[embedding].read()):
            raise UserError(f"{hf_dir} has {output} that differs from {embedding}, but config.json says tie_word_embeddings")
        unexpected.discard(output)
        expected.add(output)
    if unexpected:
        raise UserError(
            f"{hf_dir} has {len(unexpected)} tensors that a {family.name} of its config.json has not, first {min(unexpected)}"
        )
    return sorted(expected)


def _check_written(weights: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Read the metadata back: every tensor with its shape, its chunks within the files."""
    found = {key: (tensor.shape, tensor.dtype) for key, tensor in dist_checkpoint.read(weights).items()}
    if found != {key: (tensor.shape, tensor.dtype) for key, tensor in tensors.items()}:
        raise RunError(f"{weights} does not read back as it was written")


def _extra_states(family: Family, architecture: Architecture) -> dict[str, torch.Tensor]:
    """Empty states of Transformer Engine's modules, without which a loader reports missing keys.

    Transformer Engine keeps FP8 scales there; an empty byte tensor says there are none.
    """
    modules = {row.megatron.rsplit(".", 1)[0] for row in family.rows_of(architecture) if not row.megatron.startswith("senses.")}
    modules -= {"embedding.word_embeddings", "output_layer", "decoder.layers.{i}.mlp.router"}  # Megatron's own, without state
    modules.add("decoder.layers.{i}.self_attention.core_attention")
    states = {}
    for row in (Row({}, f"{module}._extra_state") for module in sorted(modules)):
        sizes = ".".join(map(str, row.axes(architecture).values())) or "1"
        for index in row.indices(architecture):
            position = ".".join(map(str, index.values())) or "0"
            states[f"{KEY_PREFIX}{row.key}/shard_{position}_{sizes}"] = torch.empty(0, dtype=torch.uint8)
    return states
