"""Phi-1, 1.5 and 2 ("phi"), and Phi-3 and Phi-4, whose query, key and value are one tensor, and gate and up another ("phi3")."""

from __future__ import annotations

from typing import Any

from conversion.families.common import (
    ATTENTION_NORM,
    ATTENTION_OUTPUT,
    DECODER,
    EMBEDDING,
    FC1_FUSED,
    FC2,
    FINAL_NORM,
    LAYER,
    MLP_NORM,
    OUTPUT,
    PARALLEL_NORM,
    QKV_FUSED,
    QKV_WEIGHT,
    bias_of,
    plain_rope,
    plain_rope_config,
    refuse,
    rope,
    rotary_percent,
    uniform_window,
    uniform_window_config,
)
from conversion.families.table import Config, Family, Row
from nemo_ext.architecture import Architecture, LongRope
from nemo_ext.errors import UserError

_PHI_WEIGHTS = (
    PARALLEL_NORM, QKV_WEIGHT,
    Row({f"{LAYER}self_attn.dense.weight": "h q"}, f"{DECODER}self_attention.linear_proj.weight"),
    Row({f"{LAYER}mlp.fc1.weight": "ffn h"}, f"{DECODER}mlp.linear_fc1.weight"),
    Row({f"{LAYER}mlp.fc2.weight": "h ffn"}, f"{DECODER}mlp.linear_fc2.weight"),
    Row({"model.final_layernorm.weight": "h"}, "decoder.final_layernorm.weight"),
)  # fmt: skip
PHI_ROWS = (
    EMBEDDING, OUTPUT, bias_of(OUTPUT, when=lambda a: a.add_output_bias), *_PHI_WEIGHTS, *map(bias_of, _PHI_WEIGHTS),
)  # fmt: skip
PHI3_ROWS = (EMBEDDING, ATTENTION_NORM, QKV_FUSED, ATTENTION_OUTPUT, MLP_NORM, FC1_FUSED, FC2, FINAL_NORM, OUTPUT)


def _read_phi(config: Config) -> dict[str, Any]:
    refuse(config, "hidden_act", "gelu_new", "gelu_pytorch_tanh")
    refuse(config, "qk_layernorm", False)
    return plain_rope(config) | rotary_percent(config) | {
        "normalization": "LayerNorm",
        "gated_linear_unit": False,
        "add_bias_linear": True,
        "add_output_bias": True,
        "parallel_residual": True,
    }  # fmt: skip


def _write_phi(a: Architecture) -> dict[str, Any]:
    return {"hidden_act": "gelu_new", "qk_layernorm": False, "partial_rotary_factor": a.rotary_percent} | plain_rope_config(a)


def _read_phi3(config: Config) -> dict[str, Any]:
    refuse(config, "hidden_act", "silu")
    refuse(config, "attention_bias", False)
    positions = rope(config)
    refuse(positions, "rope_type", "default", "longrope", "su")
    fields = {"rotary_base": float(positions["rope_theta"]), "sliding_window": uniform_window(config)} | rotary_percent(config)
    if positions["rope_type"] != "default":
        refuse(positions, "attention_factor")
        original = positions.get("original_max_position_embeddings") or config["original_max_position_embeddings"]
        fields["rope_scaling"] = LongRope(positions["short_factor"], positions["long_factor"], original)
    return fields


def _write_phi3(a: Architecture) -> dict[str, Any]:
    scaling, original = None, a.max_position_embeddings
    if a.rope_scaling is not None:
        if not isinstance(a.rope_scaling, LongRope):
            raise UserError("a phi3 architecture has LongRope for rope_scaling, or none")
        factors = {name: list(getattr(a.rope_scaling, name)) for name in ("short_factor", "long_factor")}
        scaling, original = {"type": "longrope", **factors}, a.rope_scaling.original_max_position_embeddings
    return {
        "hidden_act": "silu",
        "rope_theta": a.rotary_base,
        "rope_scaling": scaling,
        "original_max_position_embeddings": original,
        "partial_rotary_factor": a.rotary_percent,
    } | uniform_window_config(a)


PHI = Family(
    "phi",
    ("phi",),
    "PhiForCausalLM",
    PHI_ROWS,
    _read_phi,
    _write_phi,
    defaults={"partial_rotary_factor": 0.5, "layer_norm_eps": 1e-5},
    epsilon="layer_norm_eps",
)
PHI3 = Family(
    "phi3",
    ("phi3",),
    "Phi3ForCausalLM",
    PHI3_ROWS,
    _read_phi3,
    _write_phi3,
    defaults={"original_max_position_embeddings": 4096},
)
