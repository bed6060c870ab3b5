"""Mixtral: Llama with a router and several MLPs, its experts, in every layer.

The router scores the experts with one matrix; a token goes through the best `moe_router_topk` and its outputs are weighted by the
softmax over those (Jiang et al. 2024, arXiv:2401.04088). Megatron's checkpoints stack the experts on an axis after the layers'.
"""

from __future__ import annotations

from typing import Any

from conversion.families.common import (
    ATTENTION_NORM,
    ATTENTION_OUTPUT,
    DECODER,
    EMBEDDING,
    FINAL_NORM,
    LAYER,
    OUTPUT,
    QKV_WEIGHT,
    plain_rope,
    plain_rope_config,
    refuse,
    uniform_window,
    uniform_window_config,
)
from conversion.families.table import Config, Family, Row
from conversion.layout import GATE_UP
from nemo_ext.architecture import Architecture
from nemo_ext.errors import UserError

HF_EXPERT = f"{LAYER}block_sparse_moe.experts.{{e}}."
EXPERT = f"{DECODER}mlp.experts.experts.{{e}}."

MIXTRAL_ROWS = (
    EMBEDDING, ATTENTION_NORM, QKV_WEIGHT, ATTENTION_OUTPUT,
    Row({f"{LAYER}post_attention_layernorm.weight": "h"}, f"{DECODER}pre_mlp_layernorm.weight"),
    Row({f"{LAYER}block_sparse_moe.gate.weight": "experts h"}, f"{DECODER}mlp.router.weight"),
    Row({f"{HF_EXPERT}w1.weight": "ffn h", f"{HF_EXPERT}w3.weight": "ffn h"}, f"{EXPERT}linear_fc1.weight", GATE_UP),
    Row({f"{HF_EXPERT}w2.weight": "h ffn"}, f"{EXPERT}linear_fc2.weight"),
    FINAL_NORM, OUTPUT,
)  # fmt: skip


def _read_mixtral(config: Config) -> dict[str, Any]:
    refuse(config, "hidden_act", "silu")
    refuse(config, "attention_bias", False)
    refuse(config, "router_jitter_noise", 0.0)
    experts, chosen = config["num_local_experts"], config["num_experts_per_tok"]
    if chosen == 1:
        raise UserError("config.json has num_experts_per_tok=1; NeMo's router weights the chosen experts, so that 2 are needed")
    return plain_rope(config) | {
        "sliding_window": uniform_window(config),
        "num_moe_experts": experts,
        "moe_router_topk": chosen,
        "moe_aux_loss_coeff": _rounded(config["router_aux_loss_coef"] * chosen / config["num_hidden_layers"]),
    }


def _write_mixtral(a: Architecture) -> dict[str, Any]:
    if a.num_moe_experts is None or a.moe_router_topk is None:
        raise UserError("a mixtral architecture needs num_moe_experts and moe_router_topk")
    return (
        {
            "hidden_act": "silu",
            "num_local_experts": a.num_moe_experts,
            "num_experts_per_tok": a.moe_router_topk,
            "router_aux_loss_coef": _rounded(a.moe_aux_loss_coeff * a.num_layers / a.moe_router_topk),
        }
        | uniform_window_config(a)
        | plain_rope_config(a)
    )


def _rounded(coefficient: float) -> float:
    """Without the last bits, which a product and the quotient that undoes it may change.

    Hugging Face computes one balancing loss over the tokens of all layers, which is moe_router_topk when balanced; Megatron one
    for each layer, 1 when balanced, and adds them. The coefficients are such that both losses have the same size: the same
    loss in a model of one layer.
    """
    return float(f"{coefficient:.12g}")


MIXTRAL = Family(
    "mixtral",
    ("mixtral",),
    "MixtralForCausalLM",
    MIXTRAL_ROWS,
    _read_mixtral,
    _write_mixtral,
    defaults={"rms_norm_eps": 1e-5, "rope_theta": 1e6, "router_aux_loss_coef": 0.001},
)
