"""Whether an artifact that was read back is the model that was measured, module by module.

Where inputs are rounded, logits say little: another order of sums (1e-7) carries some inputs to the next code, and depth makes
as much of that as the quantization itself lost, whoever computes it. So every module of the reader's model computes the input
that the measured one got: equal inputs are rounded equally, and nothing but the order of a product's sums is left.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from conversion.quantization.reader import Read
from conversion.quantization.stored import Quantized
from nemo_ext.errors import RunError

SCALES = 4  # roundings of a weight's scale and its product that may differ


@torch.no_grad()
def weights(quantized: Quantized, model: nn.Module) -> None:
    """Compare every parameter and buffer of the reader's `model` with the measured one's: those of quantized layers to the
    rounding of their scales, all others bit by bit. Raises RunError for the first that differs."""
    for name, theirs in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        parent, _, last = name.rpartition(".")
        module = quantized.model.get_submodule(parent)
        ours, eps = getattr(module, last), 0.0
        if parent in quantized.plan and last == "weight":
            ours, eps = module.weight_quantizer(ours), SCALES * torch.finfo(ours.dtype).eps
        if ours.shape != theirs.shape or not torch.allclose(theirs, ours, rtol=eps, atol=0.0):
            raise RunError(f"read back by the format's rules, {name} is not what was measured")


@torch.no_grad()
def outputs(quantized: Quantized, found: Read, model: nn.Module, ids: torch.Tensor, allowed: float) -> tuple[torch.Tensor, float]:
    """Put `ids` `[b, s]` through the measured model, and what each module without children gets through that of the reader's
    `model` too; keys and values through the roundings of `found`.

    Returns the measured logits and the largest difference of an output, as a part of that module's largest. Raises RunError for
    the first above `allowed`. Nothing is kept of the outputs.
    """
    worst = 0.0

    def beside(name: str, other: Callable[..., Any]) -> Callable[..., None]:
        def compare(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            nonlocal worst
            theirs = other(*args, **kwargs)
            for a, b in zip(*((each,) if isinstance(each, torch.Tensor) else each for each in (output, theirs)), strict=True):
                difference = float((a.float() - b.float()).abs().max() / a.float().abs().max().clamp(min=1e-30))
                worst = max(worst, difference)
                if not difference <= allowed:
                    raise RunError(
                        f"read back by the format's rules, {name} gives something else for the same input: "
                        f"off by {difference:.3g} of its largest output, {allowed:.3g} is allowed"
                    )

        return compare

    pairs: dict[str, Callable[..., Any]] = {name: module for name, module in model.named_modules() if not list(module.children())}
    if (caches := set(quantized.kv_scales())) != set(found.kv):
        raise RunError(f"read back by the format's rules, {len(found.kv)} caches are quantized: {len(caches)} were measured")
    for name, roundings in found.kv.items():
        pairs |= {f"{name}.{which}_bmm_quantizer": rounding for which, rounding in zip("kv", roundings, strict=True)}
    handles = [
        quantized.model.get_submodule(name).register_forward_hook(beside(name, other), with_kwargs=True)
        for name, other in pairs.items()
    ]
    try:
        device = next(quantized.model.parameters()).device
        return quantized.model(ids.to(device), use_cache=False).logits.float().cpu(), worst
    finally:
        for handle in handles:
            handle.remove()
