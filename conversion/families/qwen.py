"""Qwen 2, 2.5 and 3, dense, and the Qwen distills of DeepSeek-R1."""

from __future__ import annotations

from typing import Any

from conversion.families.common import K_NORM, LLAMA_ROWS, Q_NORM, QKV_BIAS, no_window, plain_rope, plain_rope_config, refuse
from conversion.families.table import Config, Family
from nemo_ext.architecture import Architecture


def _read_qwen2(config: Config) -> dict[str, Any]:
    refuse(config, "hidden_act", "silu")
    no_window({"use_sliding_window": False} | dict(config))
    return plain_rope(config) | {"add_qkv_bias": True}


def _read_qwen3(config: Config) -> dict[str, Any]:
    refuse(config, "attention_bias", False)
    return _read_qwen2(config) | {"add_qkv_bias": False, "qk_layernorm": True}


def _write_qwen(a: Architecture) -> dict[str, Any]:
    return {"hidden_act": "silu", "use_sliding_window": False} | plain_rope_config(a)


QWEN2 = Family("qwen2", ("qwen2",), "Qwen2ForCausalLM", (*LLAMA_ROWS, QKV_BIAS), _read_qwen2, _write_qwen)
QWEN3 = Family("qwen3", ("qwen3",), "Qwen3ForCausalLM", (*LLAMA_ROWS, Q_NORM, K_NORM), _read_qwen3, _write_qwen)
