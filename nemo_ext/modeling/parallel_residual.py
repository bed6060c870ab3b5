"""A layer whose attention and MLP both read the norm of the layer's input: x + attention(norm(x)) + mlp(norm(x))."""

from __future__ import annotations

from typing import Any

from megatron.core import tensor_parallel
from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.utils import make_viewless_tensor
from nemo.collections.llm.gpt.model.base import transformer_engine_layer_spec
from torch import Tensor


class ParallelResidualLayer(TransformerLayer):
    """Megatron's layer with one norm, `input_layernorm`: [s, b, h] -> [s, b, h]."""

    def forward(self, hidden_states: Tensor, context: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """`kwargs` are the attention's (mask, rotary embeddings, packing); without cross attention, `context` passes through."""
        for unused in ("context_mask", "dynamic_inference_decode_only", "padding_mask"):  # the last is for experts
            kwargs.pop(unused, None)
        normed = self.input_layernorm(hidden_states)
        attention = self.self_attention(normed, **kwargs)  # (output, bias)
        mlp = tensor_parallel.checkpoint(self.mlp, False, normed) if self.recompute_mlp else self.mlp(normed)
        with self.bias_dropout_add_exec_handler():
            for branch, bias_dropout_add in ((attention, self.self_attn_bda), (mlp, self.mlp_bda)):
                add = bias_dropout_add(self.training, self.config.bias_dropout_fusion)
                hidden_states = add(branch, hidden_states, self.hidden_dropout)
        return make_viewless_tensor(hidden_states, requires_grad=hidden_states.requires_grad, keep_graph=True), context


def parallel_residual_spec(config) -> ModuleSpec:
    """NeMo's Transformer Engine layer with the norm taken out of the linear layers, as both share it."""
    spec = transformer_engine_layer_spec(config)
    spec.module = ParallelResidualLayer
    spec.submodules.input_layernorm = TENorm
    spec.submodules.self_attention.submodules.linear_qkv = TEColumnParallelLinear
    spec.submodules.mlp.submodules.linear_fc1 = TEColumnParallelLinear
    return spec
