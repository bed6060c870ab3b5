"""AdaLoRA (Zhang et al. 2023, arXiv:2303.10512) as a NeMo transform: W x + alpha / rank P diag(E) Q x.

P `[out, rank]` and Q `[rank, in]` are kept near orthogonal and E `[rank]` is cut down while training
(`nemo_ext.callbacks.rank_allocation`). As in PEFT there is one adapter for each linear of the Hugging Face model, P and Q begin
as N(0, 0.02) and E as zero, and the scale stays that of the first rank: alpha / (rank + 1e-5).

Tensor parallel ranks hold P's rows where the linear's output is split and Q's columns where its input is; the other one and E are
replicated. What goes over the wire is the rank-wide product between the two, not the hidden states.

Importing this module imports NeMo; call `nemo_ext.platform.activate()` first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import mappings
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from nemo.collections.llm.peft.utils import get_adapter_attributes_from_linear
from torch import Tensor, nn

from nemo_ext.adapters.initial import generator
from nemo_ext.adapters.lora import PARTS, CanonicalLoRA

DEVIATION = 0.02  # of P and Q at the start
MATRICES = ("left", "values", "right")  # P, E and Q


@dataclass
class AdaLoRA(CanonicalLoRA):
    """One P diag(E) Q for each linear that Hugging Face has; `dim` is the rank at the start."""

    def adapter(self, m: nn.Module, width: int, part: str, full_name: str) -> nn.Module:
        """The adapter of `width` of m's output features."""
        linear = full_name.rsplit(".", 1)[-1]
        return SVDAdapter(m, width, PARTS.get(linear, {}).get(part, linear), self.dim, self.alpha, self.dropout)


class SVDAdapter(nn.Module):
    """P diag(E) Q beside a linear, this rank's part of it: [s, b, in] -> [s, b, out], both as the linear has them.

    Beside its weights a checkpoint has, per element, how much the loss depends on it and how uncertain that is
    (`left_importance`, `left_uncertainty`, ...; fp32), and `kept` `[rank]`, 0 where a singular value was cut.
    """

    def __init__(self, linear: nn.Module, width: int, target: str, rank: int, alpha: float, dropout: float):
        """`width` are all output features of the part `target` ("linear_q") of Megatron's `linear`."""
        super().__init__()
        config, self.target, self.rank = linear.config, target, rank
        self.input_is_parallel, inputs, _, gathered, _ = get_adapter_attributes_from_linear(linear)
        self.sequence_parallel = config.sequence_parallel
        self.gathered = config.sequence_parallel and gathered  # the linear hands on all tokens
        self.scale = alpha / (rank + 1e-5)
        self.dropout = nn.Dropout(dropout)
        # Megatron's fused gate and up have a rank's share of both side by side
        self.gate_and_up = target == "linear_fc1" and config.gated_linear_unit
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        self.inputs, self.outputs = inputs, width
        split = (width, inputs // ranks) if self.input_is_parallel else (width // ranks, inputs)
        device = next(linear.parameters()).device
        for name, shape in zip(MATRICES, ((split[0], rank), (rank,), (rank, split[1])), strict=True):
            parameter = nn.Parameter(torch.zeros(shape, dtype=config.params_dtype, device=device))
            if name == self.sharded:
                set_tensor_model_parallel_attributes(parameter, True, self.axis, 1)
            elif config.sequence_parallel:
                parameter.sequence_parallel = True  # its gradient is of this rank's tokens: Megatron adds them up
            setattr(self, name, parameter)
            for statistic in ("importance", "uncertainty"):
                self.register_buffer(f"{name}_{statistic}", torch.zeros(shape, device=device))
        self.register_buffer("kept", torch.ones(rank, device=device))

    @property
    def sharded(self) -> str:
        """Which matrix tensor parallel ranks share."""
        return "right" if self.input_is_parallel else "left"

    @property
    def axis(self) -> int:
        """Along which axis they do: Q's inputs, P's outputs."""
        return 1 if self.input_is_parallel else 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(x)
        if self.input_is_parallel:
            inner = nn.functional.linear(x, self.right)
            if self.sequence_parallel:
                inner = mappings.reduce_scatter_to_sequence_parallel_region(inner)
            else:
                inner = mappings.reduce_from_tensor_model_parallel_region(inner)
            return nn.functional.linear(inner * (self.values * self.scale), self.left)
        if self.gathered:  # each rank its own tokens, as where the linear gathers them itself
            ranks = parallel_state.get_tensor_model_parallel_world_size()
            x = x.chunk(ranks)[parallel_state.get_tensor_model_parallel_rank()]
        inner = nn.functional.linear(x, self.right) * (self.values * self.scale)
        if self.sequence_parallel:
            inner = mappings.gather_from_sequence_parallel_region(inner)
        else:
            inner = mappings.copy_to_tensor_model_parallel_region(inner)
        return nn.functional.linear(inner, self.left)

    def matrices(self) -> Iterator[tuple[str, nn.Parameter]]:
        """("left", P), ("values", E), ("right", Q)."""
        for name in MATRICES:
            yield name, getattr(self, name)

    @torch.no_grad()
    def draw(self, words: str) -> None:
        """The first P and Q, determined by `words` alone."""
        for name, shape in (("left", (self.outputs, self.rank)), ("right", (self.rank, self.inputs))):
            whole = torch.randn(shape, generator=generator(f"{words} {name}")) * DEVIATION
            getattr(self, name).copy_(self.part(whole) if name == self.sharded else whole)

    def part(self, whole: Tensor) -> Tensor:
        """This rank's share of the shared matrix."""
        ranks, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
        if self.gate_and_up:
            return torch.cat([half.chunk(ranks, self.axis)[rank] for half in whole.chunk(2, self.axis)], self.axis)
        return whole.chunk(ranks, self.axis)[rank]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Weights and statistics, each with how tensor parallel ranks share it."""
        names = [self.sharded, f"{self.sharded}_importance", f"{self.sharded}_uncertainty"]
        axes = dict.fromkeys(names, self.axis)
        state = make_sharded_tensors_for_checkpoint(self.state_dict(prefix="", keep_vars=True), prefix, axes, sharded_offsets)
        if self.gate_and_up and not self.input_is_parallel:
            for name in names:
                state[prefix + name] = apply_swiglu_sharded_factory(state[prefix + name], sharded_offsets)
        return state

    def _apply(self, *arguments: Any, **options: Any) -> nn.Module:
        """Move and cast the weights; statistics keep their precision."""
        before = dict(self.named_buffers())
        super()._apply(*arguments, **options)
        for name, buffer in before.items():
            setattr(self, name, buffer.to(getattr(self, name).device))
        return self
