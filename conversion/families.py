"""One table per model family, for both directions between Hugging Face and Megatron.

A table's row says which Hugging Face tensors make one Megatron tensor and with which layout. Megatron's names are those of
Transformer Engine's modules, which NeMo's checkpoints have; `{i}` is the layer. Adding a family is one `Family` and one test.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from conversion.layout import FUSED_QKV, GATE_UP, PLAIN, QKV, VOCABULARY, Layout
from nemo_ext.architecture import Architecture, RopeScaling, SlidingWindow
from nemo_ext.errors import UserError

Config = Mapping[str, Any]  # a Hugging Face config.json, or its text part


@dataclass(frozen=True)
class Row:
    """`hf` names and their shapes ("q h": rows by columns, see `shape`) <-> one `megatron` name."""

    hf: Mapping[str, str]
    megatron: str
    layout: Layout = PLAIN
    when: Callable[[Architecture], bool] = lambda architecture: True

    @property
    def is_layer(self) -> bool:
        """Whether there is one per layer (`{i}` in the names)."""
        return "{i}" in self.megatron


def shape(symbols: str, a: Architecture) -> tuple[int, ...]:
    """The shape behind a row's symbols, such as "q h" -> (query width, hidden size)."""
    sizes = {
        "h": a.hidden_size, "ffn": a.ffn_hidden_size, "2ffn": 2 * a.ffn_hidden_size, "vocab": a.vocab_size,
        "q": a.attention_width, "kv": a.kv_width, "qkv": a.attention_width + 2 * a.kv_width, "d": a.kv_channels,
    }  # fmt: skip
    return tuple(sizes[symbol] for symbol in symbols.split())


@dataclass(frozen=True)
class Family:
    """Everything conversion knows of a family: its rows and how its configuration reads and is written."""

    name: str  # Architecture.family
    model_types: tuple[str, ...]  # Hugging Face's model_type; the first is the one written
    causal_lm: str  # Hugging Face's class
    rows: tuple[Row, ...]
    read: Callable[[Config], dict[str, Any]]  # fields of Architecture beyond the common ones; refuses what Megatron cannot do
    write: Callable[[Architecture], dict[str, Any]]  # fields of config.json beyond the common ones
    defaults: Mapping[str, Any] = field(default_factory=dict)  # transformers' values for what a config.json may leave out
    text_config: bool = False  # the language model may be wrapped with a vision part, under text_config
    prefixes: tuple[str, ...] = ("model.",)  # what stands for "model." in the checkpoints of the wrapped form
    ignored: tuple[str, ...] = field(default=(".rotary_emb.inv_freq",))  # parts of names of tensors that are not weights

    def rows_of(self, architecture: Architecture) -> list[Row]:
        """The rows that exist in this architecture (no output projection where embeddings are tied, for example)."""
        return [row for row in self.rows if row.when(architecture)]


# ---------------------------------------------------------------------------------------------------------------- rows

_LAYER = "model.layers.{i}."
_DECODER = "decoder.layers.{i}."


def _untied(a: Architecture) -> bool:
    return not a.share_embeddings_and_output_weights


EMBEDDING = Row({"model.embed_tokens.weight": "vocab h"}, "embedding.word_embeddings.weight", VOCABULARY)
OUTPUT = Row({"lm_head.weight": "vocab h"}, "output_layer.weight", VOCABULARY, when=_untied)
FINAL_NORM = Row({"model.norm.weight": "h"}, "decoder.final_layernorm.weight")
QKV_WEIGHT = Row(
    {
        f"{_LAYER}self_attn.q_proj.weight": "q h",
        f"{_LAYER}self_attn.k_proj.weight": "kv h",
        f"{_LAYER}self_attn.v_proj.weight": "kv h",
    },
    f"{_DECODER}self_attention.linear_qkv.weight",
    QKV,
)
QKV_BIAS = Row(
    {f"{_LAYER}self_attn.q_proj.bias": "q", f"{_LAYER}self_attn.k_proj.bias": "kv", f"{_LAYER}self_attn.v_proj.bias": "kv"},
    f"{_DECODER}self_attention.linear_qkv.bias",
    QKV,
)
QKV_FUSED = Row({f"{_LAYER}self_attn.qkv_proj.weight": "qkv h"}, f"{_DECODER}self_attention.linear_qkv.weight", FUSED_QKV)
ATTENTION_NORM = Row({f"{_LAYER}input_layernorm.weight": "h"}, f"{_DECODER}self_attention.linear_qkv.layer_norm_weight")
ATTENTION_OUTPUT = Row({f"{_LAYER}self_attn.o_proj.weight": "h q"}, f"{_DECODER}self_attention.linear_proj.weight")
Q_NORM = Row({f"{_LAYER}self_attn.q_norm.weight": "d"}, f"{_DECODER}self_attention.q_layernorm.weight")
K_NORM = Row({f"{_LAYER}self_attn.k_norm.weight": "d"}, f"{_DECODER}self_attention.k_layernorm.weight")
MLP_NORM = Row({f"{_LAYER}post_attention_layernorm.weight": "h"}, f"{_DECODER}mlp.linear_fc1.layer_norm_weight")
FC1 = Row(
    {f"{_LAYER}mlp.gate_proj.weight": "ffn h", f"{_LAYER}mlp.up_proj.weight": "ffn h"},
    f"{_DECODER}mlp.linear_fc1.weight",
    GATE_UP,
)
FC1_FUSED = Row({f"{_LAYER}mlp.gate_up_proj.weight": "2ffn h"}, f"{_DECODER}mlp.linear_fc1.weight")
FC2 = Row({f"{_LAYER}mlp.down_proj.weight": "h ffn"}, f"{_DECODER}mlp.linear_fc2.weight")

