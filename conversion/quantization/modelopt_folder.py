"""ModelOpt's Hugging Face layout, which `trtllm-serve` and vLLM load: config.json and hf_quant_config.json say what is quantized.

int4: two codes in a byte, of output rows 2i (low half) and 2i + 1, `[out / 2, in]`. nvfp4: two E2M1 codes along a row. Where
ModelOpt's own export says what is not so, this does not: INT4 without AWQ's scales is labelled W4A16_AWQ only with scales of one,
which the runtimes then multiply by, and a model without quantized layers is refused instead of getting a configuration without
`quant_algo`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from conversion.quantization.formats import Format, refuse_int8_cache
from conversion.quantization.stored import Quantized, StoredLinear, names_by_format, write_folder
from nemo_ext.errors import UserError

ALGORITHMS = {"fp8": "FP8", "int4": "W4A16_AWQ", "w4a8": "W4A8_AWQ", "nvfp4": "NVFP4"}


def check(form: Format, kv_cache: str | None = None) -> None:
    """Raises UserError for a format of layers or of the cache that has no layout there."""
    refuse_int8_cache(kv_cache)
    if form.name not in ALGORITHMS:
        raise UserError(f"no runtime loads {form.name} from ModelOpt's layout: use format=compressed_tensors or tensorrt_llm")


def write(folder: Path, quantized: Quantized, progress: Callable[[int, int], None] | None = None) -> None:
    """Write the model into `folder`. Raises UserError as `check` does."""
    from modelopt import __version__

    for form in quantized.plan.values():
        check(form, quantized.kv_cache)
    extra = {}
    for name, (key, value) in quantized.kv_scales().items():
        extra[f"{name}.k_proj.k_scale"] = torch.tensor([key])
        extra[f"{name}.v_proj.v_scale"] = torch.tensor([value])
    producer = {"name": "modelopt", "version": __version__}
    details = quantization(quantized)
    write_folder(folder, quantized, pack, extra, _for_config(details, producer), progress)
    content = {"producer": producer, "quantization": details}
    (folder / "hf_quant_config.json").write_text(json.dumps(content, indent=4) + "\n")


def pack(stored: StoredLinear, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A layer's tensors by the last part of their names; scales in fp32."""
    inputs = {} if stored.input is None else {"input_scale": stored.input}
    outer = {} if stored.outer is None else {"weight_scale_2": stored.outer}
    weight = stored.codes
    if stored.format.weight == "int4":
        weight = pack_int4(weight)
        inputs["pre_quant_scale"] = torch.ones(stored.codes.shape[1], dtype=dtype)
    elif stored.format.weight == "nvfp4":
        weight = weight[:, ::2] | (weight[:, 1::2] << 4)
    return {"weight": weight, "weight_scale": stored.scale, **outer, **inputs}


def pack_int4(codes: torch.Tensor) -> torch.Tensor:
    """int8 codes `[out, in]` from -8 to 7 as uint8 `[out / 2, in]`. Raises UserError for an odd number of rows."""
    if len(codes) % 2:
        raise UserError(f"a layer of {len(codes)} rows cannot be packed in pairs: exclude it")
    low, high = (codes[start::2].view(torch.uint8) & 15 for start in (0, 1))
    return low | (high << 4)


def quantization(quantized: Quantized) -> dict[str, Any]:
    """`quantization` of hf_quant_config.json. Raises UserError if nothing is quantized."""
    if not quantized.plan:
        raise UserError("no layer is quantized: there is nothing to write")
    formats = list(names_by_format(quantized.plan))
    linears = [name for name, module in quantized.model.named_modules() if isinstance(module, nn.Linear)]
    cache = {"kv_cache_quant_algo": "FP8" if quantized.kv_cache else None}
    if len(formats) == 1:
        return {**_details(formats[0][0]), **cache, "exclude_modules": [name for name in linears if name not in quantized.plan]}
    layers = {name: _details(form) for name, form in quantized.plan.items()}
    excluded = [name for name in linears if name not in quantized.plan]
    return {"quant_algo": "MIXED_PRECISION", **cache, "quantized_layers": layers, "exclude_modules": excluded}


def _details(form: Format) -> dict[str, Any]:
    details: dict[str, Any] = {"quant_algo": ALGORITHMS[form.name]}
    if form.group:
        details["group_size"] = form.group
    if form.weight == "int4":
        details |= {"has_zero_point": False, "pre_quant_scale": True}
    return details


def _for_config(details: dict[str, Any], producer: dict[str, str]) -> dict[str, Any]:
    """The same as `quantization_config` of config.json, whose names differ."""
    found = {key: value for key, value in details.items() if key not in ("exclude_modules", "kv_cache_quant_algo")}
    found |= {"ignore": details["exclude_modules"], "producer": producer, "quant_method": "modelopt"}
    if details["kv_cache_quant_algo"]:
        found["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
    return found
