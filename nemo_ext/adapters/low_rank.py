"""LoRA adapters' part of a linear's output, added to that output in one function of autograd.

With an adapter each for queries, keys and values (gate and up), computed one after the other, every one reads x and writes an
output of its own, which is scaled, put beside the others' and added, and each gives x a gradient of its own: more bytes are moved
for the adapters than for the frozen linears. Here the adapters' A are one matrix of all their ranks, and so are their B, zero
where a rank has no part in an output. x and the gradient are read once for each product, and the last product adds s B A x to
the linear's output in place, in fp32, with one rounding where there were three.

It holds for adapters without dropout, in one dtype with the linear, that no tensor parallel group shares.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import parallel_state
from nemo.collections.llm.peft.utils import ParallelLinearAdapter
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from nemo_ext.adapters.lora import Parts

WHOLE = ""  # the name of an adapter of all of a linear's output


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, output: Tensor, x: Tensor, names: Sequence[str], scales: Sequence[float], parts: Parts | None, *weights: Tensor
    ) -> Tensor:
        """`output` [..., out], which is written to, of x [..., in]; `weights`: every adapter's A [rank, in], then every B."""
        downs, ups = weights[: len(names)], weights[len(names) :]
        ctx.names, ctx.parts = names, parts
        ctx.ranks, ctx.widths = [len(each) for each in downs], [len(each) for each in ups]
        ctx.scale, ctx.scales = (scales[0], None) if len(set(scales)) == 1 else (1.0, scales)
        rows, down = x.reshape(-1, x.shape[-1]), torch.cat(downs) if len(downs) > 1 else downs[0]
        low = _by_columns(ctx, rows @ down.t())
        up = ups[0] if parts is None else _joint(ctx, ups, output.shape[-1])
        output.detach().view(-1, output.shape[-1]).addmm_(low, up.t(), alpha=ctx.scale)
        ctx.save_for_backward(rows, low, down, up)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        rows, low, down, up = ctx.saved_tensors
        flat = gradient.reshape(-1, gradient.shape[-1])
        of_up = _product(flat.t(), low, ctx.scale)
        of_low = _by_columns(ctx, flat @ up)
        of_x = _product(of_low, down, ctx.scale).view(*gradient.shape[:-1], -1) if ctx.needs_input_grad[1] else None
        of_downs = _product(of_low.t(), rows, ctx.scale).split(ctx.ranks)
        of_ups = [of_up]
        if ctx.parts is not None:
            blocks = _blocks(ctx, of_up)
            of_ups = [block.reshape(width, -1) for block, width in zip(blocks, ctx.widths, strict=True)]
        return gradient, of_x, None, None, None, *of_downs, *of_ups


def _product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale a b, rounded once."""
    return a.new_empty(a.shape[0], b.shape[1]).addmm_(a, b, beta=0, alpha=scale)


def _by_columns(ctx: Any, low: Tensor) -> Tensor:
    """[tokens, all ranks], in place: every adapter's times its scale, where they have several."""
    if ctx.scales is not None:
        for columns, scale in zip(low.split(ctx.ranks, dim=1), ctx.scales, strict=True):
            columns.mul_(scale)
    return low


def _joint(ctx: Any, ups: Sequence[Tensor], width: int) -> Tensor:
    """Every adapter's B as one [width, all ranks]."""
    whole = ups[0].new_zeros(width, sum(ctx.ranks))
    for block, up in zip(_blocks(ctx, whole), ups, strict=True):
        block.copy_(up.view(block.shape))
    return whole


def _blocks(ctx: Any, whole: Tensor) -> list[Tensor]:
    """Views of what every adapter has of [out, all ranks]: [groups, width of a group, rank]."""
    of_parts = ctx.parts.split(whole, 0)
    ends = list(itertools.accumulate(ctx.ranks))
    return [of_parts[name][..., end - rank : end] for name, rank, end in zip(ctx.names, ctx.ranks, ends, strict=True)]


def holds(output: Tensor, x: Tensor, adapters: Sequence[nn.Module]) -> bool:
    """Whether `add` computes what these adapters compute."""
    return (
        parallel_state.get_tensor_model_parallel_world_size() == 1
        and output.is_contiguous()
        and output.dtype == x.dtype
        and all(
            type(each) is ParallelLinearAdapter
            and type(each.activation) is nn.Identity
            and each.dropout is None
            and not (each.is_expert or each.config.cpu_offloading)
            and each.linear_in.weight.dtype == each.linear_out.weight.dtype == x.dtype
            for each in adapters
        )
    )


def add(output: Tensor, x: Tensor, adapters: Mapping[str, ParallelLinearAdapter], parts: Parts | None = None) -> Tensor:
    """A linear's output plus its adapters': `output` itself, changed.

    Args:
        output: [..., out], contiguous, which no backward pass reads.
        x: [..., in], the linear's input behind its norm.
        adapters: by their parts' names; one named `WHOLE` without `parts`.
        parts: how the parts lie in the output.
    """
    each = list(adapters.values())
    weights = [_weight(one.linear_in) for one in each] + [_weight(one.linear_out) for one in each]
    return _Add.apply(output, x, tuple(adapters), tuple(one.alpha / one.dim for one in each), parts, *weights)


def _weight(linear: nn.Module) -> Tensor:
    """A weight that is used without its module, once the module's hooks (Megatron's, which wait for updates) have run."""
    for hook in linear._forward_pre_hooks.values():
        hook(linear, ())
    return linear.weight