_LLAMA_ROWS = (EMBEDDING, ATTENTION_NORM, QKV_WEIGHT, ATTENTION_OUTPUT, MLP_NORM, FC1, FC2, FINAL_NORM, OUTPUT)

# Gemma normalises after attention and MLP as well. Its norms store gamma - 1, and so does Megatron with
# layernorm_zero_centered_gamma: the values stay as they are.
_GEMMA3_ROWS = (
    EMBEDDING, ATTENTION_NORM, QKV_WEIGHT, Q_NORM, K_NORM, ATTENTION_OUTPUT,
    Row({f"{_LAYER}post_attention_layernorm.weight": "h"}, f"{_DECODER}self_attention.linear_proj.post_layernorm.weight"),
    Row({f"{_LAYER}pre_feedforward_layernorm.weight": "h"}, f"{_DECODER}mlp.linear_fc1.layer_norm_weight"),
    FC1, FC2,
    Row({f"{_LAYER}post_feedforward_layernorm.weight": "h"}, f"{_DECODER}mlp.linear_fc2.post_layernorm.weight"),
    FINAL_NORM, OUTPUT,
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------- configurations


# transformers' common defaults; sizes of a model are never guessed
_DEFAULTS = {"tie_word_embeddings": False, "initializer_range": 0.02, "rms_norm_eps": 1e-6}


def _refuse(config: Config, key: str, *allowed: Any) -> None:
    """UserError unless the configuration leaves `key` out or gives it an allowed value."""
    if key in config and config[key] is not None and config[key] not in allowed:
        raise UserError(f"config.json has {key}={config[key]!r}; only {' or '.join(map(repr, allowed))} converts to NeMo")


def _rope(config: Config, kind: str = "full_attention") -> dict[str, Any]:
    """RoPE settings in one dictionary, from transformers 4's rope_theta + rope_scaling or 5's rope_parameters."""
    rope = dict(config.get("rope_parameters") or {})
    rope = dict(rope.get(kind, rope))
    rope = rope or dict(config.get("rope_scaling") or {})
    rope.setdefault("rope_type", rope.pop("type", "default"))
    rope.setdefault("rope_theta", config.get("rope_theta", 10_000.0))
    return rope


def _plain_rope(config: Config) -> dict[str, Any]:
    rope = _rope(config)
    _refuse(rope, "rope_type", "default")
    return {"rotary_base": float(rope["rope_theta"])}


def _plain_rope_config(a: Architecture) -> dict[str, Any]:
    return {"rope_theta": a.rotary_base, "rope_scaling": None}


def _no_window(config: Config) -> None:
    """Refuse a sliding window that cuts: Qwen's switch is use_sliding_window, Phi's is the window itself."""
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    if window is not None and window < config["max_position_embeddings"]:
        raise UserError(f"config.json has sliding_window={window}; this family converts to NeMo with full attention only")


def _read_llama(config: Config) -> dict[str, Any]:
    for key in ("attention_bias", "mlp_bias"):
        _refuse(config, key, False)
    _refuse(config, "hidden_act", "silu")
    rope = _rope(config)
    _refuse(rope, "rope_type", "default", "llama3")
    scaling = None
    if rope["rope_type"] == "llama3":
        scaling = RopeScaling(**{f.name: rope[f.name] for f in dataclasses.fields(RopeScaling) if f.name in rope})
    return {"rotary_base": float(rope["rope_theta"]), "rope_scaling": scaling}


def _write_llama(a: Architecture) -> dict[str, Any]:
    scaling = {"rope_type": "llama3"} | dataclasses.asdict(a.rope_scaling) if a.rope_scaling else None
    return {
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rope_theta": a.rotary_base,
        "rope_scaling": scaling,
    }


def _read_qwen2(config: Config) -> dict[str, Any]:
    _refuse(config, "hidden_act", "silu")
    _no_window({"use_sliding_window": False} | dict(config))
    return _plain_rope(config) | {"add_qkv_bias": True}


def _read_qwen3(config: Config) -> dict[str, Any]:
    _refuse(config, "attention_bias", False)
    return _read_qwen2(config) | {"add_qkv_bias": False, "qk_layernorm": True}


def _write_qwen(a: Architecture) -> dict[str, Any]:
    return {"hidden_act": "silu", "use_sliding_window": False} | _plain_rope_config(a)


def _read_phi3(config: Config) -> dict[str, Any]:
    _refuse(config, "hidden_act", "silu")
    _refuse(config, "attention_bias", False)
    _refuse(config, "partial_rotary_factor", 1.0)
    _no_window(config)
    return _plain_rope(config)


def _write_phi3(a: Architecture) -> dict[str, Any]:
    return {"hidden_act": "silu", "original_max_position_embeddings": a.max_position_embeddings} | _plain_rope_config(a)


def _read_gemma3(config: Config) -> dict[str, Any]:
    for key in ("attention_bias", "attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"):
        _refuse(config, key, False)
    _refuse(config, "hidden_activation", "gelu_pytorch_tanh")
    layers = config["num_hidden_layers"]
    every = config.get("_sliding_window_pattern", config["sliding_window_pattern"])
    types = config.get("layer_types")
    if types:
        every = next((i for i, kind in enumerate(types, 1) if kind == "full_attention"), layers + 1)
        if list(types) != _gemma3_layer_types(layers, every):
            raise UserError("config.json has layer_types without a period; NeMo's Gemma 3 has every n-th layer global")
    rope = _rope(config)
    _refuse(rope, "rope_type", "default", "linear")
    by_kind = "sliding_attention" in (config.get("rope_parameters") or {})
    local = _rope(config, "sliding_attention")["rope_theta"] if by_kind else config["rope_local_base_freq"]
    return {
        "rotary_base": float(rope["rope_theta"]),
        "qk_layernorm": True,
        "softmax_scale": float(config["query_pre_attn_scalar"]) ** -0.5,
        "sliding_window": SlidingWindow(
            size=config["sliding_window"],
            every=every,
            rotary_base_local=float(local),
            global_rope_factor=float(rope.get("factor", 1.0)),
        ),
    }


def _write_gemma3(a: Architecture) -> dict[str, Any]:
    window = a.sliding_window
    if window is None or a.softmax_scale is None:
        raise UserError("a gemma3 architecture needs sliding_window and softmax_scale")
    factor = window.global_rope_factor
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": _whole(a.softmax_scale**-2),
        "sliding_window": window.size,
        "sliding_window_pattern": window.every,
        "layer_types": _gemma3_layer_types(a.num_layers, window.every),
        "rope_theta": a.rotary_base,
        "rope_local_base_freq": window.rotary_base_local,
        "rope_scaling": None if factor == 1.0 else {"rope_type": "linear", "factor": factor},
    }


