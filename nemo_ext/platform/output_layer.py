"""The output layer and its cross entropy in one, on a GPU.

Megatron computes logits, Transformer Engine writes D = softmax(logits) - onehot(labels) over them, and the backward pass
multiplies that by the gradient of each token's loss, g, before the two products with it. Here:

- g is one number a token, so it is multiplied onto the rows of what D is multiplied with: with g on a diagonal, the inputs'
  gradient (g D) W is g (D W), and the weight's (g D)^T X is D^T (g X).
- D W needs no g and is made in the forward pass, so that only D^T X is left to do: D is kept for it, and nothing where the weight
  is frozen. Logits that are not kept exist in chunks of tokens, as in Wijmans et al. 2024, "Cut your losses in large-vocabulary
  language models" (arXiv:2411.09009), and Hsu et al. 2024, "Liger kernel" (arXiv:2410.10989).
- The products with D can be in FP8: D W and D^T X, not the logits. Weight and inputs are scaled by their largest magnitudes to
  e4m3. D lies in [-1, 1] and needs no search: it is written as e5m2 with a scale of 2^15, whose smallest number is then 2^-31.
  One pass writes it twice, as it is for D W and on its side for D^T X, because Hopper multiplies rows with rows in FP8.
  Logits of an FP8 product raise SmolLM2's loss by 2.3 % and change the weight's gradient: `benchmarks/output_precision.py`.

Tensor parallelism is Megatron's (Shoeybi et al. 2019, arXiv:1909.08053): the vocabulary is split, the ranks exchange a sum of
exponentials and a logit for each token, and the inputs' gradient is summed over them while the weight's is computed.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from nemo_ext import chunks
from nemo_ext.platform import gpu_megatron

SCALE = 2.0**15  # of D in e5m2, whose largest number is 1.75 x 2^15


class Products:
    """The layer's products for one micro batch, in the precision of its weight."""

    in_place = True  # whether the logits' gradient may be written over them

    def __init__(self, layer: Any, inputs: torch.Tensor, weight: torch.Tensor, learns: bool, keeps: bool) -> None:
        """
        Args:
            inputs: [tokens, hidden].
            weight: [vocabulary, hidden], of this rank.
            learns: whether there will be a backward pass.
            keeps: whether it will ask for the weight's gradient.
        """
        self.inputs, self.weight = inputs, weight
        self.chunk = min(len(inputs), len(inputs) if keeps else chunks.chunk_tokens(len(weight)))
        self.buffer = inputs.new_empty(self.chunk, len(weight))
        self.kept = self.buffer if keeps else None

    def logits(self, part: slice) -> torch.Tensor:
        """[rows of `part`, vocabulary], until it is called for the next."""
        rows = self.inputs[part]
        return torch.mm(rows, self.weight.t(), out=self.buffer[: len(rows)])

    def back(self, part: slice, logits: torch.Tensor, labels: torch.Tensor, first: int, log_sums: torch.Tensor | None,
             out: torch.Tensor) -> None:  # fmt: skip
        """D W, [rows, hidden], into `out`. The logits hold D already where `log_sums` is None."""
        if log_sums is not None:
            _kernels().gradient(logits, labels, first, log_sums, logits)
        torch.mm(logits, self.weight, out=out)

    @staticmethod
    def add_weight_gradient(kept: torch.Tensor, inputs: torch.Tensor, into: torch.Tensor | None) -> torch.Tensor:
        """into += D^T inputs, [vocabulary, hidden] in fp32; a new tensor in the inputs' precision where there is none."""
        if into is None:
            return kept.t() @ inputs
        gpu_megatron.add_weight_gradient(inputs, kept, into)
        return into


class FP8Products(Products):
    """The same with FP8 products for the gradients: e4m3, and e5m2 for those of the logits."""

    in_place = False

    def __init__(self, layer: Any, inputs: torch.Tensor, weight: torch.Tensor, learns: bool, keeps: bool) -> None:
        super().__init__(layer, inputs, weight, learns, keeps=False)
        if not learns:
            return
        self.quantized = _quantized_weight(layer, weight)
        self.rows = torch.empty_like(self.buffer, dtype=torch.float8_e5m2)
        self.kept = inputs.new_empty(len(weight), len(inputs), dtype=torch.float8_e5m2) if keeps else None

    def back(self, part: slice, logits: torch.Tensor, labels: torch.Tensor, first: int, log_sums: torch.Tensor,
             out: torch.Tensor) -> None:  # fmt: skip
        from transformer_engine.pytorch.cpp_extensions import general_gemm

        rows = self.rows[: len(logits)]
        _kernels().gradient(logits, labels, first, log_sums, rows, None if self.kept is None else self.kept[:, part], SCALE)
        operands = self.quantized, _gradients(rows, None)
        general_gemm(*operands, layout="NN", grad=True, out_dtype=out.dtype, out=out, use_split_accumulator=True)

    @staticmethod
    def add_weight_gradient(kept: torch.Tensor, inputs: torch.Tensor, into: torch.Tensor | None) -> torch.Tensor:
        from transformer_engine.pytorch.cpp_extensions import general_gemm

        operands = _quantized(inputs), _gradients(None, kept)
        dtype = inputs.dtype if into is None else into.dtype
        found, *_ = general_gemm(*operands, layout="NT", grad=True, out_dtype=dtype, accumulate=into is not None, out=into,
                                 use_split_accumulator=True)  # fmt: skip
        return found


