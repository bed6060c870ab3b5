"""Megatron's gated MLP in FP8 with what lies between its two products quantized where it is computed.

Megatron computes SwiGLU in bf16, and Transformer Engine's second linear casts it to FP8 in rows and columns; backward the same
for the gradient that the first linear gets. Here SwiGLU and its gradient are FP8 at once (`swiglu_fp8`), by the linears' own
quantizers: scales and histories of largest values stay where they are, and so do parameters and checkpoints.

It holds for delayed scaling, SiLU, no bias, and linears that are Transformer Engine's as Megatron builds them; a module around
one (an adapter) reads values in bf16, and Megatron's way stays. It also stays where activations are recomputed in FP8, because
Transformer Engine exchanges a linear's scales in its forward pass, after SwiGLU.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import transformer_engine_torch as tex
from megatron.core.extensions import transformer_engine as megatron_te
from megatron.core.transformer.mlp import MLP
from torch.nn import functional
from transformer_engine.pytorch import distributed, quantization
from transformer_engine.pytorch.tensor.float8_tensor import Float8Quantizer, Float8Tensor
from transformer_engine.pytorch.utils import is_non_tn_fp8_gemm_supported

from nemo_ext.platform import swiglu_fp8

DTYPES = {tex.DType.kFloat8E4M3: torch.float8_e4m3fn, tex.DType.kFloat8E5M2: torch.float8_e5m2}


class Quantized(Float8Tensor):
    """An FP8 tensor between two functions of autograd that keeps its columns when Transformer Engine makes it two-dimensional."""

    def reshape(self, *shape) -> Float8Tensor:
        """The tensor as [tokens, width]. Raises ValueError for another shape."""
        rows = self._data.reshape(*shape)
        if rows.dim() != 2 or rows.shape[1] != self.shape[-1]:
            raise ValueError(f"{tuple(self.shape)} in FP8 is made [tokens, {self.shape[-1]}] only, not {tuple(rows.shape)}")
        columns = None if self._transpose is None else self._transpose.flatten(1)
        return _tensor(Float8Tensor, self.dtype, rows, columns, self._scale_inv, self._quantizer)


class SwiGLU(torch.autograd.Function):
    """[s, b, 2 x width] -> [s, b, width] in FP8, and its gradient in FP8."""

    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor, quantizer: Float8Quantizer, of_gradient: Float8Quantizer,
                columns: bool, columns_of_gradient: bool) -> Float8Tensor:  # fmt: skip
        """`columns`, `columns_of_gradient`: whether the second and the first linear's weight has a gradient."""
        ctx.save_for_backward(gate_up)
        ctx.quantizer, ctx.columns = of_gradient, columns_of_gradient
        values = swiglu_fp8.forward(gate_up.flatten(0, -2), DTYPES[quantizer.dtype], quantizer.scale, quantizer.amax, columns)
        return _wrap(Float8Tensor, gate_up, *values, quantizer)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple:
        (gate_up,) = ctx.saved_tensors
        quantizer = ctx.quantizer
        values = swiglu_fp8.backward(
            gradient.contiguous().flatten(0, -2), gate_up.flatten(0, -2),
            DTYPES[quantizer.dtype], quantizer.scale, quantizer.amax, ctx.columns,
        )  # fmt: skip
        return _wrap(Quantized, gate_up, *values, quantizer), None, None, None, None


def _wrap(kind, like, rows, columns, inverse, quantizer) -> Float8Tensor:
    """[tokens, width] rows and [width, tokens] columns as a tensor of the sequences and batch of `like`, [s, b, ...]."""
    outer = like.shape[:-1]
    columns = None if columns is None else columns.view(torch.uint8).unflatten(1, outer)
    return _tensor(kind, like.dtype, rows.view(torch.uint8).unflatten(0, outer), columns, inverse, quantizer)


def _tensor(kind, dtype, rows, columns, inverse, quantizer) -> Float8Tensor:
    return kind(
        shape=rows.shape, dtype=dtype, data=rows, data_transpose=columns,
        fp8_scale_inv=inverse, fp8_dtype=quantizer.dtype, quantizer=quantizer,
    )  # fmt: skip


def install() -> None:
    """Let Megatron's MLP run so where that holds."""
    upstream = MLP.forward
    if hasattr(upstream, "__wrapped__"):
        return

    @functools.wraps(upstream)
    def forward(self, hidden_states, per_token_scale=None):
        if per_token_scale is not None or not (_is_plain(self) and _is_scaled_by_history(self)):
            return upstream(self, hidden_states, per_token_scale)
        return _forward(self, hidden_states)

    MLP.forward = forward


def _forward(mlp: MLP, hidden: torch.Tensor) -> tuple[torch.Tensor, None]:
    if not torch.cuda.is_current_stream_capturing():
        swiglu_fp8.check()
    first, second = mlp.linear_fc1, mlp.linear_fc2
    gate_up, _ = first(hidden)
    learns = torch.is_grad_enabled()
    values = SwiGLU.apply(
        gate_up, _quantizer(second, True), _quantizer(first, False),
        learns and second.weight.requires_grad, learns and first.weight.requires_grad,
    )  # fmt: skip
    out = second(values)
    if learns:  # what Transformer Engine does with values that it quantized itself: the backward pass needs the columns only
        values.update_usage(rowwise_usage=False)
    return out


def _is_plain(mlp: MLP) -> bool:
    config, first, second = mlp.config, mlp.linear_fc1, mlp.linear_fc2
    return (
        type(first) in (megatron_te.TELayerNormColumnParallelLinear, megatron_te.TEColumnParallelLinear)
        and type(second) is megatron_te.TERowParallelLinear
        and not (first.use_bias or second.use_bias)
        and mlp.activation_func is functional.silu
        and config.gated_linear_unit
        and config.bias_activation_fusion
        and not (config.use_te_activation_func or config.activation_func_fp8_input_store)
        and not (config.cpu_offloading or config.tp_comm_overlap)
    )


def _is_scaled_by_history(mlp: MLP) -> bool:
    """Whether both linears are about to run in FP8 with delayed scaling; their quantizers are there then."""
    state = quantization.FP8GlobalStateManager
    if not state.is_fp8_enabled() or is_non_tn_fp8_gemm_supported():  # the latter: products that need no columns (Blackwell)
        return False
    if distributed.is_fp8_activation_recompute_enabled() or distributed.in_fp8_activation_recompute_phase():
        return False
    if not state.get_fp8_recipe().delayed():
        return False
    for each in (mlp.linear_fc1, mlp.linear_fc2):  # as its first forward pass would, so that a continued run's is as all others
        each.init_fp8_metadata()
    return True


def _quantizer(linear: Any, of_input: bool) -> Float8Quantizer:
    if of_input:
        return linear.quantizers["scaling_fwd"][tex.FP8FwdTensors.GEMM1_INPUT]
    return linear.quantizers["scaling_bwd"][tex.FP8BwdTensors.GRAD_OUTPUT1]