# Gemma 3's published files with a vision part leave these out
_GEMMA3_DEFAULTS = {
    "vocab_size": 262_208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True,
    "max_position_embeddings": 131_072, "query_pre_attn_scalar": 256, "rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0,
    "sliding_window": 4096, "sliding_window_pattern": 6,
}  # fmt: skip


def _gemma3_layer_types(layers: int, every: int) -> list[str]:
    return ["sliding_attention" if i % every else "full_attention" for i in range(1, layers + 1)]


def _whole(value: float) -> int | float:
    """An integer where the value is one up to rounding."""
    return round(value) if abs(value - round(value)) < 1e-6 * value else value


# ---------------------------------------------------------------------------------------------------------------- table

FAMILIES = {
    family.name: family
    for family in (
        Family("llama", ("llama",), "LlamaForCausalLM", _LLAMA_ROWS, _read_llama, _write_llama),
        Family("qwen2", ("qwen2",), "Qwen2ForCausalLM", (*_LLAMA_ROWS, QKV_BIAS), _read_qwen2, _write_qwen),
        Family("qwen3", ("qwen3",), "Qwen3ForCausalLM", (*_LLAMA_ROWS, Q_NORM, K_NORM), _read_qwen3, _write_qwen),
        Family(
            "phi3",
            ("phi3",),
            "Phi3ForCausalLM",
            (EMBEDDING, ATTENTION_NORM, QKV_FUSED, ATTENTION_OUTPUT, MLP_NORM, FC1_FUSED, FC2, FINAL_NORM, OUTPUT),
            _read_phi3,
            _write_phi3,
        ),
        Family(
            "gemma3",
            ("gemma3_text", "gemma3"),
            "Gemma3ForCausalLM",
            _GEMMA3_ROWS,
            _read_gemma3,
            _write_gemma3,
            defaults=_GEMMA3_DEFAULTS,
            text_config=True,
            prefixes=("model.", "language_model.model.", "model.language_model."),
            ignored=(".rotary_emb.inv_freq", "vision_tower.", "multi_modal_projector."),
        ),
    )
}


