"""Reads a quantized folder back by its format's rules alone, and computes its logits with a plain model of transformers.

Nothing here uses what wrote the folder, nor ModelOpt, nor torch's FP8: packed codes are taken apart with numpy, E4M3 and E2M1
numbers are made from their bits, and inputs are rounded by arithmetic. What was written wrongly is therefore not read wrongly the
same way.

E4M3 (Micikevicius et al. 2022): sign, four bits of exponent with bias 7, three of mantissa, no infinity, largest 448.
E2M1 (OCP Microscaling Formats 1.0): sign, two bits of exponent with bias 1, one of mantissa, largest 6.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from conversion import safetensors_io
from nemo_ext.errors import RunError, UserError

Round = Callable[[torch.Tensor], torch.Tensor]
PACKED = ("weight_packed", "weight_scale", "weight_shape", "weight_global_scale", "weight_scale_2", "input_scale",
          "input_global_scale", "pre_quant_scale", "k_scale", "v_scale")  # fmt: skip


@dataclass
class Read:
    """`weights`: every parameter of the model in fp32 by its name. `inputs`: by layer, what rounds its input. `kv`: by attention
    module, what rounds its keys and its values."""

    weights: dict[str, torch.Tensor]
    inputs: dict[str, Round] = field(default_factory=dict)
    kv: dict[str, tuple[Round, Round]] = field(default_factory=dict)


def read(folder: Path) -> Read:
    """The model in a compressed-tensors or ModelOpt folder. Raises UserError for another one, RunError for tensors that do not
    fit."""
    config = json.loads((folder / "config.json").read_text())
    method = (config.get("quantization_config") or {}).get("quant_method")
    layers = {"compressed-tensors": _compressed, "modelopt": _modelopt}.get(method)
    if layers is None:
        raise UserError(f"{folder} has no quantization_config of compressed-tensors or modelopt")
    stored: dict[str, dict[str, np.ndarray]] = {}
    found, cache = Read({}), {}
    for name, info in safetensors_io.open_folder(folder).items():
        parent, _, last = name.rpartition(".")
        stored.setdefault(parent, {})[last] = to_numpy(info.read())
    for parent, tensors in stored.items():
        if not any(last in PACKED for last in tensors):
            found.weights |= {f"{parent}.{last}" if parent else last: torch.from_numpy(value) for last, value in tensors.items()}
            continue
        attention = parent.removesuffix(".k_proj").removesuffix(".v_proj")
        scales = {which: tensors.pop(f"{which}_scale") for which in "kv" if f"{which}_scale" in tensors}
        if scales:
            cache.setdefault(attention, {}).update({which: to_fp8(scale) for which, scale in scales.items()})
        if (bias := tensors.pop("bias", None)) is not None:
            found.weights[f"{parent}.bias"] = torch.from_numpy(bias)
        if tensors:
            try:
                weight, rounding = layers(parent, tensors, config["quantization_config"])
            except (KeyError, ValueError) as error:
                raise RunError(
                    f"{folder}: the tensors of {parent} ({', '.join(tensors)}) do not fit its format: {error}"
                ) from error
            found.weights[f"{parent}.weight"] = torch.from_numpy(np.ascontiguousarray(weight, dtype=np.float32))
            if rounding:
                found.inputs[parent] = rounding
    found.kv = {attention: (roundings["k"], roundings["v"]) for attention, roundings in cache.items()}
    return found


def load(folder: Path, **like: Any) -> tuple[Read, nn.Module]:
    """What is in `folder`, and the model that computes with it; `like`: `build`'s dtype and device."""
    found = read(folder)
    return found, build(json.loads((folder / "config.json").read_text()), found, **like)


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """fp32 logits `[b, s, vocabulary]` of a model that was built here for ids `[b, s]`."""
    return model(ids.to(next(model.parameters()).device), use_cache=False).logits.float().cpu()


