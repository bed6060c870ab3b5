"""Rows and configuration helpers that several families share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from conversion.families.table import Config, Row
from conversion.layout import FUSED_QKV, GATE_UP, QKV, VOCABULARY
from nemo_ext.architecture import Architecture, SlidingWindow
from nemo_ext.errors import UserError

LAYER = "model.layers.{i}."
DECODER = "decoder.layers.{i}."


def untied(a: Architecture) -> bool:
    return not a.share_embeddings_and_output_weights


def bias_of(weight: Row, when: Callable[[Architecture], bool] | None = None) -> Row:
    """The row of the biases that go with a row of weights, of a linear layer or a norm."""
    hf = {f"{name.removesuffix('weight')}bias": symbols.split()[0] for name, symbols in weight.hf.items()}
    return Row(hf, f"{weight.megatron.removesuffix('weight')}bias", weight.layout, when or weight.when)


EMBEDDING = Row({"model.embed_tokens.weight": "vocab h"}, "embedding.word_embeddings.weight", VOCABULARY)
OUTPUT = Row({"lm_head.weight": "vocab h"}, "output_layer.weight", VOCABULARY, when=untied)
FINAL_NORM = Row({"model.norm.weight": "h"}, "decoder.final_layernorm.weight")
QKV_WEIGHT = Row(
    {
        f"{LAYER}self_attn.q_proj.weight": "q h",
        f"{LAYER}self_attn.k_proj.weight": "kv h",
        f"{LAYER}self_attn.v_proj.weight": "kv h",
    },
    f"{DECODER}self_attention.linear_qkv.weight",
    QKV,
)
QKV_BIAS = bias_of(QKV_WEIGHT)
QKV_FUSED = Row({f"{LAYER}self_attn.qkv_proj.weight": "qkv h"}, f"{DECODER}self_attention.linear_qkv.weight", FUSED_QKV)
ATTENTION_NORM = Row({f"{LAYER}input_layernorm.weight": "h"}, f"{DECODER}self_attention.linear_qkv.layer_norm_weight")
PARALLEL_NORM = Row({f"{LAYER}input_layernorm.weight": "h"}, f"{DECODER}input_layernorm.weight")  # of attention and MLP
ATTENTION_OUTPUT = Row({f"{LAYER}self_attn.o_proj.weight": "h q"}, f"{DECODER}self_attention.linear_proj.weight")
Q_NORM = Row({f"{LAYER}self_attn.q_norm.weight": "d"}, f"{DECODER}self_attention.q_layernorm.weight")
K_NORM = Row({f"{LAYER}self_attn.k_norm.weight": "d"}, f"{DECODER}self_attention.k_layernorm.weight")
MLP_NORM = Row({f"{LAYER}post_attention_layernorm.weight": "h"}, f"{DECODER}mlp.linear_fc1.layer_norm_weight")
FC1 = Row(
    {f"{LAYER}mlp.gate_proj.weight": "ffn h", f"{LAYER}mlp.up_proj.weight": "ffn h"},
    f"{DECODER}mlp.linear_fc1.weight",
    GATE_UP,
)
FC1_FUSED = Row({f"{LAYER}mlp.gate_up_proj.weight": "2ffn h"}, f"{DECODER}mlp.linear_fc1.weight")
FC2 = Row({f"{LAYER}mlp.down_proj.weight": "h ffn"}, f"{DECODER}mlp.linear_fc2.weight")

LLAMA_ROWS = (EMBEDDING, ATTENTION_NORM, QKV_WEIGHT, ATTENTION_OUTPUT, MLP_NORM, FC1, FC2, FINAL_NORM, OUTPUT)


def refuse(config: Config, key: str, *allowed: Any) -> None:
    """UserError unless the configuration leaves `key` out or gives it an allowed value."""
    if key in config and config[key] is not None and config[key] not in allowed:
        raise UserError(f"config.json has {key}={config[key]!r}; only {' or '.join(map(repr, allowed))} converts to NeMo")


def rope(config: Config, kind: str = "full_attention") -> dict[str, Any]:
    """RoPE settings in one dictionary, from transformers 4's rope_theta + rope_scaling or 5's rope_parameters."""
    rope = dict(config.get("rope_parameters") or {})
    rope = dict(rope.get(kind, rope))
    rope = rope or dict(config.get("rope_scaling") or {})
    rope.setdefault("rope_type", rope.pop("type", "default"))
    rope.setdefault("rope_theta", config.get("rope_theta", 10_000.0))
    return rope


def plain_rope(config: Config) -> dict[str, Any]:
    positions = rope(config)
    refuse(positions, "rope_type", "default")
    return {"rotary_base": float(positions["rope_theta"])}


def plain_rope_config(a: Architecture) -> dict[str, Any]:
    return {"rope_theta": a.rotary_base, "rope_scaling": None}


def no_window(config: Config) -> None:
    """Refuse a sliding window that cuts: Qwen's switch is use_sliding_window, Phi's is the window itself."""
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    if window is not None and window < config["max_position_embeddings"]:
        raise UserError(f"config.json has sliding_window={window}; this family converts to NeMo with full attention only")


def uniform_window(config: Config) -> SlidingWindow | None:
    """The window of every layer, or None where there is none or it is no shorter than the context."""
    size = config.get("sliding_window")
    cuts = size is not None and size < config["max_position_embeddings"]
    return SlidingWindow(size, every=0, rotary_base_local=None) if cuts else None


def uniform_window_config(a: Architecture) -> dict[str, Any]:
    return {"sliding_window": a.sliding_window.size if a.sliding_window else None}


def periodic_window(config: Config) -> int:
    """Every how many layers one is global: from layer_types, or the number that older files have in its place."""
    layers = config["num_hidden_layers"]
    types = config.get("layer_types")
    if not types:
        return config.get("_sliding_window_pattern", config["sliding_window_pattern"])
    every = next((i for i, kind in enumerate(types, 1) if kind == "full_attention"), layers + 1)
    if list(types) != layer_types(layers, every):
        raise UserError("config.json has layer_types without a period; NeMo's Gemma has every n-th layer global")
    return every


def layer_types(layers: int, every: int) -> list[str]:
    return ["sliding_attention" if i % every else "full_attention" for i in range(1, layers + 1)]


def rotary_percent(config: Config) -> dict[str, Any]:
    """The rotated share of each head, which transformers 5 keeps among the RoPE settings."""
    return {"rotary_percent": float(rope(config).get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)))}
