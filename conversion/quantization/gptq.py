"""GPTQ (Frantar et al. 2022): weights are rounded column by column, and the columns to come make up for the error.

The layer's squared error over the calibration inputs X `[tokens, in]` has the Hessian H = 2 X^T X for every row of the weight.
When column q is rounded with the error e_q = (w_q - quant(w_q)) / [H^-1]_qq, the best change of the columns F not yet rounded is
-e_q [H_F^-1]_q,:, which the rows of the upper Cholesky factor U of H^-1 = U^T U give for all q at once: -(w_q - quant(w_q)) /
U_qq * U_q,: (equations 2 to 4 and algorithm 1 of the paper). A group's scale is taken from its columns as they are when the first
one is reached.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from conversion.quantization import layers
from conversion.quantization.arithmetic import over
from conversion.quantization.formats import GROUPS, INT4_MAX, Format
from nemo_ext.errors import RunError, UserError

DAMPING = 0.01  # of the Hessian's mean diagonal, as in the paper
BLOCK = max(GROUPS)  # columns that are updated at once


@torch.no_grad()
def quantize(
    model: nn.Module,
    plan: Mapping[str, Format],
    ids: torch.Tensor,
    batch: int,
    dtype: torch.dtype,
    progress: Callable[[int], None] | None = None,
) -> dict[str, torch.Tensor]:
    """Round the INT4 layers of `plan` in place, decoder layer after decoder layer, each with the inputs that the rounded ones
    before it give. Returns their scales, {name: [out, in / group]}, rounded to `dtype`. `progress` counts decoder layers.

    Raises UserError for a layer outside the decoder's stack, RunError if a Hessian cannot be inverted.
    """
    prefix, stack = next(
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] == "layers"
    )
    chosen = [name for name, form in plan.items() if form.weight == "int4"]
    if outside := [name for name in chosen if not name.startswith(f"{prefix}.")]:
        raise UserError(f"{outside[0]} is not in the decoder's layers, which GPTQ goes through: exclude it")
    parts = ids.to(next(model.parameters()).device).split(batch)
    hidden, settings = _first_inputs(model, stack, parts)
    scales: dict[str, torch.Tensor] = {}
    for i, layer in enumerate(stack):
        inside = [name for name in chosen if name.startswith(f"{prefix}.{i}.")]
        hessians = _hessians(model, inside, lambda i=i, layer=layer, hidden=hidden: _run(layer, hidden, settings[i]))
        for name in inside:
            linear, group = model.get_submodule(name), plan[name].group
            weight, scales[name] = quantize_weight(linear.weight.float(), hessians[name], group, dtype, name)
            linear.weight.copy_(weight)
        hidden = _run(layer, hidden, settings[i])
        if progress:
            progress(i + 1)
    return scales


def quantize_weight(
    weight: torch.Tensor, hessian: torch.Tensor, group: int, dtype: torch.dtype, name: str = "the layer"
) -> tuple[torch.Tensor, torch.Tensor]:
    """`weight` (fp32 `[out, in]`) on its INT4 grid, and the scales `[out, in / group]` of that. `hessian` is X^T X up to a
    factor.

    Raises RunError, with `name`, for a Hessian that is not positive definite even when damped.
    """
    work, result = weight.clone(), torch.empty_like(weight)
    upper = _upper_factor(hessian.to(weight.device), name)
    scales = torch.empty(len(weight), weight.shape[1] // group, device=weight.device)
    for first in range(0, weight.shape[1], BLOCK):
        last = min(first + BLOCK, weight.shape[1])
        errors = torch.empty(len(weight), last - first, device=weight.device)
        for q in range(first, last):
            if q % group == 0:
                largest = work[:, q : q + group].abs().amax(1)  # whole: groups do not cross blocks
                scale = over(largest, INT4_MAX).to(dtype).float().clamp(min=torch.finfo(dtype).smallest_normal)
                scales[:, q // group] = scale
            scale = scales[:, q // group]
            result[:, q] = (work[:, q] / scale).round().clamp(-8, 7) * scale
            error = (work[:, q] - result[:, q]) / upper[q, q]
            work[:, q + 1 : last] -= error[:, None] * upper[q, q + 1 : last]
            errors[:, q - first] = error
        work[:, last:] -= errors @ upper[first:last, last:]
    return result, scales


def _upper_factor(hessian: torch.Tensor, name: str) -> torch.Tensor:
    """The upper U of H^-1 = U^T U, H damped; inputs that are always zero get a diagonal of their own."""
    damped = hessian.double()
    diagonal = damped.diagonal()
    diagonal[diagonal == 0] = 1.0
    diagonal += DAMPING * diagonal.mean()
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
        return torch.linalg.cholesky(inverse, upper=True).float()
    except RuntimeError as error:
        raise RunError(f"{name}: the inputs' Hessian cannot be inverted: calibrate on more text") from error


def _first_inputs(
    model: nn.Module, stack: nn.ModuleList, parts: tuple[torch.Tensor, ...]
) -> tuple[list[torch.Tensor], list[list[dict[str, Any]]]]:
    """What goes into the first decoder layer for each part, and by layer and part the other arguments (masks, positions)."""
    hidden: list[torch.Tensor] = []
    settings: list[list[dict[str, Any]]] = [[] for _ in stack]

    def record(i: int) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if i == 0:
                hidden.append(args[0] if args else kwargs["hidden_states"])
            settings[i].append({key: value for key, value in kwargs.items() if key != "hidden_states"})

        return hook

    handles = [layer.register_forward_pre_hook(record(i), with_kwargs=True) for i, layer in enumerate(stack)]
    try:
        for part in parts:
            model(part, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return hidden, settings


def _run(layer: nn.Module, hidden: list[torch.Tensor], settings: list[dict[str, Any]]) -> list[torch.Tensor]:
    outputs = [layer(each, **setting) for each, setting in zip(hidden, settings, strict=True)]
    return [each[0] if isinstance(each, tuple) else each for each in outputs]


def _hessians(model: nn.Module, names: list[str], run: Callable[[], Any]) -> dict[str, torch.Tensor]:
    """X^T X of each layer's inputs while `run` goes; layers that read the same input share it."""
    found: dict[str, torch.Tensor] = {}
    handles = []
    for members in layers.groups(names):
        linear = model.get_submodule(members[0])
        total = torch.zeros(linear.in_features, linear.in_features, device=linear.weight.device)
        found |= dict.fromkeys(members, total)

        def add(module: nn.Module, args: tuple, total: torch.Tensor = total) -> None:
            inputs = args[0].flatten(0, -2).float()
            total.addmm_(inputs.T, inputs)

        handles.append(linear.register_forward_pre_hook(add))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found