def build(
    config: Mapping[str, Any], found: Read, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> nn.Module:
    """transformers' model of `config` with the weights and roundings of `found`, which computes in `dtype` on `device`."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    rest = {
        key: value for key, value in config.items() if key not in ("torch_dtype", "dtype", "model_type", "quantization_config")
    }
    settings = AutoConfig.for_model(config["model_type"], **rest)
    model = AutoModelForCausalLM.from_config(settings, dtype=dtype, attn_implementation="sdpa").eval()
    tied = settings.tie_word_embeddings and "lm_head.weight" not in found.weights
    loaded = model.load_state_dict(found.weights, strict=False)
    missing = [name for name in loaded.missing_keys if not (tied and name == "lm_head.weight")]
    if missing or loaded.unexpected_keys:
        raise RunError(f"the artifact lacks {missing[:2]} and has {loaded.unexpected_keys[:2]} that the model does not")
    model.to(device)
    for name, rounding in found.inputs.items():
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, rounding=rounding: (rounding(args[0]), *args[1:])
        )
    if found.kv:
        pairs = {model.get_submodule(name): pair for name, pair in found.kv.items()}
        plain = ALL_ATTENTION_FUNCTIONS["sdpa"]

        def attention(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            key_rounding, value_rounding = pairs[module]
            return plain(module, query, key_rounding(key), value_rounding(value), *args, **kwargs)

        ALL_ATTENTION_FUNCTIONS.register("sdpa_of_a_reader", attention)
        model.config._attn_implementation_internal = "sdpa_of_a_reader"
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

        ALL_MASK_ATTENTION_FUNCTIONS.register("sdpa_of_a_reader", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    return model


def e4m3(x: torch.Tensor) -> torch.Tensor:
    """The nearest E4M3 number, ties to even, larger ones to 448."""
    _, exponent = torch.frexp(x.float())
    step = _power((exponent - 4).clamp(min=-9))  # three bits after the leading one; 2^-9 below 2^-6
    return (torch.round(x.float() / step) * step).clamp(-448.0, 448.0)


def e2m1(x: torch.Tensor) -> torch.Tensor:
    """The nearest E2M1 number, ties to even, larger ones to 6."""
    _, exponent = torch.frexp(x.float())
    step = _power((exponent - 2).clamp(min=-1))
    return (torch.round(x.float() / step) * step).clamp(-6.0, 6.0)


def _power(exponent: torch.Tensor) -> torch.Tensor:
    """2^exponent in fp32 by its bits, int32 from -126 to 127: what a GPU's exp2 gives need not be exact."""
    return ((exponent.int() + 127) << 23).view(torch.float32)


def decode_e4m3(codes: np.ndarray) -> np.ndarray:
    """fp32 numbers of E4M3 bytes."""
    bits = codes.view(np.uint8).astype(np.int32)
    exponent, mantissa = bits >> 3 & 15, bits & 7
    size = np.where(exponent, np.ldexp(8 + mantissa, exponent - 10), np.ldexp(mantissa, -9))
    size = np.where((bits & 127) == 127, np.nan, size)
    return np.where(bits & 128, -size, size).astype(np.float32)


def decode_e2m1(codes: np.ndarray) -> np.ndarray:
    """fp32 numbers of E2M1 codes 0 to 15."""
    exponent, mantissa = codes >> 1 & 3, codes & 1
    size = np.where(exponent, np.ldexp(2.0 + mantissa, exponent.astype(np.int32) - 2), mantissa / 2)
    return np.where(codes & 8, -size, size).astype(np.float32)


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A stored tensor: floating ones as fp32, FP8 as its bytes, integers as they are."""
    if tensor.dtype == torch.float8_e4m3fn:
        return tensor.view(torch.uint8).numpy()
    if tensor.dtype == torch.bfloat16:
        return (tensor.view(torch.int16).numpy().astype(np.uint32) << 16).view(np.float32)
    return tensor.numpy().astype(np.float32) if tensor.is_floating_point() else tensor.numpy()


def _compressed(name: str, tensors: dict[str, np.ndarray], config: Mapping[str, Any]) -> tuple[np.ndarray, Round | None]:
    """A layer's weight and what rounds its input, by compressed-tensors' rules."""
    group = next(
        (g for g in config["config_groups"].values() if name in g["targets"]),
        None,
    ) or next(g for g in config["config_groups"].values() if g["targets"] == ["Linear"])
    if name in config["ignore"]:
        raise ValueError("it is in ignore")
    weights, layout = group["weights"], group["format"]
    if layout == "pack-quantized":
        rows, columns = (int(n) for n in tensors["weight_shape"])
        words = tensors["weight_packed"].view(np.uint32)
        codes = np.stack([words >> 4 * i & 15 for i in range(8)], -1).reshape(rows, -1)[:, :columns].astype(np.float32) - 8
        return codes * by_column(tensors["weight_scale"], columns, weights["group_size"]), None
    if layout == "nvfp4-pack-quantized":
        scale = decode_e4m3(tensors["weight_scale"]) * (1 / tensors["weight_global_scale"])
        values = decode_e2m1(_pairs(tensors["weight_packed"]))
        return values * by_column(scale, values.shape[1], weights["group_size"]), to_nvfp4(1 / tensors["input_global_scale"])
    codes = decode_e4m3(tensors["weight"]) if layout == "float-quantized" else tensors["weight"].astype(np.float32)
    rounding = to_fp8(tensors["input_scale"]) if layout == "float-quantized" else to_int8(tensors["input_scale"])
    scale = tensors["weight_scale"]
    if scale.shape != ((1,) if weights["strategy"] == "tensor" else (len(codes), 1)):
        raise ValueError(f"weight_scale is {scale.shape}")
    return codes * scale, rounding


def _modelopt(name: str, tensors: dict[str, np.ndarray], config: Mapping[str, Any]) -> tuple[np.ndarray, Round | None]:
    """A layer's weight and what rounds its input, by ModelOpt's rules."""
    if name in config["ignore"]:
        raise ValueError("it is in ignore")
    details = config["quantized_layers"][name] if config["quant_algo"] == "MIXED_PRECISION" else config
    weight, scale = tensors["weight"], tensors["weight_scale"]
    if details["quant_algo"] == "FP8":
        return decode_e4m3(weight) * scale, to_fp8(tensors["input_scale"])
    if details["quant_algo"] == "NVFP4":
        values = decode_e2m1(_pairs(weight))
        blocks = decode_e4m3(scale) * tensors["weight_scale_2"]
        return values * by_column(blocks, values.shape[1], details["group_size"]), to_nvfp4(tensors["input_scale"])
    if details["quant_algo"] not in ("W4A16_AWQ", "W4A8_AWQ"):
        raise ValueError(f"quant_algo is {details['quant_algo']}")
    codes = np.empty((2 * len(weight), weight.shape[1]), np.float32)
    codes[0::2] = (weight & 15 ^ 8).astype(np.float32) - 8  # two's complement of four bits
    codes[1::2] = (weight >> 4 ^ 8).astype(np.float32) - 8
    values = codes * by_column(scale, weight.shape[1], details["group_size"])
    before = torch.from_numpy(tensors["pre_quant_scale"])
    if details["quant_algo"] == "W4A16_AWQ":
        return values, lambda x: x * before.to(x)
    outer, after = tensors["weight_scale_2"], to_fp8(tensors["input_scale"])
    return e4m3(torch.from_numpy(values / outer)).numpy() * outer, lambda x: after(x * before.to(x))


def by_column(scale: np.ndarray, columns: int, group: int) -> np.ndarray:
    """Scales of groups `[rows, columns / group]`, one a column."""
    if scale.shape[1] * group != columns:
        raise ValueError(f"{scale.shape[1]} scales of {group} for {columns} columns")
    return np.repeat(scale, group, 1)


def _pairs(packed: np.ndarray) -> np.ndarray:
    """The 4-bit codes of bytes `[rows, n / 2]`, the low half first."""
    return np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1)


def to_fp8(scale: np.ndarray) -> Round:
    """E4M3 in units of `scale`, one number."""
    step = torch.from_numpy(scale.reshape(()).astype(np.float32))
    return lambda x: (e4m3(_over(x, step)) * step.to(x.device)).to(x.dtype)


def to_int8(scale: np.ndarray) -> Round:
    """INT8 in units of `scale`, one number."""
    step = torch.from_numpy(scale.reshape(()).astype(np.float32))
    return lambda x: (torch.round(_over(x, step)).clamp(-128, 127) * step.to(x.device)).to(x.dtype)


def _over(x: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """fp32 x / step. `step` must lie beside `x`: where a number on the CPU divides, torch multiplies by its reciprocal on a GPU,
    which carries an input near a boundary to its other side."""
    return x.float() / step.to(x.device)


def to_nvfp4(outer: np.ndarray) -> Round:
    """Blocks of 16 along the last dimension with a scale of their own, which is rounded to E4M3 in units of `outer`."""
    unit = torch.from_numpy(outer.reshape(()).astype(np.float32))

    def rounding(x: torch.Tensor) -> torch.Tensor:
        blocks = x.float().unflatten(-1, (-1, 16))
        step = e4m3(_over(blocks.abs().amax(-1, keepdim=True), 6.0 * unit)) * unit.to(x.device)
        return (e2m1(torch.where(step > 0, blocks / step, 0.0)) * step).flatten(-2).to(x.dtype)

    return rounding
