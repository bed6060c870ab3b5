"""Llama 2 and 3.x, and what is shaped like it: SmolLM2, TinyLlama, the Llama distills of DeepSeek-R1."""

from __future__ import annotations

import dataclasses
from typing import Any

from conversion.families.common import LLAMA_ROWS, refuse, rope
from conversion.families.table import Config, Family
from nemo_ext.architecture import Architecture, RopeScaling


def _read_llama(config: Config) -> dict[str, Any]:
    for key in ("attention_bias", "mlp_bias"):
        refuse(config, key, False)
    refuse(config, "hidden_act", "silu")
    positions = rope(config)
    refuse(positions, "rope_type", "default", "llama3")
    scaling = None
    if positions["rope_type"] == "llama3":
        scaling = RopeScaling(**{f.name: positions[f.name] for f in dataclasses.fields(RopeScaling) if f.name in positions})
    return {"rotary_base": float(positions["rope_theta"]), "rope_scaling": scaling}


def _write_llama(a: Architecture) -> dict[str, Any]:
    scaling = {"rope_type": "llama3"} | dataclasses.asdict(a.rope_scaling) if a.rope_scaling else None
    return {
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rope_theta": a.rotary_base,
        "rope_scaling": scaling,
    }


LLAMA = Family("llama", ("llama",), "LlamaForCausalLM", LLAMA_ROWS, _read_llama, _write_llama)
