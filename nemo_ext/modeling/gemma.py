"""Gemma 2 and 3: norms after attention and MLP, a scaled embedding, and in Gemma 2 soft-capped scores and logits.

NeMo's Gemma 2 has the windows in the wrong half of its layers, one token too wide, and none when a batch has no mask; only the
arrangement of its layer is used here.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.activations import fast_gelu
from megatron.core.extensions.transformer_engine import TEDotProductAttention, TENorm
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from nemo.collections import llm
from nemo.collections.llm.gpt.model.gemma2 import TERowParallelLinearLayerNorm, gemma2_layer_spec
from nemo.collections.llm.gpt.model.gemma3 import Gemma3Config1B, Gemma3SelfAttention, gemma3_layer_spec
from torch import Tensor

from nemo_ext.platform import versions
from nemo_ext.platform.windows import WindowedSoftmax


class RowParallelPostNorm(TERowParallelLinearLayerNorm):
    """Gemma's row-parallel linear and the norm after it, with the configuration's epsilon: NeMo's takes the default's 1e-5."""

    def __init__(self, input_size, output_size, *, config, **kwargs):
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.post_layernorm = TENorm(config, output_size, eps=config.layernorm_epsilon)


def tanh_gelu(config):
    """Megatron's tanh-approximated GELU: the fused kernel that stands behind F.gelu, fast_gelu where nothing is fused."""
    return F.gelu if config.bias_activation_fusion else fast_gelu


def soft_cap(values: Tensor, cap: float) -> Tensor:
    """cap tanh(values / cap): between -cap and cap, and nearly the values where they are small."""
    return cap * torch.tanh(values / cap)


class SoftCappedSoftmax(torch.nn.Module):
    """Megatron's masked softmax over soft-capped scores `[b, heads, s, s]`, without the fused kernels, which know no window."""

    def __init__(self, softmax, cap: float):
        super().__init__()
        self.softmax, self.cap = softmax, cap

    def forward(self, scores, mask, softmax_offset=None):
        return self.softmax.forward_torch_softmax(soft_cap(scores, self.cap), mask, softmax_offset)


class SoftCappedAttention(DotProductAttention):
    """Megatron's unfused attention with soft-capped scores, which Transformer Engine's kernels do not have.

    The scores of a layer, `[b, heads, s, s]`, are in memory. Windows are those of the configuration, layer by layer.
    """

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        WindowedSoftmax.adopt(self.scale_mask_softmax)
        self.scale_mask_softmax = SoftCappedSoftmax(self.scale_mask_softmax, config.attn_logit_softcapping)


def gemma2_text_spec(config) -> ModuleSpec:
    """NeMo's Gemma 2 layer with this module's attention and `RowParallelPostNorm`."""
    spec = gemma2_layer_spec(config)
    attention, mlp = spec.submodules.self_attention, spec.submodules.mlp
    capped = config.attn_logit_softcapping is not None
    attention.submodules.core_attention = SoftCappedAttention if capped else TEDotProductAttention
    attention.submodules.linear_proj = mlp.submodules.linear_fc2 = RowParallelPostNorm
    return spec


@dataclass
class Gemma2TextConfig(llm.LlamaConfig):
    """Gemma 2 at any size."""

    architecture_fields = ("attn_logit_softcapping", "final_logit_softcapping")
    scales_inputs = True  # Hugging Face's model scales whatever embeddings it is given

    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    activation_func: object = F.gelu
    layernorm_zero_centered_gamma: bool = True
    attention_softmax_in_fp32: bool = True
    transformer_layer_spec: object = gemma2_text_spec

    def __post_init__(self):
        super().__post_init__()
        self.activation_func = tanh_gelu(self)

    def configure_model(self, *args, **kwargs) -> GPTModel:
        """Megatron's model with a scaled embedding and soft-capped logits, on the pipeline stages that have them."""
        model = super().configure_model(*args, **kwargs)
        if model.pre_process:
            model.embedding.register_forward_hook(_scale_embedding)
        if model.post_process and self.final_logit_softcapping is not None:
            model.output_layer.register_forward_hook(functools.partial(_cap_logits, self.final_logit_softcapping))
        return model


def _scale_embedding(embedding, inputs, output: Tensor) -> Tensor:
    """Times sqrt(hidden size), rounded to the embedding's dtype as Hugging Face does."""
    return output * torch.tensor(embedding.config.hidden_size**0.5, dtype=output.dtype)


def _cap_logits(cap: float, output_layer, inputs, output: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
    logits, bias = output
    return soft_cap(logits, cap), bias


class Gemma3Attention(Gemma3SelfAttention):
    """Gemma 3's attention as Megatron-Core 0.15 calls it: with a fused cos/sin table that no training layer uses."""

    def forward(self, *args, rotary_pos_cos_sin=None, **kwargs):
        return super().forward(*args, **kwargs)


def gemma3_text_spec(config) -> ModuleSpec:
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
        self.activation_func = tanh_gelu(self)

    def configure_model(self, *args, **kwargs) -> GPTModel:
        """NeMo's model, whose rotary embedding any Megatron-Core here can call."""
        model = super().configure_model(*args, **kwargs)
        versions.let_rotary_be_called(model.rotary_pos_emb)
        return model
