"""Gemma 2, and Gemma 3's text model, alone or wrapped with a vision tower."""

from __future__ import annotations

from typing import Any

from conversion.families.common import (
    ATTENTION_NORM,
    ATTENTION_OUTPUT,
    DECODER,
    EMBEDDING,
    FC1,
    FC2,
    FINAL_NORM,
    K_NORM,
    LAYER,
    OUTPUT,
    Q_NORM,
    QKV_WEIGHT,
    layer_types,
    periodic_window,
    plain_rope,
    plain_rope_config,
    refuse,
    rope,
)
from conversion.families.table import Config, Family, Row
from nemo_ext.architecture import Architecture, SlidingWindow
from nemo_ext.errors import UserError

# Gemma normalises after attention and MLP as well. Its norms store gamma - 1, and so does Megatron with
# layernorm_zero_centered_gamma: the values stay as they are.
GEMMA2_ROWS = (
    EMBEDDING, ATTENTION_NORM, QKV_WEIGHT, ATTENTION_OUTPUT,
    Row({f"{LAYER}post_attention_layernorm.weight": "h"}, f"{DECODER}self_attention.linear_proj.post_layernorm.weight"),
    Row({f"{LAYER}pre_feedforward_layernorm.weight": "h"}, f"{DECODER}mlp.linear_fc1.layer_norm_weight"),
    FC1, FC2,
    Row({f"{LAYER}post_feedforward_layernorm.weight": "h"}, f"{DECODER}mlp.linear_fc2.post_layernorm.weight"),
    FINAL_NORM, OUTPUT,
)  # fmt: skip
GEMMA3_ROWS = (*GEMMA2_ROWS, Q_NORM, K_NORM)


def _read_gemma2(config: Config) -> dict[str, Any]:
    for key in ("attention_bias", "use_bidirectional_attention"):
        refuse(config, key, False)
    refuse(config, "hidden_activation", "gelu_pytorch_tanh")
    every = periodic_window(config)
    return plain_rope(config) | {
        "softmax_scale": float(config["query_pre_attn_scalar"]) ** -0.5,
        "sliding_window": SlidingWindow(config["sliding_window"], every, rotary_base_local=None),
        "attn_logit_softcapping": config["attn_logit_softcapping"],
        "final_logit_softcapping": config["final_logit_softcapping"],
    }


def _write_gemma2(a: Architecture) -> dict[str, Any]:
    return _write_gemma(a) | {
        "attn_logit_softcapping": a.attn_logit_softcapping,
        "final_logit_softcapping": a.final_logit_softcapping,
    } | plain_rope_config(a)  # fmt: skip


def _read_gemma3(config: Config) -> dict[str, Any]:
    for key in ("attention_bias", "attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"):
        refuse(config, key, False)
    refuse(config, "hidden_activation", "gelu_pytorch_tanh")
    positions = rope(config)
    refuse(positions, "rope_type", "default", "linear")
    by_kind = "sliding_attention" in (config.get("rope_parameters") or {})
    local = rope(config, "sliding_attention")["rope_theta"] if by_kind else config["rope_local_base_freq"]
    return {
        "rotary_base": float(positions["rope_theta"]),
        "qk_layernorm": True,
        "softmax_scale": float(config["query_pre_attn_scalar"]) ** -0.5,
        "sliding_window": SlidingWindow(
            size=config["sliding_window"],
            every=periodic_window(config),
            rotary_base_local=float(local),
            global_rope_factor=float(positions.get("factor", 1.0)),
        ),
    }


def _write_gemma(a: Architecture) -> dict[str, Any]:
    if a.sliding_window is None or a.softmax_scale is None:
        raise UserError(f"a {a.family} architecture needs sliding_window and softmax_scale")
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": _whole(a.softmax_scale**-2),
        "sliding_window": a.sliding_window.size,
        "layer_types": layer_types(a.num_layers, a.sliding_window.every),
    }


def _write_gemma3(a: Architecture) -> dict[str, Any]:
    written, window = _write_gemma(a), a.sliding_window
    factor = window.global_rope_factor
    return written | {
        "sliding_window_pattern": window.every,
        "rope_theta": a.rotary_base,
        "rope_local_base_freq": window.rotary_base_local,
        "rope_scaling": None if factor == 1.0 else {"rope_type": "linear", "factor": factor},
    }


# Gemma 2's published files leave these out
_GEMMA2_DEFAULTS = {
    "tie_word_embeddings": True, "sliding_window_pattern": 2, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
}  # fmt: skip
# Gemma 3's published files with a vision part leave these out
_GEMMA3_DEFAULTS = {
    "vocab_size": 262_208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True,
    "max_position_embeddings": 131_072, "query_pre_attn_scalar": 256, "rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0,
    "sliding_window": 4096, "sliding_window_pattern": 6,
}  # fmt: skip


def _whole(value: float) -> int | float:
    """An integer where the value is one up to rounding."""
    return round(value) if abs(value - round(value)) < 1e-6 * value else value


GEMMA2 = Family("gemma2", ("gemma2",), "Gemma2ForCausalLM", GEMMA2_ROWS, _read_gemma2, _write_gemma2, defaults=_GEMMA2_DEFAULTS)
GEMMA3 = Family(
    "gemma3",
    ("gemma3_text", "gemma3"),
    "Gemma3ForCausalLM",
    GEMMA3_ROWS,
    _read_gemma3,
    _write_gemma3,
    defaults=_GEMMA3_DEFAULTS,
    text_config=True,
    prefixes=("model.", "language_model.model.", "model.language_model."),
    ignored=(".rotary_emb.inv_freq", "vision_tower.", "multi_modal_projector."),
)
