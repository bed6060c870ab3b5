"""The compressed-tensors format (github.com/vllm-project/compressed-tensors), which vLLM and transformers load.

`pack-quantized` (int4): eight codes plus 8 in an int32, the first in the lowest bits, along a row. `int-quantized` and
`float-quantized`: the codes as they are. `nvfp4-pack-quantized`: two E2M1 codes in a byte, the first in the low half; its scale
of the whole tensor is stored as what the weight was multiplied by. Several formats in one model are `mixed-precision`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from conversion.quantization.formats import Format, refuse_int8_cache
from conversion.quantization.stored import Quantized, StoredLinear, names_by_format, write_folder
from nemo_ext.errors import UserError

LAYOUTS = {"fp8": "float-quantized", "int8": "int-quantized", "int4": "pack-quantized", "nvfp4": "nvfp4-pack-quantized"}
VERSION = "0.12.2"  # of the layout that is written


def check(form: Format, kv_cache: str | None = None) -> None:
    """Raises UserError for a format of layers or of the cache that has no layout there."""
    refuse_int8_cache(kv_cache)
    if form.name not in LAYOUTS:
        raise UserError(f"compressed-tensors has no {form.name} with calibrated inputs: use format=modelopt or tensorrt_llm")


def write(folder: Path, quantized: Quantized, progress: Callable[[int, int], None] | None = None) -> None:
    """Write the model into `folder`. Raises UserError as `check` does."""
    for form in quantized.plan.values():
        check(form, quantized.kv_cache)
    extra = {}
    for name, (key, value) in quantized.kv_scales().items():
        extra[f"{name}.k_scale"] = torch.tensor([key], dtype=quantized.dtype)
        extra[f"{name}.v_scale"] = torch.tensor([value], dtype=quantized.dtype)
    write_folder(folder, quantized, pack, extra, quantization_config(quantized), progress)


def pack(stored: StoredLinear, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A layer's tensors by the last part of their names; scales in `dtype`."""
    inputs = {} if stored.input is None else {"input_scale": stored.input.reshape(1).to(dtype)}
    if stored.format.weight == "int4":
        packed = pack_int4(stored.codes)
        shape = torch.tensor(stored.codes.shape, dtype=torch.int64)
        return {"weight_packed": packed, "weight_scale": stored.scale.to(dtype), "weight_shape": shape}
    if stored.format.weight == "nvfp4":
        return {
            "weight_packed": stored.codes[:, ::2] | (stored.codes[:, 1::2] << 4),
            "weight_scale": stored.scale,
            "weight_global_scale": 1 / stored.outer.reshape(1),
            "input_global_scale": 1 / stored.input.reshape(1),
        }
    scale = stored.scale.reshape(1) if stored.format.weight == "fp8" else stored.scale[:, None]
    return {"weight": stored.codes, "weight_scale": scale.to(dtype), **inputs}


def pack_int4(codes: torch.Tensor) -> torch.Tensor:
    """int8 codes `[out, in]` from -8 to 7 as int32 `[out, in / 8]`."""
    shifted = (codes.int() + 8).unflatten(1, (-1, 8))
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=codes.device)
    return (shifted << shifts).sum(-1, dtype=torch.int32)


def quantization_config(quantized: Quantized) -> dict[str, Any]:
    """`quantization_config` of config.json."""
    formats = list(names_by_format(quantized.plan))
    alone = len(formats) == 1
    config_groups = {
        f"group_{i}": {
            "targets": ["Linear"] if alone else names,
            "weights": _weights(form),
            "input_activations": _inputs(form),
            "output_activations": None,
            "format": LAYOUTS[form.name],
        }
        for i, (form, names) in enumerate(formats)
    }
    linears = [name for name, module in quantized.model.named_modules() if isinstance(module, nn.Linear)]
    scheme = _args(8, "float", "tensor") if quantized.kv_cache else None
    return {
        "quant_method": "compressed-tensors",
        "version": VERSION,
        "format": LAYOUTS[formats[0][0].name] if alone else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": config_groups,
        "ignore": [name for name in linears if name not in quantized.plan],
        "kv_cache_scheme": scheme,
    }


def _weights(form: Format) -> dict[str, Any]:
    if form.weight == "int4":
        return _args(4, "int", "group", form.group)
    if form.weight == "nvfp4":
        return _args(4, "float", "tensor_group", form.group)
    return _args(8, "float", "tensor") if form.weight == "fp8" else _args(8, "int", "channel")


def _inputs(form: Format) -> dict[str, Any] | None:
    if form.activation is None:
        return None
    if form.activation == "nvfp4":
        return _args(4, "float", "tensor_group", form.group, dynamic="local")
    return _args(8, "float" if form.activation == "fp8" else "int", "tensor")


def _args(bits: int, kind: str, strategy: str, group: int | None = None, dynamic: bool | str = False) -> dict[str, Any]:
    return {"num_bits": bits, "type": kind, "strategy": strategy, "group_size": group, "symmetric": True, "dynamic": dynamic}
