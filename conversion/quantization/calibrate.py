"""A model quantized by ModelOpt 0.37, whose forward pass computes what the artifact will.

Two passes. The first, for AWQ (Lin et al. 2023) and SmoothQuant (Xiao et al. 2022), finds scales between inputs and weights; they
are folded into the float model, so that no format needs scales of its own for them. The second quantizes the folded model with
plain maxima. What a runtime computes as one product shares its scales, and scales are rounded to the dtype that they are stored
in, both before anything is measured.
"""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from conversion.quantization import arithmetic, layers
from conversion.quantization.formats import E2M1_MAX, FP8_MAX, INT4_MAX, INT8_MAX, Format

Progress = Callable[[int], None]
PASSES = {"awq_lite": 2, "smoothquant": 1}  # AWQ collects statistics, then tries its scales
SMOOTHQUANT_ALPHA = 0.5  # the paper's; ModelOpt's own default of 1 leaves the weights all of the difficulty


class Batches:
    """Windows of token ids, `[n, s]`, that go through a model some at a time; each is told to `progress`."""

    def __init__(self, ids: torch.Tensor, batch: int, progress: Progress | None = None) -> None:
        self.ids, self.batch, self._progress, self._done = ids, batch, progress, 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        for part in self.ids.split(self.batch):
            yield part
            self._done += len(part)
            if self._progress:
                self._progress(self._done)

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> None:
        device = next(model.parameters()).device
        for part in self:
            model(part.to(device), use_cache=False)


def smooth(model: nn.Module, plan: Mapping[str, Format], algorithm: str, batches: Batches, dtype: torch.dtype) -> int:
    """Find the scales of `algorithm` (awq_lite or smoothquant) for the layers of `plan` and fold them into `model`, in place.

    Returns how many groups of layers were scaled. Raises UserError for a model that cannot be folded.
    """
    folds = layers.folds(model)
    settings: Any = {"method": "smoothquant", "alpha": SMOOTHQUANT_ALPHA} if algorithm == "smoothquant" else algorithm
    searched = copy.deepcopy(model)
    _modelopt(searched, _config(plan, settings), batches)
    scales = {
        model.get_submodule(name): module.input_quantizer._pre_quant_scale.detach().float().reshape(-1)
        for name, module in searched.named_modules()
        if hasattr(getattr(module, "input_quantizer", None), "_pre_quant_scale")
    }
    del searched
    found = [(fold, [scales[reader] for reader in fold.readers if reader in scales]) for fold in folds]
    for fold, each in found:
        if each:
            layers.apply(fold, torch.stack(each).log().mean(0).exp(), dtype)
    return sum(bool(each) for _, each in found)


def quantize(
    model: nn.Module,
    plan: Mapping[str, Format],
    batches: Batches,
    dtype: torch.dtype,
    kv_cache: str | None = None,
    scales: Mapping[str, torch.Tensor] | None = None,
) -> nn.Module:
    """Put ModelOpt's quantizers into `model` for the layers of `plan`, in place, with maxima found by `batches`.

    Everything that is not quantized is rounded to `dtype`. `kv_cache` (fp8 or int8) quantizes keys and values by a calibrated
    scale, FP8 by 1 where that is larger: its range is wide enough, and what is larger than calibrated is not cut off. `scales`:
    those of groups that are known already, {layer: [out, in / group]}, and not taken from the weight.
    """
    for name, parameter in model.named_parameters():
        if name.removesuffix(".weight") not in plan:
            parameter.data = parameter.data.to(dtype).to(parameter.dtype)
    needs_text = bool(kv_cache) or any(each.activation for each in plan.values())
    _modelopt(model, _config(plan, "max", kv_cache), batches if needs_text else None)
    for module in model.modules():
        if getattr(module, "_amax", None) is not None:
            module._amax = module._amax.float()  # a multiple of its scale has more bits than the weights of some models
    for members in layers.groups(list(plan)):
        _share([model.get_submodule(name) for name in members])
    for name, scale in (scales or {}).items():
        quantizer = model.get_submodule(name).weight_quantizer
        quantizer.amax = (scale * INT4_MAX).view_as(quantizer.amax)
    for name, each in plan.items():
        module = model.get_submodule(name)
        inner = module.weight_quantizer if each.name == "w4a8" else [module.weight_quantizer]
        for quantizer in [*inner, module.input_quantizer]:
            if quantizer.is_enabled:
                _make_invertible(quantizer) if quantizer.num_bits == (2, 1) else _round_scale(quantizer, dtype)
    if kv_cache:
        for module in model.modules():
            if hasattr(module, "k_bmm_quantizer"):
                pair = (module.k_bmm_quantizer, module.v_bmm_quantizer)
                largest = torch.stack([each.amax.float().reshape(()) for each in pair]).max()
                for quantizer in pair:  # one scale for both, as TensorRT-LLM has it
                    quantizer.amax = largest.clamp(min=FP8_MAX) if kv_cache == "fp8" else largest
                    _round_scale(quantizer, dtype)
    return model


def _config(plan: Mapping[str, Format], algorithm: Any, kv_cache: str | None = None) -> dict[str, Any]:
    """ModelOpt's dictionary; patterns are matched in order and later ones win."""
    quantizers: dict[str, Any] = {"default": {"enable": False}, "*": {"enable": False}}
    for name, each in plan.items():
        quantizers[f"{name}.weight_quantizer"], quantizers[f"{name}.input_quantizer"] = each.modelopt()
    if kv_cache:
        quantizers["*[kv]_bmm_quantizer"] = {"num_bits": (4, 3) if kv_cache == "fp8" else 8, "axis": None, "enable": True}
    return {"quant_cfg": quantizers, "algorithm": algorithm}


def _modelopt(model: nn.Module, config: dict[str, Any], batches: Batches | None) -> None:
    import modelopt.torch.quantization as mtq

    arithmetic.install()
    with contextlib.redirect_stdout(io.StringIO()):
        mtq.quantize(model, config, batches)


def _round_scale(quantizer: nn.Module, dtype: torch.dtype) -> None:
    """Make the quantizer's scale one that `dtype` has: amax is the scale times the largest code, which fp32 holds exactly."""
    largest = {(4, 3): FP8_MAX, 8: INT8_MAX, 4: INT4_MAX}[quantizer.num_bits]
    scale = arithmetic.over(quantizer.amax, largest).to(dtype).float().clamp(min=torch.finfo(dtype).smallest_normal)
    quantizer.amax = scale * largest


def _make_invertible(quantizer: nn.Module) -> None:
    """Make NVFP4's fp32 scale of the tensor the next larger one that is the reciprocal of its reciprocal, which is what
    compressed-tensors stores; of others a bit is lost, and blocks on a boundary get another scale."""
    while (scale := arithmetic.over(quantizer.amax.float(), E2M1_MAX * FP8_MAX)) != 1 / (1 / scale):
        quantizer.amax = torch.nextafter(quantizer.amax.float(), torch.full_like(quantizer.amax.float(), torch.inf))


def _share(modules: list[nn.Module]) -> None:
    """One scale for inputs and for weights that have one a tensor: the largest of the group's."""
    for part in ("input_quantizer", "weight_quantizer"):
        quantizers = [getattr(module, part) for module in modules]
        if part == "weight_quantizer" and isinstance(quantizers[0], nn.Sequential):
            quantizers = [each[-1] for each in quantizers]
        amax = [each.amax for each in quantizers if each.is_enabled and each.amax is not None and each.amax.numel() == 1]
        if len(amax) > 1:
            largest = torch.stack([each.reshape(()) for each in amax]).max()
            for each in quantizers:
                each.amax = largest.clone()
