"""DoRA (Liu et al. 2024, arXiv:2402.09353) as a NeMo transform: the rows of W + s B A stretched to trained magnitudes.

As in PEFT there is one adapter for each linear of the Hugging Face model: A `[rank, in]`, B `[out, rank]` and a magnitude m
`[out]`, which begins as the lengths of W's rows. With n the lengths of the rows of W + s B A, taken as constants by the gradient
(section 4.3 of the paper), the linear computes

    W x + b + (m / n - 1) W x + m / n s B A x

A bias b, and a norm behind the linear, are left as they are. Dropout is of the x in the two last terms, as in PEFT.

W + s B A is never made. Row by row, n^2 = |W|^2 + 2 s (W A^T) . B + s^2 (B A A^T) . B, which costs what `rank` tokens cost, and
|W|^2 is taken once. Magnitudes and lengths are fp32 in every precision: rounded to bf16, the model would not begin as its base.

Tensor parallel ranks share B and m where the linear's output is split, and A where its input is; the others are replicated. They
exchange the rank-wide A x, and where the input is split the rows' lengths.

NeMo's own DoRA has one adapter for Megatron's fused linears, stretches biases and what norms behind a linear return, and applies
the norm of an input twice where there is dropout.

Importing this module imports NeMo; call `nemo_ext.platform.activate()` first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import mappings
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from nemo.collections.llm.gpt.model.gemma2 import TERowParallelLinearLayerNorm
from nemo.collections.llm.peft.canonical_lora import ModuleDict
from nemo.collections.llm.peft.utils import get_adapter_attributes_from_linear
from nemo.lightning.pytorch.callbacks.peft import AdapterWrapper
from torch import Tensor, nn

from nemo_ext.adapters.lora import CanonicalLoRA, Parts

A, B, MAGNITUDE = "linear_in.weight", "linear_out.weight", "weight_magnitude"


class Matrix(nn.Module):
    """A parameter `weight` that is had by a call: Megatron waits for a module's parameters when it is called."""

    def __init__(self, shape: tuple[int, int], linear: nn.Module):
        """Zeros where `linear` is and as its configuration says."""
        super().__init__()
        device = next(linear.parameters()).device
        self.weight = nn.Parameter(torch.zeros(shape, dtype=linear.config.params_dtype, device=device))

    def forward(self) -> Tensor:
        return self.weight


