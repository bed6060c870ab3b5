"""One table per GGUF architecture, for both directions: its metadata keys, its tensors' names and how llama.cpp stores them.

Names and keys are those of the `gguf` package (`constants.py`, `tensor_mapping.py`). What llama.cpp's convert_hf_to_gguf.py
does to values, and is undone here: it interleaves the rotary halves of a Llama's query and key rows, stores Gemma's norms as
gamma instead of gamma - 1, and replaces RoPE scaling by one divisor a frequency. What llama.cpp takes for granted (Gemma's
attention scale, for example) is checked on the way out, so that a model it would run differently is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from conversion.gguf.file import GGUFFile, GGUFTensor
from nemo_ext.architecture import Architecture, LongRope, RopeScaling, SlidingWindow
from nemo_ext.errors import UserError

if TYPE_CHECKING:
    import numpy
    import torch

LAYER = "model.layers.{i}."

# Hugging Face name -> GGUF name, both without ".weight" or ".bias"; {i} is the layer
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "model.final_layernorm": "output_norm",
    "lm_head": "output",
    f"{LAYER}input_layernorm": "blk.{i}.attn_norm",
    f"{LAYER}self_attn.q_proj": "blk.{i}.attn_q",
    f"{LAYER}self_attn.k_proj": "blk.{i}.attn_k",
    f"{LAYER}self_attn.v_proj": "blk.{i}.attn_v",
    f"{LAYER}self_attn.qkv_proj": "blk.{i}.attn_qkv",
    f"{LAYER}self_attn.q_norm": "blk.{i}.attn_q_norm",
    f"{LAYER}self_attn.k_norm": "blk.{i}.attn_k_norm",
    f"{LAYER}self_attn.o_proj": "blk.{i}.attn_output",
    f"{LAYER}self_attn.dense": "blk.{i}.attn_output",
    f"{LAYER}post_attention_layernorm": "blk.{i}.ffn_norm",
    f"{LAYER}mlp.gate_proj": "blk.{i}.ffn_gate",
    f"{LAYER}mlp.up_proj": "blk.{i}.ffn_up",
    f"{LAYER}mlp.gate_up_proj": "blk.{i}.ffn_up",
    f"{LAYER}mlp.down_proj": "blk.{i}.ffn_down",
    f"{LAYER}mlp.fc1": "blk.{i}.ffn_up",
    f"{LAYER}mlp.fc2": "blk.{i}.ffn_down",
}
GEMMA_NAMES = NAMES | {
    f"{LAYER}post_attention_layernorm": "blk.{i}.post_attention_norm",
    f"{LAYER}pre_feedforward_layernorm": "blk.{i}.ffn_norm",
    f"{LAYER}post_feedforward_layernorm": "blk.{i}.post_ffw_norm",
}
LLAMA3_FACTORS = "rope_freqs.weight"
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
PER_HEAD_NORMS = "StableLM's norms of each head's queries and keys (the 12B) do not convert to or from GGUF"
OUTPUT = "output.weight"  # absent where the embedding is tied


class Keys:
    """The metadata of one architecture: `keys("block_count")` is `llama.block_count`."""

    def __init__(self, file: GGUFFile) -> None:
        self.file, self.name = file, file.metadata.get("general.architecture")

    def get(self, key: str, default: Any = None) -> Any:
        return self.file.metadata.get(f"{self.name}.{key}", default)

    def __call__(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise UserError(f"{self.file.path} lacks {self.name}.{key}")
        return value

    def decimal(self, key: str, default: float | None = None) -> float:
        """The shortest decimal that is the same float32: GGUF's 9.999999747378752e-06 was 1e-05."""
        import numpy

        return float(str(numpy.float32(self(key) if default is None else self.get(key, default))))


def _nothing(keys: Keys, common: dict[str, Any]) -> dict[str, Any]:
    return {}


