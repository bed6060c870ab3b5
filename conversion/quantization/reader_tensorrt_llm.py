"""Reads a TensorRT-LLM checkpoint back: ranks are put together and codes dequantized by the rules of its loader alone.

The counterpart of `reader` for this format, with no code of the writer's. The loader takes INT4 bytes, [out / 2, in], transposes
them and takes the low half for the even output channel; scales of groups are [out, in / group].
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from conversion import safetensors_io
from conversion.quantization.reader import Read, Round, build, by_column, decode_e4m3, e4m3, to_fp8, to_int8, to_numpy
from nemo_ext.errors import RunError

HUGGING_FACE = {
    "mlp.fc": "mlp.gate_proj",
    "mlp.gate": "mlp.up_proj",
    "mlp.proj": "mlp.down_proj",
    "attention.dense": "self_attn.o_proj",
}
WHOLE = {"transformer.vocab_embedding.weight": "model.embed_tokens.weight", "lm_head.weight": "lm_head.weight"}
BY_COLUMNS = ("attention.dense", "mlp.proj")
Tensors = dict[str, np.ndarray]


def read(folder: Path) -> Read:
    """The model under Hugging Face's names. Raises RunError for a layer that asks for more than is here."""
    config = json.loads((folder / "config.json").read_text())
    tp, pp = config["mapping"]["tp_size"], config["mapping"]["pp_size"]
    ranks = [
        {name: to_numpy(info.read()) for name, info in safetensors_io.read_header(folder / f"rank{r}.safetensors").items()}
        for r in range(tp * pp)
    ]
    layers = config["num_hidden_layers"] // pp
    found = Read({})
    for stage in range(pp):
        parts = ranks[stage * tp : (stage + 1) * tp]
        for name, whole in WHOLE.items():
            if name in parts[0]:
                found.weights[whole] = torch.from_numpy(np.concatenate([part[name] for part in parts]))
        if "transformer.ln_f.weight" in parts[0]:
            found.weights["model.norm.weight"] = torch.from_numpy(parts[0]["transformer.ln_f.weight"])
        for local in range(layers):
            here, layer = f"transformer.layers.{local}.", stage * layers + local
            inside = [{name.removeprefix(here): t for name, t in part.items() if name.startswith(here)} for part in parts]
            _layer(found, f"model.layers.{layer}.", inside, config, _quantized_as(folder, config, layer))
    return found


def load(folder: Path, hf_config: Mapping[str, Any], **like: Any) -> tuple[Read, nn.Module]:
    """What is in `folder`, and the model that computes with it; `hf_config` is the config.json of the model that was quantized,
    of its true vocabulary; `like`: the dtype and device of `reader.build`."""
    found = read(folder)
    size = hf_config["vocab_size"]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if bool(found.weights[name][size:].any()):
            raise RunError(f"{folder}: the padding of {name} is not zero")
        found.weights[name] = found.weights[name][:size]
    return found, build({**hf_config, "tie_word_embeddings": False}, found, **like)


def _quantized_as(folder: Path, config: Mapping[str, Any], layer: int) -> Any:
    """What says how a module of a layer is quantized: None where it is not."""
    details = config["quantization"]
    if details["quant_algo"] == "MIXED_PRECISION":
        details = json.loads((folder / "quant_cfg.json").read_text())["quantized_layers"]
        return lambda module: details.get(f"transformer.layers.{layer}.{module}")
    return lambda module: None if f"transformer.layers.{layer}.{module}" in details["exclude_modules"] else details


def _layer(found: Read, prefix: str, parts: list[Tensors], config: Mapping[str, Any], quantized_as: Any) -> None:
    found.weights[f"{prefix}input_layernorm.weight"] = torch.from_numpy(parts[0]["input_layernorm.weight"])
    found.weights[f"{prefix}post_attention_layernorm.weight"] = torch.from_numpy(parts[0]["post_layernorm.weight"])
    if "attention.kv_cache_scaling_factor" in parts[0]:
        cache = {"FP8": to_fp8, "INT8": to_int8}[config["quantization"]["kv_cache_quant_algo"]]
        rounding = cache(parts[0]["attention.kv_cache_scaling_factor"])
        found.kv[f"{prefix}self_attn"] = (rounding, rounding)
    for module in ("attention.qkv", *HUGGING_FACE):
        each = [{n.removeprefix(f"{module}."): t for n, t in part.items() if n.startswith(f"{module}.")} for part in parts]
        details = quantized_as(module)
        weights, rounding = zip(*(_dequantized(tensors, details) for tensors in each), strict=True)
        if module == "attention.qkv":
            targets = dict(zip("qkv", _heads(weights, config), strict=True))
            biases = dict(zip("qkv", _heads([t["bias"] for t in each], config), strict=True)) if "bias" in each[0] else {}
            names = {f"{prefix}self_attn.{letter}_proj": targets[letter] for letter in "qkv"}
            for letter, bias in biases.items():
                found.weights[f"{prefix}self_attn.{letter}_proj.bias"] = torch.from_numpy(bias)
        else:
            name = prefix + HUGGING_FACE[module]
            names = {name: np.concatenate(weights, 1 if module in BY_COLUMNS else 0)}
            if "bias" in each[0]:
                bias = each[0]["bias"] if module in BY_COLUMNS else np.concatenate([t["bias"] for t in each])
                found.weights[f"{name}.bias"] = torch.from_numpy(bias)
        for name, weight in names.items():
            found.weights[f"{name}.weight"] = torch.from_numpy(np.ascontiguousarray(weight, dtype=np.float32))
            if rounding[0]:
                found.inputs[name] = rounding[0]


def _heads(parts: Any, config: Mapping[str, Any]) -> list[np.ndarray]:
    """Query, key and value of all ranks' stacked rows; repeated heads of keys and values are taken once."""
    heads, groups, head = config["num_attention_heads"], config["num_key_value_heads"], config["head_size"]
    tp = len(parts)
    own, shared = heads // tp * head, max(groups // tp, 1) * head
    cut = [np.split(part, [own, own + shared]) for part in parts]
    step = max(tp // groups, 1)
    return [np.concatenate([part[0] for part in cut]), *(np.concatenate([part[i] for part in cut[::step]]) for i in (1, 2))]


def _dequantized(tensors: Tensors, details: Mapping[str, Any] | None) -> tuple[np.ndarray, Round | None]:
    """A rank's weight in fp32, and what rounds the layer's input."""
    weight = tensors["weight"]
    if details is None:
        return weight, None
    algorithm, scale = details["quant_algo"], tensors["weights_scaling_factor"]
    if algorithm == "FP8":
        return decode_e4m3(weight) * scale, to_fp8(tensors["activation_scaling_factor"])
    before = torch.from_numpy(tensors["prequant_scaling_factor"])
    if not bool((before == 1).all()):
        raise RunError("prequant_scaling_factor is not one")
    if algorithm == "W8A8_SQ_PER_CHANNEL":
        return weight.astype(np.float32) * scale[:, None], to_int8(tensors["activation_scaling_factor"])
    transposed = weight.view(np.uint8).T  # [in, out / 2]
    halves = np.stack([transposed & 15, transposed >> 4], -1).reshape(transposed.shape[0], -1)  # [in, out]
    values = ((halves ^ 8).astype(np.float32) - 8).T * by_column(scale, weight.shape[1], details["group_size"])
    if algorithm == "W4A16_AWQ":
        return values, None
    outer = tensors["weights_scaling_factor_2"]
    return e4m3(torch.from_numpy(values / outer)).numpy() * outer, to_fp8(tensors["activation_scaling_factor"])