def family_of(hf_config: Config) -> Family:
    """The family of a Hugging Face configuration; UserError listing the known ones."""
    model_type = hf_config.get("model_type")
    for family in FAMILIES.values():
        if model_type in family.model_types:
            return family
    known = ", ".join(kind for family in FAMILIES.values() for kind in family.model_types)
    raise UserError(f"config.json has model_type={model_type!r}, which does not convert; known: {known}")


def architecture(hf_config: Config) -> Architecture:
    """What a Hugging Face configuration describes.

    Raises UserError for an unknown architecture, a quantized checkpoint, or an option that NeMo's model does not have.
    """
    family = family_of(hf_config)
    if quantization := hf_config.get("quantization_config"):
        raise UserError(
            f"the checkpoint is quantized ({quantization.get('quant_method', 'unknown method')}): convert the original"
        )
    config = _text_part(family, hf_config)
    try:
        heads = config["num_attention_heads"]
        return Architecture(
            family=family.name,
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            ffn_hidden_size=config["intermediate_size"],
            num_attention_heads=heads,
            num_query_groups=config.get("num_key_value_heads") or heads,
            vocab_size=config["vocab_size"],
            kv_channels=config.get("head_dim") or config["hidden_size"] // heads,
            max_position_embeddings=config["max_position_embeddings"],
            layernorm_epsilon=config["rms_norm_eps"],
            share_embeddings_and_output_weights=config["tie_word_embeddings"],
            init_method_std=config["initializer_range"],
            **family.read(config),
        )
    except KeyError as error:
        raise UserError(f"config.json lacks {error.args[0]}") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"config.json does not describe a {family.name} model: {error}") from error


def _text_part(family: Family, hf_config: Config) -> dict[str, Any]:
    """The language model's configuration, with the family's defaults for what it leaves out."""
    config = dict(hf_config)
    if family.text_config and "text_config" in config:
        tied = {key: config[key] for key in ("tie_word_embeddings",) if key in config}
        config = tied | dict(config["text_config"])
    return {**_DEFAULTS, **family.defaults, **config}


def hf_config(
    architecture: Architecture, torch_dtype: str = "bfloat16", special_ids: Mapping[str, int | list[int] | None] | None = None
) -> dict[str, Any]:
    """A config.json for this architecture, for a model that was not imported from one.

    `special_ids` gives "bos", "eos" and "pad" of the tokenizer; one left out is written as null, so that transformers does
    not put in the id of the family's published model.
    """
    family = FAMILIES[architecture.family]
    a = architecture
    return {
        "architectures": [family.causal_lm],
        "model_type": family.model_types[0],
        "num_hidden_layers": a.num_layers,
        "hidden_size": a.hidden_size,
        "intermediate_size": a.ffn_hidden_size,
        "num_attention_heads": a.num_attention_heads,
        "num_key_value_heads": a.num_query_groups,
        "head_dim": a.kv_channels,
        "vocab_size": a.vocab_size,
        "max_position_embeddings": a.max_position_embeddings,
        "rms_norm_eps": a.layernorm_epsilon,
        "tie_word_embeddings": a.share_embeddings_and_output_weights,
        "initializer_range": a.init_method_std,
        "torch_dtype": torch_dtype,
        **{f"{name}_token_id": (special_ids or {}).get(name) for name in ("bos", "eos", "pad")},
        **family.write(a),
    }


# ---------------------------------------------------------------------------------------------------------------- names


def base_prefix(family: Family, names: Iterable[str]) -> str:
    """What stands for "model." in a checkpoint with these tensor names."""
    present = set(names)
    return next((p for p in family.prefixes if f"{p}embed_tokens.weight" in present), family.prefixes[0])


def hf_name(canonical: str, prefix: str) -> str:
    """The checkpoint's own name of a row's tensor: "model.x" -> prefix + "x", and lm_head beside the wrapped model."""
    if canonical.startswith("model."):
        return prefix + canonical.removeprefix("model.")
    return prefix.removesuffix("model.") + canonical if prefix == "language_model.model." else canonical