def _no_keys(a: Architecture) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class GGUFArchitecture:
    """Everything the conversion knows of one `general.architecture`."""

    name: str
    families: tuple[str, ...]  # those of Architecture.family that are written so; the first is what is read
    read: Callable[[Keys, dict[str, Any]], dict[str, Any]] = _nothing  # fields of Architecture, given the common ones
    write: Callable[[Architecture], dict[str, Any]] = _no_keys  # metadata beyond the common; refuses what llama.cpp cannot do
    names: Mapping[str, str] = field(default_factory=lambda: NAMES)
    interleaved: bool = False  # query and key rows: pairs (2j, 2j+1) for Hugging Face's (j, j + d/2)
    norm_offset: float = 0.0  # stored minus Hugging Face's value
    partial_rotary: bool = False
    layer_norm: bool = False  # LayerNorm instead of RMSNorm

    @property
    def epsilon(self) -> str:
        """The metadata key of the norms' epsilon."""
        return "attention.layer_norm_epsilon" if self.layer_norm else "attention.layer_norm_rms_epsilon"

    def tensor_name(self, hf_name: str) -> str:
        """ "model.layers.{i}.mlp.up_proj.weight" -> "blk.{i}.ffn_up.weight"."""
        stem, kind = hf_name.rsplit(".", 1)
        return f"{self.names[stem]}.{kind}"

    def to_hf(self, hf_name: str, weight: torch.Tensor, a: Architecture) -> torch.Tensor:
        """A stored tensor, fp32, in Hugging Face's order of rows and convention of norms."""
        if self.interleaved and _rotates(hf_name):
            weight = weight.view(-1, a.kv_channels // 2, 2, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)
        return (weight.double() - self.norm_offset).float() if self.norm_offset and _is_norm(hf_name) else weight

    def from_hf(self, hf_name: str, weight: torch.Tensor, a: Architecture) -> torch.Tensor:
        """The inverse of `to_hf`; a norm becomes fp32 and is rounded once."""
        if self.interleaved and _rotates(hf_name):
            weight = weight.view(-1, 2, a.kv_channels // 2, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)
        return (weight.double() + self.norm_offset).float() if self.norm_offset and _is_norm(hf_name) else weight


def _rotates(hf_name: str) -> bool:
    return hf_name.endswith(("q_proj.weight", "k_proj.weight"))


def _is_norm(hf_name: str) -> bool:
    return hf_name.endswith("norm.weight")


def read_architecture(file: GGUFFile) -> tuple[GGUFArchitecture, Architecture]:
    """The table and the shape of a GGUF model, from its metadata and the shape of its embedding.

    Raises UserError for an architecture that has no table (listing the known), for a file without tensors, for a mixture of
    experts, and for what the tables do not cover.
    """
    keys = Keys(file)
    table = ARCHITECTURES.get(keys.name)
    if table is None:
        known = ", ".join(ARCHITECTURES)
        raise UserError(f"{file.path}: the GGUF's architecture is {keys.name!r}, which is not read; known: {known}")
    if not file.tensors:
        raise UserError(f"{file.path} holds no tensors (a vocabulary only)")
    if keys.get("expert_count"):
        raise UserError(f"{file.path} is a mixture of experts; only dense models are read")
    if "token_embd.weight" not in file.tensors:
        raise UserError(f"{file.path} lacks tensor token_embd.weight")
    try:
        common = _common(keys, table)
        fields = common | table.read(keys, common)
        return table, Architecture(family=table.families[0], **fields)
    except (TypeError, ValueError) as error:
        raise UserError(f"{file.path}: the metadata do not describe a {keys.name} model: {error}") from error


def _common(keys: Keys, table: GGUFArchitecture) -> dict[str, Any]:
    heads, hidden = keys("attention.head_count"), keys("embedding_length")
    head_dim = keys.get("attention.key_length", hidden // heads)
    if keys.get("attention.value_length", head_dim) != head_dim:
        raise UserError(f"{keys.file.path} has values of another width than its keys, which no {keys.name} of Hugging Face has")
    rotated = keys.get("rope.dimension_count", head_dim)
    if rotated != head_dim and not table.partial_rotary:
        raise UserError(f"{keys.file.path} rotates only a part of each head, which no {keys.name} of Hugging Face does")
    fields = {
        "num_layers": keys("block_count"),
        "hidden_size": hidden,
        "ffn_hidden_size": keys("feed_forward_length"),
        "num_attention_heads": heads,
        "num_query_groups": keys.get("attention.head_count_kv", heads),
        "vocab_size": keys.file.tensors["token_embd.weight"].shape[0],
        "kv_channels": head_dim,
        "max_position_embeddings": keys("context_length"),
        "layernorm_epsilon": keys.decimal(table.epsilon),
        "rotary_base": keys.decimal("rope.freq_base", 10_000.0),
        "rotary_percent": rotated / head_dim,
        "share_embeddings_and_output_weights": OUTPUT not in keys.file.tensors,
    }
    if lists := [key for key in ("num_attention_heads", "num_query_groups", "ffn_hidden_size") if isinstance(fields[key], list)]:
        raise UserError(f"{keys.file.path} has layers of different {lists[0]}; only uniform ones are read")
    return fields


def write_metadata(a: Architecture) -> tuple[GGUFArchitecture, dict[str, Any]]:
    """The table and the metadata (without tokenizer) of an architecture; integers become uint32, floats float32.

    Raises UserError for a family that llama.cpp has no architecture for, listing the others, and for options of a family that
    llama.cpp does not have.
    """
    table = next((table for table in ARCHITECTURES.values() if a.family in table.families), None)
    if table is None:
        known = ", ".join(family for table in ARCHITECTURES.values() for family in table.families)
        raise UserError(f"{a.family} is not written as GGUF; known: {known}")
    keys = {
        "block_count": a.num_layers,
        "context_length": a.max_position_embeddings,
        "embedding_length": a.hidden_size,
        "feed_forward_length": a.ffn_hidden_size,
        "attention.head_count": a.num_attention_heads,
        "attention.head_count_kv": a.num_query_groups,
        "attention.key_length": a.kv_channels,
        "attention.value_length": a.kv_channels,
        "rope.freq_base": float(a.rotary_base),
        table.epsilon: float(a.layernorm_epsilon),
        "vocab_size": a.vocab_size,
        "rope.dimension_count": int(a.rotary_percent * a.kv_channels),  # cut off as transformers does
    }
    return table, {f"{table.name}.{key}": value for key, value in (keys | table.write(a)).items()}


def rope_tensors(a: Architecture) -> dict[str, numpy.ndarray]:
    """RoPE scaling as llama.cpp has it: divisors of the frequencies, float32 `[rotated dimensions / 2]`."""
    import numpy

    if isinstance(a.rope_scaling, LongRope):
        long, short = (numpy.asarray(f, numpy.float32) for f in (a.rope_scaling.long_factor, a.rope_scaling.short_factor))
        return {LONG_FACTORS: long, SHORT_FACTORS: short}
    if isinstance(a.rope_scaling, RopeScaling):
        return {LLAMA3_FACTORS: _llama3_factors(a.rope_scaling, a.rotary_base, a.kv_channels).astype(numpy.float32)}
    return {}


def _llama3_factors(scaling: RopeScaling, base: float, head_dim: int) -> numpy.ndarray:
    """By what Llama 3's scaling divides each of the `head_dim / 2` frequencies, fp64 (transformers' modeling_rope_utils)."""
    import numpy

    wavelength = 2 * math.pi * base ** (numpy.arange(0, head_dim, 2) / head_dim)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = ((scaling.original_max_position_embeddings / wavelength - low) / (high - low)).clip(0, 1)
    return 1 / ((1 - smooth) / scaling.factor + smooth)


def _read_llama(keys: Keys, common: dict[str, Any]) -> dict[str, Any]:
    """Llama 3's RoPE scaling from its divisors: the parameters that give them, the published ones first."""
    import numpy

    _plain_rope(keys)
    stored = keys.file.tensors.get(LLAMA3_FACTORS)
    if stored is None:
        return {}
    found = stored.values().astype(numpy.float64)
    for original in (8192, *(2**n for n in range(4, 21))):
        scaling = RopeScaling(float(str(found.max().astype(numpy.float32))), 1.0, 4.0, original)
        factors = _llama3_factors(scaling, common["rotary_base"], common["kv_channels"])
        if found.shape == factors.shape and numpy.allclose(found, factors, rtol=1e-4):
            return {"rope_scaling": scaling}
    raise UserError(f"{keys.file.path}: {LLAMA3_FACTORS} are not those of Llama 3's RoPE scaling")


def _plain_rope(keys: Keys, *allowed: str) -> str:
    kind = keys.get("rope.scaling.type") or "none"
    if kind not in ("none", *allowed):
        raise UserError(f"{keys.file.path} scales RoPE by {kind!r}, which is not read for {keys.name}")
    return kind


def _read_qwen2(keys: Keys, common: dict[str, Any]) -> dict[str, Any]:
    _plain_rope(keys)
    return {"add_qkv_bias": True}


def _read_qwen3(keys: Keys, common: dict[str, Any]) -> dict[str, Any]:
    _plain_rope(keys)
    return {"qk_layernorm": True}


def _read_phi3(keys: Keys, common: dict[str, Any]) -> dict[str, Any]:
    """LongRoPE's factors are tensors; a window of 0 is none."""
    _plain_rope(keys, "longrope")
    fields: dict[str, Any] = {}
    if window := keys.get("attention.sliding_window"):
        fields["sliding_window"] = SlidingWindow(window, every=0, rotary_base_local=None)
    stored: list[GGUFTensor] = [keys.file.tensors[name] for name in (SHORT_FACTORS, LONG_FACTORS) if name in keys.file.tensors]
    if stored:
        factors = [tuple(float(str(value)) for value in tensor.values()) for tensor in stored]
        fields["rope_scaling"] = LongRope(*factors, keys("rope.scaling.original_context_length"))
    return fields


def _write_phi3(a: Architecture) -> dict[str, Any]:
    keys: dict[str, Any] = {"attention.sliding_window": a.sliding_window.size if a.sliding_window else 0}
    original = a.max_position_embeddings
    if isinstance(a.rope_scaling, LongRope):
        original = a.rope_scaling.original_max_position_embeddings
        keys["rope.scaling.attn_factor"] = a.rope_scaling.magnitude(a.max_position_embeddings)
    return keys | {"rope.scaling.original_context_length": original}


GEMMA2_27B, GEMMA3_27B = 46, 62  # layers by which llama.cpp knows the models that scale scores by hidden_size / heads


def _gemma_scale(common: Mapping[str, Any], layers_of_27b: int) -> float:
    """The factor that llama.cpp puts on attention scores: it is not in the metadata."""
    is_27b = common["num_layers"] == layers_of_27b
    return (common["hidden_size"] // common["num_attention_heads"] if is_27b else common["kv_channels"]) ** -0.5


def _check_gemma_scale(a: Architecture, layers_of_27b: int) -> None:
    expected = _gemma_scale(vars(a), layers_of_27b)
    if a.softmax_scale is None or not math.isclose(a.softmax_scale, expected, rel_tol=1e-6):
        raise UserError(
            f"the model scales attention scores by {a.softmax_scale} (query_pre_attn_scalar); llama.cpp takes {expected:.6g} "
            f"for a {a.family} of {a.num_layers} layers: it cannot be written as GGUF"
        )


def _read_gemma2(keys: Keys, common: dict[str, Any]) -> dict[str, Any]:
    _plain_rope(keys)
    every = keys.get("attention.sliding_window_pattern", 2)
    return {
        "softmax_scale": _gemma_scale(common, GEMMA2_27B),
        "attn_logit_softcapping": keys.decimal("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": keys.decimal("final_logit_softcapping", 30.0),
        "sliding_window": SlidingWindow(keys.get("attention.sliding_window", 4096), every, rotary_base_local=None),
    }


def _write_gemma2(a: Architecture) -> dict[str, Any]:
    _check_gemma_scale(a, GEMMA2_27B)
    window = a.sliding_window
    if window is None or window.every != 2 or not a.attn_logit_softcapping or not a.final_logit_softcapping:
        raise UserError("llama.cpp's gemma2 has soft caps and a sliding window in every second layer; this model has not")
    return {
        "attention.sliding_window": window.size,
        "attn_logit_softcapping": a.attn_logit_softcapping,
        "final_logit_softcapping": a.final_logit_softcapping,
    }


def _read_gemma3(keys: Keys, common: dict[str, Any]) -> dict[str, Any]:
    if keys.get("final_logit_softcapping") or keys.get("attn_logit_softcapping"):
        raise UserError(f"{keys.file.path} has soft caps, which Gemma 3 has not")
    linear = _plain_rope(keys, "linear") == "linear"
    window = SlidingWindow(
        size=keys("attention.sliding_window"),
        every=keys.get("attention.sliding_window_pattern", 6),
        rotary_base_local=keys.decimal("rope.freq_base_swa", 10_000.0),
        global_rope_factor=keys.decimal("rope.scaling.factor") if linear else 1.0,
    )
    base = keys.decimal("rope.freq_base", 1_000_000.0)
    scale = _gemma_scale(common, GEMMA3_27B)
    return {"qk_layernorm": True, "rotary_base": base, "softmax_scale": scale, "sliding_window": window}


def _write_gemma3(a: Architecture) -> dict[str, Any]:
    """Keys for llama.cpp's defaults are left out, as its converter does."""
    _check_gemma_scale(a, GEMMA3_27B)
    window = a.sliding_window
    if window is None or not a.share_embeddings_and_output_weights:
        raise UserError("llama.cpp's gemma3 has a sliding window and tied embeddings; this model has not")
    keys: dict[str, Any] = {"attention.sliding_window": window.size}
    if window.every != 6:
        keys["attention.sliding_window_pattern"] = window.every
    if window.rotary_base_local != 10_000.0:
        keys["rope.freq_base_swa"] = window.rotary_base_local
    if window.global_rope_factor != 1.0:
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": window.global_rope_factor}
    return keys


def _read_stablelm(keys: Keys, common: dict[str, Any]) -> dict[str, Any]:
    _plain_rope(keys)
    if "blk.0.attn_q_norm.weight" in keys.file.tensors:
        raise UserError(f"{keys.file.path}: {PER_HEAD_NORMS}")
    return {
        "normalization": "LayerNorm",
        "add_qkv_bias": "blk.0.attn_q.bias" in keys.file.tensors,
        "parallel_residual": "blk.0.ffn_norm.weight" not in keys.file.tensors,
    }


def _write_stablelm(a: Architecture) -> dict[str, Any]:
    if a.qk_layernorm_per_head:
        raise UserError(PER_HEAD_NORMS)
    return {"use_parallel_residual": a.parallel_residual}


def _read_phi2(keys: Keys, common: dict[str, Any]) -> dict[str, Any]:
    _plain_rope(keys)
    return {
        "normalization": "LayerNorm",
        "gated_linear_unit": False,
        "add_bias_linear": True,
        "add_output_bias": True,
        "parallel_residual": True,
    }


ARCHITECTURES = {
    table.name: table
    for table in (
        GGUFArchitecture("llama", ("llama", "mistral"), _read_llama, interleaved=True),
        GGUFArchitecture("qwen2", ("qwen2",), _read_qwen2),
        GGUFArchitecture("qwen3", ("qwen3",), _read_qwen3),
        GGUFArchitecture("phi2", ("phi",), _read_phi2, partial_rotary=True, layer_norm=True),
        GGUFArchitecture("phi3", ("phi3",), _read_phi3, _write_phi3, partial_rotary=True),
        GGUFArchitecture("gemma2", ("gemma2",), _read_gemma2, _write_gemma2, GEMMA_NAMES, norm_offset=1.0),
        GGUFArchitecture("gemma3", ("gemma3",), _read_gemma3, _write_gemma3, GEMMA_NAMES, norm_offset=1.0),
        GGUFArchitecture("stablelm", ("stablelm",), _read_stablelm, _write_stablelm, partial_rotary=True, layer_norm=True),
    )
}
