"""GGUF files out: a Hugging Face folder becomes a file that llama.cpp runs, f32, f16, bf16, Q8_0, Q4_0 or Q4_K.

The `gguf` package writes the format and quantizes; tensors are read, stored and, from the finished file, read back and compared
one at a time. As in llama.cpp's own converter vectors stay f32, and a matrix whose rows the blocks of 32 do not divide f16.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import (
    GGML_QUANT_SIZES,
    GGML_QUANT_VERSION,
    GGUF_DEFAULT_ALIGNMENT,
    GGMLQuantizationType,
    GGUFWriter,
    LlamaFileType,
    Metadata,
    quantize,
    size_label,
)

from conversion import families, hf_to_nemo, safetensors_io
from conversion.atomic import fingerprint, resumable_file
from conversion.gguf import file as gguf_file
from conversion.gguf import q4_k
from conversion.gguf import vocabulary as gguf_vocabulary
from conversion.gguf.architectures import rope_tensors, write_metadata
from conversion.multimodal import senses_of
from nemo_ext.architecture import Architecture
from nemo_ext.errors import RunError, UserError

Progress = Callable[[int, int, str], None]

F32, F16, BF16, Q8_0, Q4_0, Q4_K = (
    getattr(GGMLQuantizationType, name) for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_K")
)
KINDS = {
    "f32": (F32, LlamaFileType.ALL_F32),
    "f16": (F16, LlamaFileType.MOSTLY_F16),
    "bf16": (BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (Q4_0, LlamaFileType.MOSTLY_Q4_0),
    "q4_k": (Q4_K, LlamaFileType.MOSTLY_Q4_K_S),
}
# The largest code of a block's scale, and by how many steps a value may be off: Q4_0's codes go from -8, which the largest value
# gets, to 7, so that its negative is a whole step off. Q4_K's scales are fitted, and rounded to six bits of the largest in a
# super-block: a step of that one's block.
_BLOCKS = {Q8_0: (127, 0.5), Q4_0: (8, 1.0)}
_CASTS = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}


@dataclass(frozen=True)
class Written:
    """A finished file, the largest absolute difference of a stored weight from its source, and what to know about it."""

    file: Path
    largest_error: float
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Tensor:
    """What is stored under a name: `load` gives `shape` in GGUF's order of rows, in its source's dtype."""

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    load: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        block, block_bytes = GGML_QUANT_SIZES[self.kind]
        return math.prod(self.shape) // block * block_bytes

    def rows(self) -> Iterator[np.ndarray]:
        """The source's values as fp32, some rows at a time, `[rows, columns]` (a vector is one row)."""
        tensor = self.load()
        tensor = tensor.reshape(-1, tensor.shape[-1])
        for part in tensor.split(max(1, gguf_file.CHUNK_ELEMENTS // tensor.shape[-1])):
            yield part.float().numpy()


def from_hf(hf_dir: Path, file: Path, kind: str = "f16", progress: Progress | None = None, name: str | None = None) -> Written:
    """Write the Hugging Face model in `hf_dir` as the GGUF file `file`.

    `kind`, one of `KINDS`, is that of the matrices. `progress(done, total, "tensors")` counts every tensor twice, when it is
    stored and when it is read back. `name` becomes general.name; by default it is guessed from the model card and the folder. The
    file appears only when it is complete and equals its source: exactly after a cast, within half a step of each block for Q8_0,
    within a step for Q4_0 and Q4_K; writing that was killed goes on where it was. Raises UserError for a family or tokenizer that
    llama.cpp does not have, tensors that do not fit config.json or `kind`, a `file` that is there, no space.
    """
    hf_dir, file = Path(hf_dir), Path(file)
    model, plan = _plan(hf_dir, kind)
    metadata, notes = _metadata(hf_dir, model, kind)
    card = _model_card(hf_dir, model, name)
    total = 2 * len(plan)

    def report(done: int) -> None:
        if progress:
            progress(done, total, "tensors")

    sources = sorted(path for path in hf_dir.iterdir() if path.is_file())
    with resumable_file(file, fingerprint(sources, "hf_to_gguf", kind, name, GGML_QUANT_VERSION)) as unfinished:
        partial = unfinished.path / unfinished.final.name
        unfinished.check_space({partial: sum(tensor.nbytes for tensor in plan.values())})
        if not unfinished.finished(partial):
            pieces = [functools.partial(_encode, key, tensor) for key, tensor in plan.items()]
            for done in unfinished.grow(partial, lambda path: _begin(path, card, metadata, plan), pieces):
                report(done)
            unfinished.finish(partial)
        error = _compare(partial, plan, lambda done: report(len(plan) + done))
    return Written(file, error, tuple(notes))


def check(hf_dir: Path, file: Path, kind: str) -> float:
    """The largest absolute difference between a GGUF file and the Hugging Face model that it was written from as `kind`.

    Raises RunError naming the first tensor that is missing, of another shape or type, or differs by more than storing explains.
    """
    return _compare(Path(file), _plan(Path(hf_dir), kind)[1], lambda done: None)


def _plan(hf_dir: Path, kind: str) -> tuple[Architecture, dict[str, _Tensor]]:
    """The model and {GGUF name: tensor}; UserError for a source that cannot be written."""
    if kind not in KINDS:
        raise UserError(f"kind={kind} is not one of {', '.join(KINDS)}")
    config = hf_to_nemo.read_config(hf_dir)
    model, family = families.architecture(config), families.family_of(config)
    if senses_of(config):
        raise UserError(f"{hf_dir} sees or hears: a GGUF file holds a text model alone")
    table, _ = write_metadata(model)
    source = safetensors_io.open_folder(hf_dir)
    prefix = families.base_prefix(family, source)
    hf_to_nemo.tensor_names(family, model, source, prefix, hf_dir)
    plan = {}
    for row in family.rows_of(model):
        for index in row.indices(model):
            infos = hf_to_nemo.row_tensors(row, index, model, source, prefix, hf_dir)
            for canonical, (_, info) in zip(row.hf, infos, strict=True):
                load = functools.partial(_load, table.from_hf, canonical, info, model)
                name = table.tensor_name(canonical).format(**index)
                plan[name] = _Tensor(_stored_kind(name, info.shape, kind), info.shape, load)
    for name, factors in rope_tensors(model).items():
        plan[name] = _Tensor(F32, factors.shape, functools.partial(torch.from_numpy, factors))
    return model, plan


def _load(from_hf: Callable, name: str, info: safetensors_io.TensorInfo, model: Architecture) -> torch.Tensor:
    return from_hf(name, info.read(), model)


def _stored_kind(name: str, shape: tuple[int, ...], kind: str) -> GGMLQuantizationType:
    asked = KINDS[kind][0]
    if len(shape) == 1:
        return F32
    if shape[-1] % GGML_QUANT_SIZES[asked][0] == 0:
        return asked
    if asked == Q4_K:
        raise UserError(f"{name} has rows of {shape[-1]}, q4_k has blocks of {q4_k.SUPER_BLOCK}: write q4_0 or q8_0")
    return F16


def _metadata(hf_dir: Path, model: Architecture, kind: str) -> tuple[dict[str, Any], list[str]]:
    """All metadata but the general ones that the model card gives, and where llama.cpp will differ."""
    config = hf_to_nemo.read_config(hf_dir)
    vocabulary, notes = gguf_vocabulary.read(hf_dir, {**config.get("text_config", {}), **config, "vocab_size": model.vocab_size})
    if model.sliding_window and not model.sliding_window.every:
        notes.append(f"llama.cpp attends to the whole text, the model to {model.sliding_window.size} tokens: longer ones differ")
    general = {"general.file_type": int(KINDS[kind][1]), "general.quantization_version": GGML_QUANT_VERSION}
    return write_metadata(model)[1] | general | vocabulary, notes


def _model_card(hf_dir: Path, model: Architecture, name: str | None) -> Metadata:
    """Name, size, licence and what else README.md, config.json and the folder's name tell."""
    count = model.num_parameters()
    card = Metadata.load(None, hf_dir, name, count)
    card.size_label = size_label(count, count, 0, 0)
    return card


def _begin(file: Path, card: Metadata, metadata: Mapping[str, Any], plan: Mapping[str, _Tensor]) -> None:
    """Write what stands before the tensors' bytes."""
    architecture = next(key for key in metadata if key.endswith(".block_count")).split(".")[0]
    writer = GGUFWriter(file, architecture)
    try:
        writer.add_type("model")
        card.set_gguf_meta_model(writer)
        for key, value in metadata.items():
            _add(writer, key, value)
        for name, tensor in plan.items():
            writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), tensor.nbytes, tensor.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()
    os.truncate(file, _aligned(file.stat().st_size))


def _aligned(size: int) -> int:
    return GGUFWriter.ggml_pad(size, GGUF_DEFAULT_ALIGNMENT)


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    kinds = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
    getattr(writer, f"add_{kinds[type(value)]}")(key, value)


def _encode(name: str, tensor: _Tensor) -> memoryview:
    """The bytes to store, up to where the next tensor begins."""
    stored, start = np.zeros(_aligned(tensor.nbytes), dtype=np.uint8), 0
    for rows in tensor.rows():
        if not np.isfinite(rows).all():
            raise UserError(f"{name} has values that are not finite")
        with np.errstate(over="ignore"):
            part = q4_k.quantize(rows) if tensor.kind == Q4_K else quantize(rows, tensor.kind)
        if tensor.kind == F16 and not np.isfinite(part).all():
            raise UserError(f"{name} has values up to {abs(rows).max():.4g}, which f16 cannot hold: write bf16 or f32")
        part = part.reshape(-1).view(np.uint8)
        stored[start : start + part.size] = part
        start += part.size
    return memoryview(stored)


def _compare(file: Path, plan: Mapping[str, _Tensor], report: Callable[[int], None]) -> float:
    found = gguf_file.read(file).tensors
    if set(found) != set(plan):
        raise RunError(f"{file} does not hold the tensors that its source has, first {min(set(found) ^ set(plan))}")
    largest = 0.0
    for done, (name, tensor) in enumerate(plan.items(), 1):
        stored = found[name]
        if (stored.shape, stored.kind) != (tensor.shape, tensor.kind):
            raise RunError(f"{file}: {name} is {stored.shape} of type {stored.kind}, not {tensor.shape} {tensor.kind.name}")
        for expected, values in zip(tensor.rows(), stored.chunks(), strict=True):
            error = abs(values - expected)
            if not (error <= _allowed(expected, tensor.kind)).all():
                raise RunError(f"{file}: {name} differs from its source by {error.max():.3g}: the file is not what was written")
            largest = max(largest, float(error.max()))
        report(done)
    return largest


def _allowed(source: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """By how much a stored value may differ: what the cast does, or in a block the steps of its scale in fp16."""
    if kind in _CASTS:
        weights = torch.from_numpy(source)
        return (weights.to(_CASTS[kind]).float() - weights).abs().numpy()
    if kind == Q4_K:
        blocks = source.reshape(-1, q4_k.SUPER_BLOCK // q4_k.BLOCK, q4_k.BLOCK)
        step = (blocks.max(2).clip(0) - blocks.min(2).clip(None, 0)).max(1) / q4_k.LARGEST
        return np.repeat(step + np.float32(q4_k.ROUNDING), q4_k.SUPER_BLOCK).reshape(source.shape)
    blocks = source.reshape(-1, GGML_QUANT_SIZES[kind][0])
    largest, steps = _BLOCKS[kind]
    scale = abs(blocks).max(axis=1, keepdims=True) / np.float32(largest)
    rounding = abs(scale.astype(np.float16).astype(np.float32) - scale) * largest
    return np.broadcast_to(scale * np.float32(steps + 1e-4) + rounding, blocks.shape).reshape(source.shape)
