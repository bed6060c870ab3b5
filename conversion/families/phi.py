"""Phi-3 and Phi-4, whose query, key and value are one tensor, and gate and up another."""

from __future__ import annotations

from typing import Any

from conversion.families.common import (
    ATTENTION_NORM,
    ATTENTION_OUTPUT,
    EMBEDDING,
    FC1_FUSED,
    FC2,
    FINAL_NORM,
    MLP_NORM,
    OUTPUT,
    QKV_FUSED,
    no_window,
    plain_rope,
    plain_rope_config,
    refuse,
)
from conversion.families.table import Config, Family
from nemo_ext.architecture import Architecture


def _read_phi3(config: Config) -> dict[str, Any]:
    refuse(config, "hidden_act", "silu")
    refuse(config, "attention_bias", False)
    refuse(config, "partial_rotary_factor", 1.0)
    no_window(config)
    return plain_rope(config)


def _write_phi3(a: Architecture) -> dict[str, Any]:
    return {"hidden_act": "silu", "original_max_position_embeddings": a.max_position_embeddings} | plain_rope_config(a)


PHI3_ROWS = (EMBEDDING, ATTENTION_NORM, QKV_FUSED, ATTENTION_OUTPUT, MLP_NORM, FC1_FUSED, FC2, FINAL_NORM, OUTPUT)
PHI3 = Family("phi3", ("phi3",), "Phi3ForCausalLM", PHI3_ROWS, _read_phi3, _write_phi3)