class DoRAAdapter(nn.Module):
    """A, B and magnitudes beside one linear of the Hugging Face model; this rank's part of them.

    `weight_magnitude` is fp32 `[out]`. The dimensions below are of one expert, of which there may be more
    (`nemo_ext.adapters.moe_dora`): A is `[experts * rank, in]`, B `[out, experts * rank]`.
    """

    def __init__(
        self, linear: nn.Module, width: int, target: str, rank: int, alpha: float, dropout: float, experts: int = 1
    ) -> None:
        """`width` are all output features of the part `target` ("linear_q") of Megatron's `linear`."""
        super().__init__()
        self.input_is_parallel, inputs, _, gathered, _ = get_adapter_attributes_from_linear(linear)
        self.sequence_parallel = linear.config.sequence_parallel
        self.gathered = self.sequence_parallel and gathered  # the linear hands on all tokens
        self.experts, self.scale = experts, alpha / rank
        self.dropout = nn.Dropout(dropout)
        # Megatron's fused gate and up have a rank's share of both side by side
        self.gate_and_up = target == "linear_fc1" and linear.config.gated_linear_unit
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        self.inputs, outputs = (inputs // ranks, width) if self.input_is_parallel else (inputs, width // ranks)
        self.linear_in = Matrix((experts * rank, self.inputs), linear)
        self.linear_out = Matrix((outputs, experts * rank), linear)
        self.share(self.linear_in.weight, 1 if self.input_is_parallel else None)
        self.share(self.linear_out.weight, None if self.input_is_parallel else 0)
        self.squares: Tensor | None = None  # |W|^2 of the rows, once the weights are where they stay

    def share(self, parameter: nn.Parameter, axis: int | None) -> None:
        """Note along which axis tensor parallel ranks share a parameter; None for one that all have."""
        set_tensor_model_parallel_attributes(parameter, axis is not None, -1 if axis is None else axis, 1)
        if axis is None and self.sequence_parallel:
            parameter.sequence_parallel = True  # its gradient is of this rank's tokens: Megatron adds them up

    def begin(self, weight: Tensor) -> None:
        """Take the lengths of the rows of the frozen `weight` `[groups, rows, in]` as magnitudes."""
        lengths = self._squares(weight).sqrt()
        self.weight_magnitude = nn.Parameter(lengths if self.experts == 1 else lengths.repeat(self.experts, 1))
        self.share(self.weight_magnitude, None if self.input_is_parallel else self.weight_magnitude.dim() - 1)

    def forward(self, x: Tensor, plain: Tensor, weight: Tensor) -> Tensor:
        """What is added to the linear's output W x + b: [s, b, in] -> [s, b, out], both as the linear has them.

        `plain` is W x `[s, b, out]`, and `weight` this rank's part of W, `[groups, rows, in]`.
        """
        if self.gathered:  # each rank its own tokens, as where the linear gathers them itself
            x = x.chunk(parallel_state.get_tensor_model_parallel_world_size())[parallel_state.get_tensor_model_parallel_rank()]
        gate = self.gate(x)
        if self.training and self.dropout.p:
            x = self.dropout(x)
            plain = self._product(x, weight)
        a, b = self.linear_in(), self.linear_out()
        ratio = self.weight_magnitude.view(self.experts, -1) / self.lengths(a, b, weight)
        inner = self.leave(self.weigh(self.enter(x, a), gate))
        stretched = b.unflatten(1, (self.experts, -1)) * (self.scale * ratio.T)[..., None]
        update = F.linear(inner, stretched.flatten(1).to(b.dtype))
        return torch.addcmul(update, self.mix((ratio - 1).to(b.dtype), gate), plain)

    def gate(self, x: Tensor) -> Tensor | None:
        """What each expert weighs, [s, b, experts]; a plain DoRA has one."""
        return None

    def weigh(self, inner: Tensor, gate: Tensor | None) -> Tensor:
        """The experts' A x, [s, b, experts * rank], as each weighs."""
        return inner

    def mix(self, each: Tensor, gate: Tensor | None) -> Tensor:
        """The experts' factors of W x, [experts, out], as each weighs: [s, b, out], or [out] for all tokens."""
        return each[0]

    def enter(self, x: Tensor, matrix: Tensor) -> Tensor:
        """`matrix` x, of all tokens or, with sequence parallelism, of this rank's: [s, b, in] -> [s, b, narrow]."""
        narrow = F.linear(x, matrix)
        if not self.input_is_parallel:
            return narrow
        if self.sequence_parallel:
            return mappings.reduce_scatter_to_sequence_parallel_region(narrow)
        return mappings.reduce_from_tensor_model_parallel_region(narrow)

    def leave(self, narrow: Tensor) -> Tensor:
        """What `enter` gave, for a product with this rank's rows of the output."""
        if self.input_is_parallel:
            return narrow
        if self.sequence_parallel:
            return mappings.gather_from_sequence_parallel_region(narrow)
        return mappings.copy_to_tensor_model_parallel_region(narrow)

    @torch.no_grad()
    def lengths(self, a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
        """n, the lengths of the rows of W + s B A: fp32 [experts, out]."""
        if self.squares is None:
            self.squares = self._squares(weight)
        along = torch.matmul(weight, a.T).flatten(0, 1)  # W A^T
        along, b = (each.unflatten(1, (self.experts, -1)).transpose(0, 1).float() for each in (along, b))
        a = a.unflatten(0, (self.experts, -1)).float()
        change = (b * (2 * self.scale * along + self.scale**2 * (b @ (a @ a.mT)))).sum(-1)
        return (self.squares + self._over_inputs(change)).clamp_min(torch.finfo(torch.float32).tiny).sqrt()

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """A, B and magnitudes, each with how tensor parallel ranks share it."""
        own = dict(self.named_parameters())
        axes = {name: parameter.partition_dim for name, parameter in own.items() if parameter.tensor_model_parallel}
        state = make_sharded_tensors_for_checkpoint(own, prefix, axes, sharded_offsets)
        if self.gate_and_up:
            for name in (B, MAGNITUDE):
                state[prefix + name] = apply_swiglu_sharded_factory(state[prefix + name], sharded_offsets)
        return state

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        """W x: [s, b, out] as the linear has it."""
        if self.input_is_parallel:
            return self.enter(x, weight.flatten(0, 1))
        return F.linear(self.leave(x), weight.flatten(0, 1))

    def _squares(self, weight: Tensor) -> Tensor:
        """|W|^2 of the rows: fp32 [out]."""
        lengths = torch.linalg.vector_norm(weight.detach(), dim=-1, dtype=torch.float32)
        return self._over_inputs(lengths.square().flatten())

    def _over_inputs(self, value: Tensor) -> Tensor:
        """A sum over the inputs, of which a rank has its own."""
        if self.input_is_parallel:
            torch.distributed.all_reduce(value, group=parallel_state.get_tensor_model_parallel_group())
        return value

    def _apply(self, function: Callable[[Tensor], Tensor], *arguments: Any, **options: Any) -> nn.Module:
        """Move and cast A and B; magnitudes keep their precision."""
        magnitude = self.weight_magnitude.data
        super()._apply(function, *arguments, **options)
        self.weight_magnitude.data = magnitude.to(self.weight_magnitude.device)
        return self


class DoRALinear(AdapterWrapper):
    """A linear with a `DoRAAdapter` for all of its output, or for some of its `parts` (`ModuleDict` of `adapter_q`, ...)."""

    def __init__(self, to_wrap: nn.Module, adapter: nn.Module, parts: Parts | None = None):
        super().__init__(to_wrap, adapter)
        self.parts = parts
        for name, weight in self._split(to_wrap.weight, 0).items():
            self._adapters()[name].begin(weight)

    def forward(self, x: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        post_norm = getattr(self.to_wrap, "post_layernorm", None)
        if post_norm is None:
            output, bias, x = self.base_linear_forward(x, *arguments, **options)
        else:
            output, bias = super(TERowParallelLinearLayerNorm, self.to_wrap).forward(x, *arguments, **options)
        inside = self.to_wrap.bias if bias is None else None  # Transformer Engine has an empty tensor for none
        plain = self._split(output - inside if inside is not None and inside.numel() else output, -1)
        weights, x = self._split(self.to_wrap.weight, 0), x.contiguous()
        adapters = self._adapters().items()
        changes = {name: adapter(x, plain[name].flatten(-2), weights[name]) for name, adapter in adapters}
        output = output + (changes[""] if self.parts is None else self.parts.join(changes))
        return (output if post_norm is None else post_norm(output)), bias

    def _adapters(self) -> Mapping[str, DoRAAdapter]:
        return {"": self.adapter} if self.parts is None else self.adapter

    def _split(self, tensor: Tensor, dim: int) -> dict[str, Tensor]:
        """Views of what the adapters adapt, the axis `dim` of output features as [groups, width]."""
        if self.parts is None:
            return {"": tensor.unflatten(dim, (1, -1))}
        return {name: part for name, part in self.parts.split(tensor, dim).items() if name in self.adapter}


@dataclass
class DoRA(CanonicalLoRA):
    """One DoRA for each linear that Hugging Face has; the arguments are CanonicalLoRA's."""

    def adapter(self, m: nn.Module, width: int, part: str, full_name: str) -> nn.Module:
        """The adapter of `width` of m's output features."""
        return DoRAAdapter(m, width, *self.of(part, full_name), self.dropout)

    def whole(self, m: nn.Module, adapter: nn.Module) -> nn.Module:
        return DoRALinear(m, adapter)

    def split(self, m: nn.Module, adapters: ModuleDict, parts: Parts) -> nn.Module:
        return DoRALinear(m, adapters, parts)