def _quantized(values: torch.Tensor) -> Any:
    """Transformer Engine's e4m3 tensor, scaled by the largest magnitude; its transpose alone, which Hopper multiplies by."""
    import transformer_engine_torch
    from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer

    quantizer = Float8CurrentScalingQuantizer(transformer_engine_torch.DType.kFloat8E4M3, values.device)
    quantizer.internal = True
    found = quantizer(values.detach())
    found.update_usage(rowwise_usage=False, columnwise_usage=True)
    return found


def _quantized_weight(layer: Any, weight: torch.Tensor) -> Any:
    """Once a step: Megatron says which micro batch is its first, as to Transformer Engine's layers."""
    if layer.is_first_microbatch or layer.fp8_weight is None:
        layer.fp8_weight = None  # before there are two
        layer.fp8_weight, layer.is_first_microbatch = _quantized(weight), False
    return layer.fp8_weight


def _gradients(rows: torch.Tensor | None, columns: torch.Tensor | None) -> Any:
    """Transformer Engine's tensor of the logits' gradient, from e5m2."""
    import transformer_engine_torch
    from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage

    data, transposed = (None if each is None else each.view(torch.uint8) for each in (rows, columns))
    inverse = torch.full((1,), 1 / SCALE, dtype=torch.float32, device=(columns if rows is None else rows).device)
    e5m2 = transformer_engine_torch.DType.kFloat8E5M2
    return Float8TensorStorage(data=data, data_transpose=transposed, fp8_scale_inv=inverse, fp8_dtype=e5m2)


def _kernels() -> Any:
    from nemo_ext.platform import output_kernels  # imports Triton, which is where CUDA is

    return output_kernels


class OutputLoss(torch.autograd.Function):
    """The cross entropy of each token."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, layer: Any, learns: bool):
        """
        Args:
            hidden: [s, b, h]; [s / tp, b, h] with sequence parallelism.
            weight: [vocabulary / tp, h], in the same dtype.
            labels: [b, s], int64.
            layer: Megatron's `ColumnParallelLinear`.
            learns: whether there will be a backward pass.

        Returns:
            [b, s], fp32.
        """
        group = layer.tp_group
        inputs = _gathered(hidden, group) if layer.sequence_parallel else hidden
        inputs, wanted = inputs.flatten(0, 1), labels.t().flatten()
        keeps = learns and weight.requires_grad
        products = (FP8Products if hasattr(layer, "fp8_weight") else Products)(layer, inputs, weight, learns, keeps)
        first, alone = group.rank() * len(weight), group.size() == 1
        back = torch.empty_like(inputs) if learns else None
        found = inputs.new_empty(2, len(inputs), dtype=torch.float32)
        for start in range(0, len(inputs), products.chunk):
            part = slice(start, min(start + products.chunk, len(inputs)))
            logits = products.logits(part)
            at_once = learns and alone and products.in_place
            _kernels().statistics(logits, wanted[part], first, found[:, part], at_once)
            if not alone:
                _combine(found[:, part], group)
            if learns:
                products.back(part, logits, wanted[part], first, None if at_once else found[0, part], back[part])
        if learns:
            ctx.save_for_backward(weight, inputs, back, products.kept)
            ctx.layer, ctx.add_weight_gradient = layer, products.add_weight_gradient
            ctx.main_grad = getattr(weight, "main_grad", None) if layer.gradient_accumulation_fusion else None
        losses = (found[0] - found[1]).masked_fill_(wanted == _kernels().IGNORED, 0.0)
        return losses.view(labels.shape[::-1]).t().contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradients: torch.Tensor):
        weight, inputs, back, kept = ctx.saved_tensors
        layer, group, handle = ctx.layer, ctx.layer.tp_group, None
        factors = gradients.t().reshape(-1, 1)
        found = torch.mul(back, factors, out=torch.empty_like(back))
        if layer.sequence_parallel:
            whole, found = found, found.new_empty(len(found) // group.size(), found.shape[1])
            handle = torch.distributed.reduce_scatter_tensor(found, whole, group=group, async_op=True)
        elif layer.allreduce_dgrad:
            handle = torch.distributed.all_reduce(found, group=group, async_op=True)
        into_weight = None
        if kept is not None:  # behind what the other ranks wait for, as CUDA_DEVICE_MAX_CONNECTIONS=1 orders them
            scaled = torch.mul(inputs, factors, out=torch.empty_like(inputs))
            into_weight = ctx.add_weight_gradient(kept, scaled, ctx.main_grad)
            if ctx.main_grad is not None:
                into_weight = _placeholder(weight, ctx.main_grad)
        if handle is not None:
            handle.wait()
        return found.view(-1, gradients.shape[0], found.shape[1]), into_weight, None, None, None


def _gathered(mine: torch.Tensor, group: Any) -> torch.Tensor:
    """[n, ...] of each rank -> [n tp, ...]."""
    whole = mine.new_empty(len(mine) * group.size(), *mine.shape[1:])
    torch.distributed.all_gather_into_tensor(whole, mine.contiguous(), group=group)
    return whole


def _combine(found: torch.Tensor, group: Any) -> None:
    """What each rank found of its part of the vocabulary, [2, tokens], into what holds of the whole."""
    parts = _gathered(found, group)
    found[0] = parts[0::2].logsumexp(0)
    found[1] = parts[1::2].amax(0)


def _placeholder(weight: torch.Tensor, main_grad: torch.Tensor) -> torch.Tensor | None:
    """What Megatron's hook of a weight wants where `main_grad` has the gradient already: what nobody looks at, or zeros."""
    weight.main_grad = main_grad  # which a saved parameter may have lost
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    from transformer_engine.pytorch.module.base import get_dummy_wgrad

    weight.grad_added_to_main_grad = True
    return get_dummy_wgrad(list(main_grad.shape), weight.dtype, zero=getattr(weight, "zero_out_wgrad", False))


