"""Hugging Face checkpoint -> NeMo 2 checkpoint, streaming: no model is built and no GPU is needed.

The result loads in NeMo (`nl.RestoreConfig(path=..., load_artifacts=False)`) at any tensor, pipeline and virtual-pipeline
layout. Its keys are those NeMo itself writes: the layers of a homogeneous decoder are stacked into one tensor with the layer
as a first axis, `module.decoder.layers.mlp.linear_fc2.weight` of shape [layers, h, ffn]. (A decoder that Megatron calls
heterogeneous - `moe_layer_freq` above 1, heterogeneous block specs - has one key per layer instead; no family here is one.)
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from conversion import families, safetensors_io
from conversion.atomic import new_folder
from conversion.dist_checkpoint import Chunk, StoredTensor, write
from conversion.families import Family, Row
from conversion.safetensors_io import TensorInfo
from nemo_ext.architecture import Architecture
from nemo_ext.errors import UserError

Progress = Callable[[int, int, str], None]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip
KEY_PREFIX = "module."  # the attribute of NeMo's GPTModel that holds Megatron's


def convert(hf_dir: Path, out_dir: Path, *, dtype: str | None = None, progress: Progress | None = None, workers: int = 2) -> Path:
    """Convert the Hugging Face folder `hf_dir` into the NeMo folder `out_dir` and return that.

    `dtype` is "float32", "bfloat16", "float16" or None to keep each tensor's own. `progress(done, total, "MB")` follows the
    writing, which `workers` threads share, each with one Megatron tensor (of one layer) in memory.

    `out_dir` then has `weights/` (the distributed checkpoint), `architecture.json` (`Architecture.to_dict()`), `tokenizer/`
    (with chat template and generation_config.json) and `conversion.json` (source, sha256 of its weights and configuration, its
    config.json, dtypes, versions), and appears only when all is written. Raises UserError: unknown architecture, missing or
    truncated shard, a missing, unexpected or ill-shaped tensor, weights that are not floating point, `out_dir` taken.
    """
    hf_dir = Path(hf_dir)
    config = read_config(hf_dir)
    architecture, family = families.architecture(config), families.family_of(config)
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype={dtype} is not one of {', '.join(DTYPES)}")
    source = safetensors_io.open_folder(hf_dir)
    tensors = _plan(family, architecture, source, DTYPES[dtype] if dtype else None, hf_dir)

    with new_folder(out_dir) as folder:
        (folder / "weights").mkdir()
        write(folder / "weights", tensors, _extra_states(family, architecture), progress, workers)
        (folder / "architecture.json").write_text(json.dumps(architecture.to_dict(), indent=2) + "\n")
        _copy_tokenizer(hf_dir, folder / "tokenizer")
        record = {
            "source": str(hf_dir.absolute()),
            "sha256": content_hash(hf_dir, source),
            "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}),
            "versions": {package: importlib.metadata.version(package) for package in ("torch", "safetensors")},
            "hf_config": config,
        }
        (folder / "conversion.json").write_text(json.dumps(record, indent=2) + "\n")
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


def content_hash(hf_dir: Path, tensors: Mapping[str, TensorInfo]) -> str:
    """sha256 over the names and contents of config.json and the weight files."""

    def digest(file: Path) -> str:
        with open(file, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    files = [hf_dir / "config.json", *safetensors_io.files_of(tensors)]
    with ThreadPoolExecutor(4) as pool:
        lines = [f"{file.name} {value}" for file, value in zip(files, pool.map(digest, files), strict=True)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _plan(
    family: Family, architecture: Architecture, source: Mapping[str, TensorInfo], dtype: torch.dtype | None, hf_dir: Path
) -> dict[str, StoredTensor]:
    """{key: tensor} of the checkpoint, each chunk ready to be read; refuses a source that does not fit the architecture."""
    prefix = families.base_prefix(family, source)
    rows = family.rows_of(architecture)
    _check_names(family, architecture, source, prefix, hf_dir)
    tensors = {}
    for row in rows:
        inputs = [list(_inputs(row, index, architecture, source, prefix, hf_dir)) for index in row.indices(architecture)]
        stored = dtype or functools.reduce(torch.promote_types, {info.dtype for infos in inputs for info in infos})
        meta = [torch.empty(info.shape, device="meta") for info in inputs[0]]
        shape = tuple(row.layout.merge(architecture, meta).shape)
        axes = tuple(row.axes(architecture).values())
        tensor = StoredTensor((*axes, *shape), stored)
        for index, infos in zip(row.indices(architecture), inputs, strict=True):
            read = functools.partial(_read, row, architecture, infos, stored)
            offset = (*index.values(), *[0] * len(shape))
            tensor.chunks.append(Chunk(offset, (*[1] * len(axes), *shape), read))
        tensors[KEY_PREFIX + row.key] = tensor
    return tensors


def _inputs(
    row: Row, index: dict[str, int], architecture: Architecture, source: Mapping[str, TensorInfo], prefix: str, hf_dir: Path
) -> Iterator[TensorInfo]:
    """Where the Hugging Face tensors of a row lie, checked for shape and kind."""
    for canonical, symbols in row.hf.items():
        name = families.hf_name(canonical, prefix).format(**index)
        info, expected = source[name], families.shape(symbols, architecture)
        if info.shape != expected:
            raise UserError(f"{hf_dir}: tensor {name} has shape {list(info.shape)}, config.json asks for {list(expected)}")
        if info.dtype not in DTYPES.values():
            kind = str(info.dtype).removeprefix("torch.")
            raise UserError(f"{hf_dir}: tensor {name} is {kind}; only {', '.join(DTYPES)} convert (is the checkpoint quantized?)")
        yield info


def _read(row: Row, architecture: Architecture, infos: list[TensorInfo], dtype: torch.dtype) -> torch.Tensor:
    return row.layout.merge(architecture, [info.read().to(dtype) for info in infos])


def _check_names(family: Family, architecture: Architecture, source: Mapping[str, TensorInfo], prefix: str, hf_dir: Path) -> None:
    """Refuse missing and unexpected tensors. A copy of a tied embedding under the output's name is accepted if equal."""
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
    if unexpected:
        raise UserError(
            f"{hf_dir} has {len(unexpected)} tensors that a {family.name} of its config.json has not, first {min(unexpected)}"
        )


def _extra_states(family: Family, architecture: Architecture) -> dict[str, torch.Tensor]:
    """Empty states of Transformer Engine's modules, without which a loader reports missing keys.

    Transformer Engine keeps FP8 scales there; an empty byte tensor says there are none.
    """
    modules = {row.megatron.rsplit(".", 1)[0] for row in family.rows_of(architecture)}
    modules -= {"embedding.word_embeddings", "output_layer"}  # Megatron's own modules, without state
    modules.add("decoder.layers.{i}.self_attention.core_attention")
    states = {}
    for module in sorted(modules):
        key = f"{KEY_PREFIX}{module.replace('.{i}', '')}._extra_state"
        if "{i}" in module:
            shards = [f"shard_{layer}_{architecture.num_layers}" for layer in range(architecture.num_layers)]
        else:
            shards = ["shard_0_1"]
        states |= {f"{key}/{shard}": torch.empty(0, dtype=torch.uint8) for shard in shards}
    return states


def _copy_tokenizer(hf_dir: Path, folder: Path) -> None:
    folder.mkdir()
    for name in TOKENIZER_FILES:
        if (hf_dir / name).is_file():
            shutil.copyfile(hf_dir / name, folder / name)
