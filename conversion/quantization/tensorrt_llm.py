"""TensorRT-LLM's checkpoint, from which `trtllm-build` makes engines: config.json and a safetensors file for each rank.

Written after the loader of TensorRT-LLM 1.1 (`preprocess_weights` and the layers' parameter names); no engine has been built from
it here. Query, key and value are one matrix, each rank's heads together; `fc` is Hugging Face's gate, `gate` its up projection.
INT4 codes are packed in pairs of output rows, FP8 is stored as such. The vocabulary is padded with zeros to a multiple of 64
times the tensor parallel size before it is split; config.json has the padded size, as the shapes must agree. Rank = pipeline rank
* tp + tensor rank.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from conversion import safetensors_io
from conversion.dtypes import NAMES
from conversion.nemo_folder import TOKENIZER_FILES
from conversion.quantization.formats import Format
from conversion.quantization.modelopt_folder import pack_int4
from conversion.quantization.stored import Quantized, StoredLinear, names_by_format
from nemo_ext.errors import UserError

ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}
ALGORITHMS = {"fp8": "FP8", "int8": "W8A8_SQ_PER_CHANNEL", "int4": "W4A16_AWQ", "w4a8": "W4A8_AWQ"}
PADDING = 64
# TensorRT-LLM's layer: Hugging Face's, in the order in which they are stacked, and whether a rank has rows of it or columns
LAYERS = {
    "attention.qkv": (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "rows"),
    "attention.dense": (("self_attn.o_proj",), "columns"),
    "mlp.fc": (("mlp.gate_proj",), "rows"),
    "mlp.gate": (("mlp.up_proj",), "rows"),
    "mlp.proj": (("mlp.down_proj",), "columns"),
}
NORMS = {"input_layernorm": "input_layernorm", "post_layernorm": "post_attention_layernorm"}


@dataclass(frozen=True)
class Layout:
    """Tensor and pipeline parallel sizes."""

    tp: int
    pp: int

    def check(self, config: Mapping[str, Any], form: Format) -> None:
        """Raises UserError for a model that cannot be split so, or is not known here. `config` is Hugging Face's."""
        if (kind := config.get("model_type")) not in ARCHITECTURES:
            raise UserError(f"TensorRT-LLM checkpoints are written for {', '.join(ARCHITECTURES)}, not for {kind}")
        if config.get("sliding_window") and (kind == "mistral" or config.get("use_sliding_window")):
            raise UserError("the model's sliding window is not written into TensorRT-LLM checkpoints: use format=modelopt")
        heads, inner = config["num_attention_heads"], config["intermediate_size"]
        groups = config.get("num_key_value_heads") or heads
        if self.tp < 1 or heads % self.tp or (groups % self.tp and self.tp % groups):
            raise UserError(f"tp={self.tp} does not divide the model's {heads} heads and {groups} key and value heads")
        if inner % self.tp:
            raise UserError(f"tp={self.tp} does not divide the intermediate size of {inner}")
        if self.pp < 1 or config["num_hidden_layers"] % self.pp:
            raise UserError(f"pp={self.pp} does not divide the model's {config['num_hidden_layers']} layers")
        head = config.get("head_dim") or config["hidden_size"] // heads
        for what, width in (("o_proj", heads * head), ("down_proj", inner)):
            if form.group and (width // self.tp) % form.group:
                raise UserError(
                    f"tp={self.tp} leaves {what} {width // self.tp} inputs a rank, not a multiple of the group of {form.group}: "
                    "choose a smaller tp= or group="
                )


def check(form: Format, kv_cache: str | None = None) -> None:
    """Raises UserError for a format that is not written; either KV cache is."""
    if form.name not in ALGORITHMS:
        raise UserError(f"{form.name} is not written as a TensorRT-LLM checkpoint: use format=modelopt")


def write(
    folder: Path, quantized: Quantized, progress: Callable[[int, int], None] | None = None, layout: Layout = Layout(1, 1)
) -> None:
    """Write the checkpoint into `folder`. `progress(done, total)` counts decoder layers of all ranks.

    Raises UserError for a format, model or layout that cannot be written, and where a part of a fused layer is excluded.
    """
    config = quantized.config
    for form in quantized.plan.values():
        check(form)
        layout.check(config, form)
    others, cache = quantized.others(), quantized.kv_scales()
    count = config["num_hidden_layers"] // layout.pp
    for pipeline in range(layout.pp):
        for rank in range(layout.tp):
            tensors: dict[str, torch.Tensor] = {}
            if pipeline == 0:
                embedding = _rows(_padded(others["model.embed_tokens.weight"], layout.tp), rank, layout.tp)
                tensors["transformer.vocab_embedding.weight"] = embedding
            for i in range(count):
                layer = pipeline * count + i
                for name, tensor in _layer(quantized, others, layer, rank, layout.tp).items():
                    tensors[f"transformer.layers.{i}.{name}"] = tensor
                if scales := cache.get(f"model.layers.{layer}.self_attn"):
                    tensors[f"transformer.layers.{i}.attention.kv_cache_scaling_factor"] = torch.tensor([max(scales)])
                if progress:
                    done = (pipeline * layout.tp + rank) * count + i + 1
                    progress(done, layout.tp * config["num_hidden_layers"])
            if pipeline == layout.pp - 1:
                head = others.get("lm_head.weight", others["model.embed_tokens.weight"])
                tensors["transformer.ln_f.weight"] = others["model.norm.weight"]
                tensors["lm_head.weight"] = _rows(_padded(head, layout.tp), rank, layout.tp)
            file = folder / f"rank{pipeline * layout.tp + rank}.safetensors"
            specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
            safetensors_io.write_file(file, specs, tensors.values())
    details = quantization(quantized)
    content = _config(quantized, layout, details)
    (folder / "config.json").write_text(json.dumps(content, indent=4) + "\n")
    if details["quant_algo"] == "MIXED_PRECISION":
        (folder / "quant_cfg.json").write_text(json.dumps(_by_layer(quantized, details), indent=4) + "\n")
    for name in TOKENIZER_FILES:
        if (quantized.source / name).is_file():
            (folder / name).write_bytes((quantized.source / name).read_bytes())


def _layer(quantized: Quantized, others: Mapping[str, torch.Tensor], layer: int, rank: int, tp: int) -> dict[str, torch.Tensor]:
    """The tensors of decoder layer `layer` that a tensor parallel rank has."""
    prefix, found = f"model.layers.{layer}.", {}
    for ours, theirs in NORMS.items():
        found[f"{ours}.weight"] = others[f"{prefix}{theirs}.weight"]
    for ours, (members, split) in LAYERS.items():
        names = [prefix + member for member in members]
        inside = [name in quantized.plan for name in names]
        if any(inside) and not all(inside):
            raise UserError(f"{', '.join(names)} are one layer in TensorRT-LLM: exclude all of them or none")
        cut = [_cut(quantized.config, name, rank, tp) if split == "rows" else None for name in names]
        biases = [others[f"{name}.bias"] for name in names if f"{name}.bias" in others]
        if biases:
            found[f"{ours}.bias"] = torch.cat([bias[rows] if rows else bias for bias, rows in zip(biases, cut, strict=True)])
        if not all(inside):
            weights = [others[f"{name}.weight"] for name in names]
            parts = [w[rows] if rows else w.chunk(tp, 1)[rank] for w, rows in zip(weights, cut, strict=True)]
            found[f"{ours}.weight"] = torch.cat(parts).contiguous()
            continue
        parts = [_part(quantized.linear(name), rows, rank, tp) for name, rows in zip(names, cut, strict=True)]
        for key, tensor in _pack(parts, quantized.dtype).items():
            found[f"{ours}.{key}"] = tensor.contiguous().cpu()
    return found


def _cut(config: Mapping[str, Any], name: str, rank: int, tp: int) -> slice:
    """The output rows of a layer that a rank has. Heads of keys and values are repeated where there are fewer than ranks."""
    heads = config["num_attention_heads"]
    groups = config.get("num_key_value_heads") or heads
    head = config.get("head_dim") or config["hidden_size"] // heads
    if name.endswith(("k_proj", "v_proj")):
        rank, tp, rows = (rank * groups // tp, groups, groups * head) if tp > groups else (rank, tp, groups * head)
    else:
        rows = heads * head if name.endswith("q_proj") else config["intermediate_size"]
    return slice(rank * rows // tp, (rank + 1) * rows // tp)


def _part(whole: StoredLinear, rows: slice | None, rank: int, tp: int) -> StoredLinear:
    """A rank's rows (`rows`), or its columns, of a layer."""
    codes = whole.codes.view(torch.uint8) if whole.format.weight == "fp8" else whole.codes
    scale = whole.scale
    if rows is not None:
        codes, scale = codes[rows], scale[rows] if scale.dim() else scale
    else:
        codes, scale = codes.chunk(tp, 1)[rank].contiguous(), scale.chunk(tp, 1)[rank] if scale.dim() == 2 else scale
    return StoredLinear(whole.format, codes.view(whole.codes.dtype), scale, whole.outer, whole.input)


def _pack(parts: list[StoredLinear], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors of a layer that is made of `parts`, which share the scales of whole tensors."""
    form = parts[0].format
    found: dict[str, torch.Tensor] = {}
    if form.weight == "fp8":
        codes = torch.cat([part.codes.view(torch.uint8) for part in parts])
        found = {"weight": codes.view(torch.float8_e4m3fn), "weights_scaling_factor": parts[0].scale.reshape(1)}
    elif form.weight == "int8":
        found["weight"] = torch.cat([part.codes for part in parts])
        found["weights_scaling_factor"] = torch.cat([part.scale for part in parts])
    else:
        found["weight"] = pack_int4(torch.cat([part.codes for part in parts])).view(torch.int8)
        found["weights_scaling_factor"] = torch.cat([part.scale for part in parts]).to(dtype)
    if form.weight != "fp8":  # what AWQ and SmoothQuant would multiply the input by is folded into the layers before
        found["prequant_scaling_factor"] = torch.ones(parts[0].codes.shape[1], dtype=dtype)
    if parts[0].outer is not None:
        found["weights_scaling_factor_2"] = parts[0].outer.reshape(1)
    if parts[0].input is not None:
        found["activation_scaling_factor"] = parts[0].input.reshape(1)
    return found


def _rows(tensor: torch.Tensor, rank: int, tp: int) -> torch.Tensor:
    return tensor.chunk(tp)[rank].contiguous()


def padded_vocabulary(size: int, tp: int) -> int:
    """The next multiple of 64 tp."""
    return -(-size // (PADDING * tp)) * PADDING * tp


def _padded(tensor: torch.Tensor, tp: int) -> torch.Tensor:
    return torch.nn.functional.pad(tensor, (0, 0, 0, padded_vocabulary(len(tensor), tp) - len(tensor)))


def quantization(quantized: Quantized) -> dict[str, Any]:
    """`quantization` of config.json. Raises UserError if nothing is quantized: the runtime would take it for another model."""
    if not quantized.plan:
        raise UserError("no layer is quantized: there is nothing to write")
    formats = [form for form, _ in names_by_format(quantized.plan)]
    cache = {"kv_cache_quant_algo": quantized.kv_cache and quantized.kv_cache.upper()}
    if len(formats) > 1:
        return {"quant_algo": "MIXED_PRECISION", **cache}
    every = {f"transformer.layers.{i}.{ours}": f"model.layers.{i}.{members[0]}"
             for i in range(quantized.config["num_hidden_layers"]) for ours, (members, _) in LAYERS.items()}  # fmt: skip
    excluded = [ours for ours, theirs in every.items() if theirs not in quantized.plan]
    return {**_details(formats[0]), **cache, "exclude_modules": ["lm_head", *excluded]}


def _details(form: Format) -> dict[str, Any]:
    details: dict[str, Any] = {"quant_algo": ALGORITHMS[form.name]}
    if form.group:
        details |= {"group_size": form.group, "has_zero_point": False, "pre_quant_scale": True}
    return details


def _by_layer(quantized: Quantized, details: Mapping[str, Any]) -> dict[str, Any]:
    """quant_cfg.json of a model with several formats."""
    layers = {}
    for i in range(quantized.config["num_hidden_layers"]):
        for ours, (members, _) in LAYERS.items():
            if form := quantized.plan.get(f"model.layers.{i}.{members[0]}"):
                layers[f"transformer.layers.{i}.{ours}"] = _details(form)
    return {**details, "quantized_layers": layers}


def _config(quantized: Quantized, layout: Layout, details: Mapping[str, Any]) -> dict[str, Any]:
    source = quantized.config
    heads, kind = source["num_attention_heads"], source["model_type"]
    content = {
        "producer": {"name": "llm-builder"},
        "architecture": ARCHITECTURES[kind],
        "dtype": NAMES[quantized.dtype],
        "logits_dtype": "float32",
        "num_hidden_layers": source["num_hidden_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": source.get("num_key_value_heads") or heads,
        "head_size": source.get("head_dim") or source["hidden_size"] // heads,
        "hidden_size": source["hidden_size"],
        "intermediate_size": source["intermediate_size"],
        "norm_epsilon": source["rms_norm_eps"],
        "vocab_size": padded_vocabulary(source["vocab_size"], layout.tp),
        "max_position_embeddings": source["max_position_embeddings"],
        "hidden_act": source["hidden_act"],
        "position_embedding_type": "rope_gpt_neox",
        "rotary_base": source.get("rope_theta", 10000.0),
        "rotary_scaling": source.get("rope_scaling"),
        "use_parallel_embedding": True,
        "embedding_sharding_dim": 0,
        "share_embedding_table": False,
        "attn_bias": kind == "qwen2" or bool(source.get("attention_bias")),
        "mlp_bias": bool(source.get("mlp_bias")),
        "mapping": {"world_size": layout.tp * layout.pp, "tp_size": layout.tp, "pp_size": layout.pp},
        "quantization": dict(details),
    }
    return content | ({"qwen_type": "qwen2"} if kind == "qwen2" else {})
