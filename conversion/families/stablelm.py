"""StableLM 2: Llama with LayerNorms and partial rotation; the 12B with a parallel residual and a norm for each head."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from conversion.families.common import (
    ATTENTION_NORM,
    ATTENTION_OUTPUT,
    DECODER,
    EMBEDDING,
    FC1,
    FC2,
    FINAL_NORM,
    LAYER,
    MLP_NORM,
    OUTPUT,
    PARALLEL_NORM,
    QKV_BIAS,
    QKV_WEIGHT,
    bias_of,
    plain_rope,
    plain_rope_config,
    refuse,
    rotary_percent,
)
from conversion.families.table import Config, Family, Row
from nemo_ext.architecture import Architecture


def _parallel(a: Architecture) -> bool:
    return a.parallel_residual


def _sequential(a: Architecture) -> bool:
    return not a.parallel_residual


def _headwise(a: Architecture) -> bool:
    return a.qk_layernorm_per_head


_NORMS = (replace(PARALLEL_NORM, when=_parallel), *(replace(r, when=_sequential) for r in (ATTENTION_NORM, MLP_NORM)), FINAL_NORM)
_ATTENTION = f"{DECODER}self_attention."
STABLELM_ROWS = (
    EMBEDDING, *_NORMS, *map(bias_of, _NORMS), QKV_WEIGHT, replace(QKV_BIAS, when=lambda a: a.add_qkv_bias),
    Row({f"{LAYER}self_attn.q_layernorm.norms.{{q}}.weight": "d"}, f"{_ATTENTION}q_layernorm.{{q}}.weight", when=_headwise),
    Row({f"{LAYER}self_attn.k_layernorm.norms.{{k}}.weight": "d"}, f"{_ATTENTION}k_layernorm.{{k}}.weight", when=_headwise),
    ATTENTION_OUTPUT, FC1, FC2, OUTPUT,
)  # fmt: skip


def _read_stablelm(config: Config) -> dict[str, Any]:
    refuse(config, "hidden_act", "silu")
    refuse(config, "head_dim", config["hidden_size"] // config["num_attention_heads"])
    return plain_rope(config) | rotary_percent(config) | {
        "normalization": "LayerNorm",
        "add_qkv_bias": config["use_qkv_bias"],
        "parallel_residual": config["use_parallel_residual"],
        "qk_layernorm_per_head": config["qk_layernorm"],
    }  # fmt: skip


def _write_stablelm(a: Architecture) -> dict[str, Any]:
    return {
        "hidden_act": "silu",
        "partial_rotary_factor": a.rotary_percent,
        "use_qkv_bias": a.add_qkv_bias,
        "use_parallel_residual": a.parallel_residual,
        "qk_layernorm": a.qk_layernorm_per_head,
    } | plain_rope_config(a)


STABLELM = Family(
    "stablelm",
    ("stablelm",),
    "StableLmForCausalLM",
    STABLELM_ROWS,
    _read_stablelm,
    _write_stablelm,
    defaults={
        "partial_rotary_factor": 0.25,
        "layer_norm_eps": 1e-5,
        "use_qkv_bias": False,
        "use_parallel_residual": False,
        "qk_layernorm": False,
    },
    epsilon="layer_norm_eps",
)
