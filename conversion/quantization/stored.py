"""What an artifact stores of a quantized model: integer codes and scales, read from ModelOpt's quantizers layer by layer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from conversion import safetensors_io, shards
from conversion.dtypes import NAMES
from conversion.nemo_folder import TOKENIZER_FILES
from conversion.quantization import arithmetic
from conversion.quantization.arithmetic import over
from conversion.quantization.formats import E2M1_MAX, FP8_MAX, INT4_MAX, INT8_MAX, NVFP4_BLOCK, Format

MAX_SHARD_BYTES = 5 * 10**9
Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class StoredLinear:
    """A linear layer's weight as codes, and its scales in fp32 unless said otherwise.

    `codes` `[out, in]`: E4M3 for fp8, int8 for int8 and int4 (-8 to 7), uint8 E2M1 codes for nvfp4. `scale`: [] for fp8, `[out]`
    for int8, `[out, in / group]` for int4, E4M3 `[out, in / 16]` for nvfp4. `outer`: the scale of the whole tensor of w4a8 (the
    weight that int4 gives is rounded to E4M3 with it) and nvfp4 (it multiplies `scale`). `input`: the activation's scale.
    """

    format: Format
    codes: torch.Tensor
    scale: torch.Tensor
    outer: torch.Tensor | None = None
    input: torch.Tensor | None = None


@dataclass(frozen=True)
class Quantized:
    """A model with ModelOpt's quantizers, what is quantized how, the dtype of everything else, and where it came from."""

    model: nn.Module
    plan: Mapping[str, Format]
    dtype: torch.dtype
    source: Path
    config: Mapping[str, Any]  # config.json of the source
    kv_cache: str | None = None  # fp8 or int8

    def linear(self, name: str) -> StoredLinear:
        """The layer `name` of the plan."""
        module, form = self.model.get_submodule(name), self.plan[name]
        return encode(form, module.weight.detach().float(), module.weight_quantizer, module.input_quantizer)

    def others(self) -> dict[str, torch.Tensor]:
        """Every other parameter as it is stored; an output layer tied to the embedding is left out, as the format wants it."""
        found: dict[str, torch.Tensor] = {}
        seen: set[int] = set()
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if name.removesuffix(".weight") not in self.plan and parameter.data_ptr() not in seen:
                seen.add(parameter.data_ptr())
                found[name] = parameter.detach().to(self.dtype).cpu()
        return found

    def kv_scales(self) -> dict[str, tuple[float, float]]:
        """{attention module: scales of its keys and values}, empty without a quantized cache."""
        if not self.kv_cache:
            return {}
        largest = {"fp8": FP8_MAX, "int8": INT8_MAX}[self.kv_cache]
        return {
            name: (float(module.k_bmm_quantizer.amax) / largest, float(module.v_bmm_quantizer.amax) / largest)
            for name, module in self.model.named_modules()
            if hasattr(module, "k_bmm_quantizer")
        }


def encode(form: Format, weight: torch.Tensor, weight_quantizer: Any, input_quantizer: Any) -> StoredLinear:
    """The codes of `weight` (fp32 `[out, in]`) under ModelOpt's quantizers."""
    inputs = None
    if form.activation in ("fp8", "int8"):
        inputs = over(input_quantizer.amax.reshape(()), FP8_MAX if form.activation == "fp8" else INT8_MAX)
    if form.weight == "nvfp4":
        codes, scale, outer = encode_nvfp4(weight, weight_quantizer.amax)
        inputs = over(input_quantizer.amax.reshape(()), E2M1_MAX * FP8_MAX)
        return StoredLinear(form, codes, scale, outer, inputs)
    if form.name == "w4a8":
        blocks, whole = weight_quantizer
        outer = over(whole.amax.reshape(()), FP8_MAX)
    else:
        blocks, outer = weight_quantizer, None
    amax = blocks.amax
    if form.weight == "fp8":
        scale = over(amax.reshape(()), FP8_MAX)
        return StoredLinear(form, (weight / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale, outer, inputs)
    if form.weight == "int8":
        scale = over(amax.reshape(-1), INT8_MAX)
        codes = (weight / scale[:, None]).round().clamp(-128, 127)
    else:
        scale = over(amax.reshape(len(weight), -1), INT4_MAX)
        codes = (weight.unflatten(1, (-1, form.group)) / scale[..., None]).round().clamp(-8, 7).flatten(1)
    return StoredLinear(form, codes.to(torch.int8), scale, outer, inputs)


def encode_nvfp4(weight: torch.Tensor, amax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """NVFP4's codes, the scales of blocks and the scale of the tensor."""
    scale, outer = arithmetic.nvfp4_scales(weight, NVFP4_BLOCK, amax)
    step = (scale.float() * outer).repeat_interleave(NVFP4_BLOCK, 1)
    return arithmetic.e2m1_codes(torch.where(step > 0, weight / step, 0.0)), scale, outer


def write_folder(
    folder: Path,
    quantized: Quantized,
    pack: Callable[[StoredLinear, torch.dtype], Tensors],
    extra: Tensors,
    quantization_config: dict[str, Any],
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a Hugging Face folder: tensors (`pack` names and packs those of a layer), config.json with `quantization_config`,
    tokenizer and generation_config.json. `progress(done, total)` counts layers."""
    others = {**quantized.others(), **extra}
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in others.items()}
    for name in quantized.plan:  # shapes without keeping the packed tensors
        packed = pack(quantized.linear(name), quantized.dtype)
        specs |= {f"{name}.{key}": (tensor.dtype, tuple(tensor.shape)) for key, tensor in packed.items()}
    laid_out = shards.lay_out(specs, MAX_SHARD_BYTES)
    places = {}
    for shard in laid_out:
        places |= safetensors_io.create(folder / shard.file, {name: specs[name] for name in shard.tensors})
    if len(laid_out) > 1:
        shards.write_index(folder, laid_out, specs, None)
    for name, tensor in others.items():
        places[name].write(tensor.cpu())
    for done, name in enumerate(quantized.plan, 1):
        for key, tensor in pack(quantized.linear(name), quantized.dtype).items():
            places[f"{name}.{key}"].write(tensor.cpu())
        if progress:
            progress(done, len(quantized.plan))
    config = {**quantized.config, "quantization_config": quantization_config}
    config.pop("dtype", None)
    config["torch_dtype"] = NAMES[quantized.dtype]
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in TOKENIZER_FILES:
        if (quantized.source / name).is_file():
            shutil.copyfile(quantized.source / name, folder / name)


def names_by_format(plan: Mapping[str, Format]) -> Iterator[tuple[Format, list[str]]]:
    """The formats of a plan with their layers."""
    for form in dict.fromkeys(plan.values()):
        yield form, [name for name, each in plan.items() if each == form]
