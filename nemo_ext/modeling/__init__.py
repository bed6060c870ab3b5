"""From an `Architecture` to the NeMo 2 model that trains it.

Importing this package imports NeMo; call `nemo_ext.platform.activate()` first.
"""

from __future__ import annotations

from typing import Any

import nemo_run as run
from nemo.collections import llm
from nemo.collections.llm.gpt.model.gemma3 import Gemma3Model
from nemo.collections.llm.gpt.model.llama import Llama31Config
from nemo.collections.llm.gpt.model.phi3mini import Phi3Config, Phi3Model

from nemo_ext.architecture import Architecture, LongRope, RopeScaling
from nemo_ext.modeling.gemma import Gemma2TextConfig, Gemma3TextConfig
from nemo_ext.modeling.longrope import LongRopeConfig
from nemo_ext.modeling.mixtral import MixtralConfig
from nemo_ext.modeling.phi import PhiConfig
from nemo_ext.modeling.stablelm import StableLMConfig

# Fields that an Architecture and a NeMo configuration have under one name.
COMMON_FIELDS = (
    "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels layernorm_epsilon rotary_base "
    "rotary_percent share_embeddings_and_output_weights add_qkv_bias add_bias_linear gated_linear_unit normalization "
    "qk_layernorm softmax_scale init_method_std"
).split()

# A configuration that takes more of an Architecture than the common fields names those in `architecture_fields`.
# Mistral is a Llama with a window: NeMo's own configuration has one by default, where v0.2 has none, and a token too wide.
FAMILIES = {
    "llama": (llm.LlamaModel, llm.LlamaConfig),
    "mistral": (llm.MistralModel, llm.LlamaConfig),
    "qwen2": (llm.Qwen2Model, llm.Qwen2Config),
    "qwen3": (llm.Qwen3Model, llm.Qwen3Config),
    "phi": (llm.GPTModel, PhiConfig),
    "phi3": (Phi3Model, Phi3Config),
    "gemma2": (llm.GPTModel, Gemma2TextConfig),  # NeMo's Gemma2Model scales the embedding itself, as the configuration does here
    "gemma3": (Gemma3Model, Gemma3TextConfig),
    "mixtral": (llm.MixtralModel, MixtralConfig),
    "stablelm": (llm.GPTModel, StableLMConfig),
}


def model_config(architecture: Architecture, seq_length: int, **overrides) -> run.Config:
    """The NeMo-Run object of the model: `run.Config(LlamaModel, config=run.Config(LlamaConfig, ...))`.

    `overrides` are fields of the NeMo configuration (recomputation, fusions, dtypes). The tokenizer is bound later.
    """
    model, config = FAMILIES[architecture.family]
    scaling = architecture.rope_scaling
    if isinstance(scaling, LongRope):
        config = LongRopeConfig
    elif scaling is not None:
        config = Llama31Config
    names = [*COMMON_FIELDS, *getattr(config, "architecture_fields", ())]
    fields = {name: getattr(architecture, name) for name in names}
    fields.update(vocab_size=architecture.padded_vocab_size, seq_length=seq_length)
    fields.update(**_experts(architecture), **_rope(architecture), **_window(architecture))
    return run.Config(model, config=run.Config(config, **{**fields, **overrides}))


def _experts(architecture: Architecture) -> dict[str, Any]:
    if architecture.num_moe_experts is None:
        return {}
    return dict(
        num_moe_experts=architecture.num_moe_experts,
        moe_router_topk=architecture.moe_router_topk,
        moe_aux_loss_coeff=architecture.moe_aux_loss_coeff,
        moe_grouped_gemm=True,  # on a GPU; nemo_ext.platform runs the experts one by one without CUDA
        moe_permute_fusion=True,
    )


def _rope(architecture: Architecture) -> dict[str, Any]:
    scaling = architecture.rope_scaling
    if isinstance(scaling, RopeScaling):
        return dict(
            scale_factor=scaling.factor,
            low_freq_factor=scaling.low_freq_factor,
            high_freq_factor=scaling.high_freq_factor,
            old_context_len=scaling.original_max_position_embeddings,
        )
    if isinstance(scaling, LongRope):
        return dict(
            rope_short_factor=list(scaling.short_factor),
            rope_long_factor=list(scaling.long_factor),
            rope_original_length=scaling.original_max_position_embeddings,
            rope_magnitude=scaling.magnitude(architecture.max_position_embeddings),
        )
    return {}


def _window(architecture: Architecture) -> dict[str, Any]:
    window = architecture.sliding_window
    if window is None:
        return {}
    before = window.size - 1  # Megatron counts the tokens before a position, Hugging Face the position too
    if window.rotary_base_local is not None:  # Gemma 3
        return dict(
            rotary_base=(window.rotary_base_local, architecture.rotary_base),
            rope_scaling_factor=window.global_rope_factor,
            window_size=before,
            interleaved_attn_pattern=(window.every - 1, 1),
        )
    # the ring of context parallelism cannot cut windows, an exchange of heads for tokens can
    return dict(window_size=(before, 0), window_attn_skip_freq=window.every or None, cp_comm_type="a2a")
