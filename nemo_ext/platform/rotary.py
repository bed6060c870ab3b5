"""Queries, keys and values out of their joint projection, rotated, in one kernel; and the joint gradient in one.

Megatron splits the projection, copies queries and values into shape, and calls Transformer Engine's rotary kernel for queries and
for keys; backward it joins the three gradients. That reads and writes each number two to three times, these kernels do once. What
is computed is the same: x cos(a) + rotate_half(x) sin(a) in fp32 (Su et al. 2021, arXiv:2104.09864).

Megatron has this path as `fused_single_qkv_rope`, with a kernel of Transformer Engine's, and refuses to run where it does not
hold. Here it is taken at each call where it holds: self-attention of Megatron's own class, whole rotated heads without norms of
queries and keys, no packed conversations, no inference.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import _yarn_get_concentration_factor_from_config
from megatron.core.transformer import attention as megatron_attention
from megatron.core.transformer.identity_op import IdentityOp

TOKENS = 16  # of a program


@triton.jit
def _kernel(joint, query, key, value, cosines, sines, tokens, batch, groups,
            HEADS: tl.constexpr, DIM: tl.constexpr, TOKENS: tl.constexpr, BACKWARD: tl.constexpr):  # fmt: skip
    group = tl.program_id(0)
    t = tl.program_id(1).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    d = tl.arange(0, DIM)[None, :]
    other = (d + DIM // 2) % DIM
    inside = t[:, None] < tokens
    at = (t // batch)[:, None] * DIM
    cosine = tl.load(cosines + at + d, mask=inside, other=0.0)
    sine = tl.load(sines + at + (other if BACKWARD else d), mask=inside, other=0.0)
    sine = tl.where((d < DIM // 2) == BACKWARD, sine, -sine)
    row = t * groups + group
    for head in tl.static_range(HEADS + 2):
        joined = joint + (row * (HEADS + 2) + head)[:, None] * DIM
        if head < HEADS:
            alone = query + (row * HEADS + head)[:, None] * DIM
        elif head == HEADS:
            alone = key + row[:, None] * DIM
        else:
            alone = value + row[:, None] * DIM
        if BACKWARD:
            source, target = alone, joined
        else:
            source, target = joined, alone
        values = tl.load(source + d, mask=inside, other=0.0)
        if head <= HEADS:
            turned = tl.load(source + other, mask=inside, other=0.0)
            values = (values.to(tl.float32) * cosine + turned.to(tl.float32) * sine).to(values.dtype)
        tl.store(target + d, values, mask=inside)


def _run(joint, query, key, value, cosines, sines, backward: bool) -> None:
    s, b, groups, dim = key.shape
    heads = query.shape[2] // groups
    _kernel[groups, triton.cdiv(s * b, TOKENS)](
        joint, query, key, value, cosines, sines, s * b, b, groups, HEADS=heads, DIM=dim, TOKENS=TOKENS, BACKWARD=backward
    )  # fmt: skip


class Split(torch.autograd.Function):
    """[s, b, groups, (heads of a group + 2) x d] -> rotated [s, b, heads, d] and [s, b, groups, d], and [s, b, groups, d]."""

    @staticmethod
    def forward(ctx: Any, joint: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, sizes: list[int]):
        """`cosines`, `sines`: of the angles [s, 1, 1, d], fp32; `sizes`: how the last dimension of `joint` is split."""
        s, b, groups, _ = joint.shape
        dim = sizes[1]
        query = joint.new_empty(s, b, groups * sizes[0] // dim, dim)
        key, value = joint.new_empty(s, b, groups, dim), joint.new_empty(s, b, groups, dim)
        _run(joint.contiguous(), query, key, value, cosines, sines, False)
        ctx.save_for_backward(cosines, sines)
        ctx.shape = joint.shape
        return query, key, value

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        joint = gradients[0].new_empty(ctx.shape)
        _run(joint, *(each.contiguous() for each in gradients), *ctx.saved_tensors, True)
        return joint, None, None, None


def split(joint: torch.Tensor, angles: torch.Tensor, _: torch.Tensor, sizes: list[int]) -> tuple[torch.Tensor, ...]:
    """`Split` as Megatron calls Transformer Engine's; the angles of keys are those of queries in self-attention.

    Their cosines and sines are kept with the angles, which Megatron keeps for all layers and steps.
    """
    if not hasattr(angles, "cosines_and_sines"):
        angles.cosines_and_sines = angles.cos().contiguous(), angles.sin().contiguous()
    return Split.apply(joint, *angles.cosines_and_sines, sizes)


_UPSTREAM = megatron_attention.Attention.forward, getattr(megatron_attention, "apply_fused_qkv_rotary_pos_emb", None)


@functools.wraps(_UPSTREAM[0])
def _forward(self, *args, **kwargs):
    self.config.fused_single_qkv_rope = _holds(self, **kwargs)
    return _UPSTREAM[0](self, *args, **kwargs)


def install() -> None:
    """Let Megatron's self-attention split and rotate so where that holds."""
    megatron_attention.Attention.forward, megatron_attention.apply_fused_qkv_rotary_pos_emb = _forward, split


def remove() -> None:
    """Let it do as upstream again."""
    megatron_attention.Attention.forward, megatron_attention.apply_fused_qkv_rotary_pos_emb = _UPSTREAM


def _holds(attention: Any, rotary_pos_emb: Any = None, packed_seq_params: Any = None, inference_context: Any = None,
           inference_params: Any = None, **_: Any) -> bool:  # fmt: skip
    config, dim = attention.config, attention.hidden_size_per_attention_head
    return (
        type(attention) is megatron_attention.SelfAttention
        and isinstance(rotary_pos_emb, torch.Tensor)
        and rotary_pos_emb.dtype == torch.float32
        and rotary_pos_emb.shape[1:] == (1, 1, dim)
        and dim & (dim - 1) == 0
        and packed_seq_params is None
        and inference_context is None
        and inference_params is None
        and all(norm is None or isinstance(norm, IdentityOp) for norm in (attention.q_layernorm, attention.k_layernorm))
        and config.apply_rope_fusion
        and not (config.rotary_interleaved or config.flash_decode or config.test_mode or config.no_rope_freq)
        and _yarn_get_concentration_factor_from_config(config) == 1.0
    )
