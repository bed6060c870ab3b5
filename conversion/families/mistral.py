"""Mistral: Llama with a head dimension of its own (Nemo) and, in v0.1, a window in every layer."""

from __future__ import annotations

from typing import Any

from conversion.families.common import LLAMA_ROWS, plain_rope, plain_rope_config, refuse, uniform_window, uniform_window_config
from conversion.families.table import Config, Family
from nemo_ext.architecture import Architecture


def _read_mistral(config: Config) -> dict[str, Any]:
    refuse(config, "hidden_act", "silu")
    refuse(config, "attention_bias", False)
    return plain_rope(config) | {"sliding_window": uniform_window(config)}


def _write_mistral(a: Architecture) -> dict[str, Any]:
    return {"hidden_act": "silu"} | uniform_window_config(a) | plain_rope_config(a)


MISTRAL = Family(
    "mistral",
    ("mistral",),
    "MistralForCausalLM",
    LLAMA_ROWS,
    _read_mistral,
    _write_mistral,
    defaults={"sliding_window": 4096},
)
