"""FlashAttention-4 in the place of Transformer Engine's attention, on Hopper.

The package is flash-attn-4 (Zadouri et al. 2026, arXiv:2603.05451), whose kernels for Hopper follow FlashAttention-3 (Shah et al.
2024, arXiv:2407.08608) in NVIDIA's CuTe DSL. It compiles one at its first use, for a type, a size of heads, packed rows or not,
and keeps it in the user's cache for the next process.

The kernels take any strides, so queries, keys and values go in as Megatron has them, [s, b, heads, d], and the output and the
gradients are written so too. What is kept for the backward pass is what Transformer Engine keeps: these, the output, and a sum of
exponentials a row and head. Parameters, checkpoints and FP8's state of the layer stay Transformer Engine's.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from torch.autograd.function import once_differentiable

from nemo_ext import flash_attention
from nemo_ext.errors import UserError

CACHE = "FLASH_ATTENTION_CUTE_DSL_CACHE"  # environment: the package's, ..._ENABLED and ..._DIR


@functools.cache
def _kernels() -> tuple[Any, Any]:
    """The package's functions of the forward and the backward pass, which take where to write."""
    home = os.environ.get("LLM_BUILDER_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llm-builder"
    os.environ.setdefault(f"{CACHE}_ENABLED", "1")
    os.environ.setdefault(f"{CACHE}_DIR", str(Path(home) / "flash_attention"))
    from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd

    return _flash_attn_fwd, _flash_attn_bwd


class CausalAttention(torch.autograd.Function):
    """softmax(scale Q K^T) V, where a position sees itself and those before it: [s, b, heads, d] or, packed, [tokens, heads, d].

    Keys and values may have fewer heads than queries, which share them then (grouped-query attention).
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, ends: torch.Tensor | None,
        deterministic: bool,
    ) -> torch.Tensor:  # fmt: skip
        """`ends`: where the packed sequences begin and the last one ends, int32 [sequences + 1]."""
        attend, _ = _kernels()
        out = torch.empty_like(query)
        _, sums, *_ = attend(
            *_batches(query, key, value), cu_seqlens_q=ends, cu_seqlens_k=ends, softmax_scale=scale, causal=True,
            return_lse=any(ctx.needs_input_grad), out=_batches(out)[0],
        )  # fmt: skip
        ctx.save_for_backward(query, key, value, out, sums, ends)
        ctx.scale, ctx.deterministic = scale, deterministic
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple:
        query, key, value, out, sums, ends = ctx.saved_tensors
        gradients = [torch.empty_like(each) for each in (query, key, value)]
        of_query, of_key, of_value = _batches(*gradients)
        _, attend_backward = _kernels()
        attend_backward(
            *_batches(query, key, value, out, gradient), sums, ctx.scale, True, cu_seqlens_q=ends, cu_seqlens_k=ends,
            deterministic=ctx.deterministic, dq=of_query, dk=of_key, dv=of_value,
        )  # fmt: skip
        return *gradients, None, None, None


def _batches(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """[s, b, heads, d] as [b, s, heads, d], of the same memory; packed ones as they are."""
    return [each.transpose(0, 1) if each.dim() == 4 else each for each in tensors]


class FlashAttention(TEDotProductAttention):
    """Megatron's attention by FlashAttention-4, and by Transformer Engine in calls that this does not hold for."""

    @classmethod
    def fits(cls, layer: TEDotProductAttention) -> bool:
        """Whether the layer is one that FlashAttention-4 computes here: causal, with nothing added to its scores."""
        config = layer.config
        return (
            layer.attention_type == "self"
            and layer.attn_mask_type == "causal"
            and layer.qkv_format == "sbhd"
            and layer.window_size in (None, (-1, 0))
            and layer.softmax_type == "vanilla"
            and not layer.return_max_logit
            and not layer.attention_dropout
            and layer.hidden_size_per_attention_head_k in flash_attention.HEADS
            and layer.hidden_size_per_attention_head_v == layer.hidden_size_per_attention_head_k
            and config.context_parallel_size == 1
            and not (config.fp8_dot_product_attention or config.fp8_multi_head_attention)
        )

    @classmethod
    def adopt(cls, layer: TEDotProductAttention) -> None:
        """Make a layer one of these, in place."""
        layer.__class__ = cls

    def forward(self, query, key, value, attention_mask, attn_mask_type, attention_bias=None, packed_seq_params=None):
        """[s, b, heads, d] -> [s, b, heads * d]; packed [tokens, heads, d] -> [tokens, heads * d]."""
        if not holds(query, key, attn_mask_type, attention_bias, packed_seq_params):
            return super().forward(query, key, value, attention_mask, attn_mask_type, attention_bias, packed_seq_params)
        ends = packed_seq_params.cu_seqlens_q if packed_seq_params else None
        with self.prepare_forward_ctx(query, num_gemms=3, allow_non_contiguous=True):  # FP8's state, as Transformer Engine has it
            # a part of the joint projection, as the values may be, would keep all of it in memory
            inputs = (each.contiguous() for each in (query, key, value))
            out = CausalAttention.apply(*inputs, self.fused_attention.softmax_scale, ends, self.deterministic)
        return out.flatten(-2)


def holds(query: torch.Tensor, key: torch.Tensor, mask: AttnMaskType, bias: torch.Tensor | None, packed: Any) -> bool:
    """Whether a call is one that FlashAttention-4 computes: a causal one of 16 bits whose keys are those of its queries."""
    return (
        query.dtype in (torch.bfloat16, torch.float16)
        and mask == AttnMaskType.causal
        and bias is None
        and len(query) == len(key)
        and (packed is None or (packed.qkv_format == "thd" and packed.cu_seqlens_q_padded is None))
    )


def use(model: torch.nn.Module) -> int:
    """Give a model's layers that it fits to FlashAttention-4. Returns how many. Raises UserError where the machine cannot."""
    if (lacking := flash_attention.missing()) is not None:
        raise UserError(f"attention=flash4: this machine {lacking}")
    layers = [layer for layer in model.modules() if type(layer) is TEDotProductAttention and FlashAttention.fits(layer)]
    for layer in layers:
        FlashAttention.adopt(layer)
    return len(layers)
