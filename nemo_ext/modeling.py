"""From an `Architecture` to the NeMo 2 model that trains it.

Importing this module imports NeMo; call `nemo_ext.platform.activate()` first.
"""

from __future__ import annotations

from dataclasses import dataclass

import nemo_run as run
import torch.nn.functional as F
from megatron.core.activations import fast_gelu
from megatron.core.extensions.transformer_engine import TENorm
from nemo.collections import llm
from nemo.collections.llm.gpt.model.gemma2 import TERowParallelLinearLayerNorm
from nemo.collections.llm.gpt.model.gemma3 import Gemma3Config1B, Gemma3Model, Gemma3SelfAttention, gemma3_layer_spec
from nemo.collections.llm.gpt.model.llama import Llama31Config
from nemo.collections.llm.gpt.model.phi3mini import Phi3Config, Phi3Model

from nemo_ext.architecture import Architecture

# Fields that an Architecture and a NeMo configuration have under one name.
COMMON_FIELDS = (
    "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels layernorm_epsilon rotary_base "
    "share_embeddings_and_output_weights add_qkv_bias qk_layernorm softmax_scale init_method_std"
).split()


class Gemma3Attention(Gemma3SelfAttention):
    """Gemma 3's attention as Megatron-Core 0.15 calls it: with a fused cos/sin table that no training layer uses."""

    def forward(self, *args, rotary_pos_cos_sin=None, **kwargs):
        return super().forward(*args, **kwargs)


class RowParallelPostNorm(TERowParallelLinearLayerNorm):
    """Gemma's row-parallel linear and the norm after it, with the configuration's epsilon: NeMo's takes the default's 1e-5."""

    def __init__(self, input_size, output_size, *, config, **kwargs):
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.post_layernorm = TENorm(config, output_size, eps=config.layernorm_epsilon)


def gemma3_text_spec(config):
    """NeMo's Gemma 3 layer with `Gemma3Attention` and `RowParallelPostNorm`."""
    spec = gemma3_layer_spec(config)
    attention, mlp = spec.submodules.self_attention, spec.submodules.mlp
    attention.module = Gemma3Attention
    attention.submodules.linear_proj = mlp.submodules.linear_fc2 = RowParallelPostNorm
    return spec


@dataclass
class Gemma3TextConfig(Gemma3Config1B):
    """Gemma 3's text decoder at any size."""

    transformer_layer_spec: object = gemma3_text_spec

    def __post_init__(self):
        super().__post_init__()
        # Gemma's activation is tanh-approximated GELU: Megatron's fused kernel for F.gelu, fast_gelu where nothing is fused.
        self.activation_func = F.gelu if self.bias_activation_fusion else fast_gelu


FAMILIES = {
    "llama": (llm.LlamaModel, llm.LlamaConfig),
    "qwen2": (llm.Qwen2Model, llm.Qwen2Config),
    "qwen3": (llm.Qwen3Model, llm.Qwen3Config),
    "phi3": (Phi3Model, Phi3Config),
    "gemma3": (Gemma3Model, Gemma3TextConfig),
}


def model_config(architecture: Architecture, seq_length: int, **overrides) -> run.Config:
    """The NeMo-Run object of the model: `run.Config(LlamaModel, config=run.Config(LlamaConfig, ...))`.

    `overrides` are fields of the NeMo configuration (recomputation, fusions, dtypes). The tokenizer is bound later.
    """
    model, config = FAMILIES[architecture.family]
    fields = {name: getattr(architecture, name) for name in COMMON_FIELDS}
    fields.update(vocab_size=architecture.padded_vocab_size, seq_length=seq_length)
    if (scaling := architecture.rope_scaling) is not None:
        config = Llama31Config
        fields.update(
            scale_factor=scaling.factor,
            low_freq_factor=scaling.low_freq_factor,
            high_freq_factor=scaling.high_freq_factor,
            old_context_len=scaling.original_max_position_embeddings,
        )
    if (window := architecture.sliding_window) is not None:
        fields.update(
            rotary_base=(window.rotary_base_local, architecture.rotary_base),
            rope_scaling_factor=window.global_rope_factor,
            window_size=window.size - 1,  # Megatron counts the tokens before a position, Hugging Face the position too
            interleaved_attn_pattern=(window.every - 1, 1),
        )
    return run.Config(model, config=run.Config(config, **{**fields, **overrides}))
