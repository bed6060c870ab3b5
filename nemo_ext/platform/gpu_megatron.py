"""Three things that Megatron-Core would do faster on a GPU if it were told to; none changes what is computed.

- A micro batch's weight gradients are added to the fp32 buffer by the product itself, neither written nor read again in bf16.
  Transformer Engine's linears do that when `gradient_accumulation_fusion` is on, but Megatron and NeMo turn it on only where they
  find apex's extension `fused_weight_gradient_mlp_cuda`, which no wheel brings, because Megatron's output layer calls it. Under
  that name they find Transformer Engine's product here.
- Transformer Engine's cross entropy looks whether its gradient is the number 1, for which it copies a 1 to the GPU and waits for
  everything before it. It is a tensor of the tokens' weights here, and Megatron says only in a graph that it need not look.
- SwiGLU's gradient in bf16 is a kernel that torch.compile makes: 2.2 to 2.4 TB/s on an H100. Transformer Engine's makes 3.0.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import sys
import types
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

EXTENSION = "fused_weight_gradient_mlp_cuda"


def bring_weight_gradient() -> None:
    """Let Megatron import apex's extension where it is missing. Before Megatron is imported; needs Transformer Engine."""
    if importlib.util.find_spec(EXTENSION) is not None or importlib.util.find_spec("transformer_engine") is None:
        return
    module = types.ModuleType(EXTENSION)
    module.__spec__ = importlib.machinery.ModuleSpec(EXTENSION, None)
    module.wgrad_gemm_accum_fp32 = add_weight_gradient
    sys.modules[EXTENSION] = module


def add_weight_gradient(inputs: torch.Tensor, gradients: torch.Tensor, into: torch.Tensor) -> None:
    """into += gradients^T inputs.

    Args:
        inputs: [tokens, in], bf16 or fp16.
        gradients: [tokens, out], of the same dtype.
        into: [out, in], fp32, changed in place.
    """
    from transformer_engine.pytorch.cpp_extensions import general_gemm

    general_gemm(inputs, gradients, layout="NT", grad=True, out_dtype=into.dtype, accumulate=True, out=into)


def let_loss_run_on() -> None:
    """Tell Transformer Engine's cross entropy not to look whether its gradient is 1. Imports Megatron's models."""
    from megatron.core.models.common.language_module import language_module

    upstream = language_module.te_parallel_cross_entropy
    if upstream is None or hasattr(upstream, "__wrapped__"):
        return

    @functools.wraps(upstream)
    def te_parallel_cross_entropy(logits, labels, tp_group, is_cg_capturable=True):
        return upstream(logits, labels, tp_group, True)

    language_module.te_parallel_cross_entropy = te_parallel_cross_entropy


def bring_swiglu_gradient() -> None:
    """Let Megatron's SwiGLU take Transformer Engine's kernel for its gradient, where there is one."""
    if importlib.util.find_spec("transformer_engine") is None:
        return
    import transformer_engine.pytorch  # noqa: F401  loads the next
    import transformer_engine_torch
    from megatron.core.fusions.fused_bias_swiglu import SwiGLUFunction

    def backward(ctx, gradient):
        (gate_up,) = ctx.saved_tensors
        return transformer_engine_torch.dswiglu(gradient, gate_up.to(ctx.ori_input_dtype), None), None, None

    SwiGLUFunction.backward = staticmethod(backward)