def use(model: Any, fp8: bool = False) -> None:
    """Have the last pipeline stage's output layer and loss fused, from the next micro batch on; with `fp8` its gradients in FP8.

    Before the first micro batch, which may be an evaluation's: Megatron looks once for what it tells of a step's first one.

    Args:
        model: Megatron's GPT model, or what holds one.

    Raises ValueError where the model computes more than the product and Transformer Engine's cross entropy, or not in bf16.
    """
    from megatron.core.models.gpt import GPTModel

    _patch()
    for each in model.modules():
        if isinstance(each, GPTModel) and each.post_process:
            if not fits(each):
                raise ValueError("this model's output layer is not a product in bf16 with Transformer Engine's cross entropy")
            layer = each.output_layer
            layer.fused = True
            if fp8:
                layer.fp8_weight, layer.is_first_microbatch = None, True


def fits(model: Any) -> bool:
    """Whether a GPT model's last stage computes nothing but the product and Transformer Engine's cross entropy, in bf16 on a GPU.

    Others have a bias, soft caps (hooks of the layer), an adapter in its place, or a loss of their own.
    """
    from megatron.core.models.common.language_module.language_module import LanguageModule
    from megatron.core.tensor_parallel import ColumnParallelLinear

    layer, config, weight = model.output_layer, model.config, _weight(model)
    return (
        type(layer) is ColumnParallelLinear
        and not layer._forward_hooks
        and layer.bias is None
        and not layer.gather_output
        and (layer.tp_group.size() == 1 or layer.sequence_parallel or layer.allreduce_dgrad)
        and not (model.mtp_process or config.defer_embedding_wgrad_compute or config.cpu_offloading)
        and config.cross_entropy_loss_fusion
        and config.cross_entropy_fusion_impl == "te"
        and getattr(model.compute_language_model_loss, "__func__", None) is LanguageModule.compute_language_model_loss
        and not hasattr(weight, "__fsdp_param__")
        and _computable(weight)
    )


def _weight(model: Any) -> torch.Tensor:
    return model.shared_embedding_or_output_weight() if model.share_embeddings_and_output_weights else model.output_layer.weight


def _computable(weight: torch.Tensor) -> bool:
    return weight.is_cuda and weight.dtype is torch.bfloat16


def _patch() -> None:
    """Let Megatron's GPT models give the labels to an output layer that is marked, and that layer take them.

    It is called still, for the hooks that bring its weight from other ranks.
    """
    from megatron.core.models.gpt import GPTModel
    from megatron.core.tensor_parallel import ColumnParallelLinear

    logits, upstream = ColumnParallelLinear.forward, GPTModel._postprocess
    if hasattr(upstream, "__wrapped__"):
        return

    @functools.wraps(logits)
    def forward(self, input_, weight=None, runtime_gather_output=None, labels=None):
        if labels is None:
            return logits(self, input_, weight, runtime_gather_output)
        return OutputLoss.apply(input_, self.weight if weight is None else weight, labels, self, torch.is_grad_enabled())

    @functools.wraps(upstream)
    def _postprocess(self, **inputs):
        layer = self.output_layer if self.post_process else None
        if inputs["labels"] is None or inputs.get("runtime_gather_output") or not getattr(layer, "fused", False):
            return upstream(self, **inputs)
        return layer(inputs["hidden_states"], weight=_weight(self), labels=inputs["labels"])

    ColumnParallelLinear.forward, GPTModel._postprocess = forward, _postprocess
