"""An ONNX decoder with a KV cache for onnxruntime: torch's exporter writes the graph, quantized layers are operators in it.

Names are those of Hugging Face's Optimum. Inputs: `input_ids` `[b, s]`, `attention_mask` `[b, past + s]`, `position_ids`
`[b, s]`, `past_key_values.{layer}.key|value` `[b, key and value heads, past, head]`; outputs: `logits` and
`present.{layer}.key|value`, of past + s. `past` may be 0. Everything is computed in fp32; a matrix that is not quantized is
stored in the model's dtype.

int4: `com.microsoft.MatMulNBits` (onnxruntime, docs/ContribOperators.md). A row's codes plus 8 in blocks, two in a byte with the
first in the low half, `[out, in / block, block / 2]`, a scale in fp32 for each; accuracy_level 1 keeps inputs in fp32. int8:
ONNX's own QuantizeLinear and DequantizeLinear on input and weight `[in, out]`, which onnxruntime computes in integers.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from conversion.nemo_folder import TOKENIZER_FILES
from conversion.quantization.formats import Format
from conversion.quantization.stored import Quantized, StoredLinear
from nemo_ext.errors import RunError, UserError

NAME = "model.onnx"
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OPSET = 23
FP32 = 1  # MatMulNBits' accuracy_level


def check(form: Format, kv_cache: str | None = None) -> None:
    """Raises UserError for a format that is not written, for a quantized KV cache, and where a package is missing."""
    if kv_cache:
        raise UserError("an ONNX decoder's KV cache is fp32: leave kv_cache= out")
    if form.name not in ("int4", "int8"):
        raise UserError(f"{form.name} is not written as ONNX: int4_awq, int4_gptq and int8_sq are")
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise UserError(f"format=onnx needs {', '.join(missing)}: pip install {' '.join(missing)}")


def write(folder: Path, quantized: Quantized, progress: Callable[[int, int], None] | None = None) -> None:
    """Write model.onnx with model.onnx.data, config.json and the tokenizer into `folder`. `progress(done, total)` counts layers.

    Raises UserError as `check` does, and for an architecture that torch cannot export.
    """
    for form in quantized.plan.values():
        check(form, quantized.kv_cache)
    decoder = Decoder(_model(quantized, progress))
    program = _export(decoder, quantized.config["model_type"])
    program.save(folder / NAME, external_data=True)
    (folder / "config.json").write_text(json.dumps(quantized.config, indent=2) + "\n")
    for name in TOKENIZER_FILES:
        if (quantized.source / name).is_file():
            shutil.copyfile(quantized.source / name, folder / name)


class Int4Linear(nn.Module):
    """y = x W^T + b with int4 codes in groups, as MatMulNBits."""

    def __init__(self, stored: StoredLinear, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.group, (self.rows, self.columns) = stored.format.group, stored.codes.shape
        codes = (stored.codes.cpu() + 8).to(torch.uint8).view(self.rows, -1, self.group)
        self.register_buffer("packed", codes[..., ::2] | (codes[..., 1::2] << 4))
        self.register_buffer("scale", stored.scale.float().cpu().contiguous())
        self.register_buffer("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.onnx.ops.symbolic(
            "com.microsoft::MatMulNBits",
            (x, self.packed, self.scale),
            {"K": self.columns, "N": self.rows, "bits": 4, "block_size": self.group, "accuracy_level": FP32},
            dtype=torch.float32,
            shape=(*x.shape[:-1], self.rows),
            version=1,
        )
        return y if self.bias is None else y + self.bias


class Int8Linear(nn.Module):
    """y = x W^T + b with int8 codes, a scale a row of the weight and one for the input, as ONNX's Q and DQ."""

    def __init__(self, stored: StoredLinear, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.register_buffer("codes", stored.codes.cpu().T.contiguous())
        self.register_buffer("scale", stored.scale.float().cpu().contiguous())
        self.register_buffer("input_scale", stored.input.float().cpu().reshape(()))
        self.register_buffer("zero", torch.zeros((), dtype=torch.int8))
        self.register_buffer("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        codes = _operator("QuantizeLinear", (x, self.input_scale, self.zero), torch.int8, x.shape)
        rounded = _operator("DequantizeLinear", (codes, self.input_scale, self.zero), torch.float32, x.shape)
        weight = _operator("DequantizeLinear", (self.codes, self.scale), torch.float32, self.codes.shape, axis=1)
        y = rounded @ weight
        return y if self.bias is None else y + self.bias


def _operator(name: str, inputs: tuple[torch.Tensor, ...], dtype: torch.dtype, shape: Any, **attributes: Any) -> torch.Tensor:
    return torch.onnx.ops.symbolic(name, inputs, attributes, dtype=dtype, shape=tuple(shape), version=OPSET)


def attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, **settings: Any
) -> tuple[torch.Tensor, None]:
    """ONNX's Attention in the place of transformers' own: `[b, heads, s, head]`, keys and values with fewer heads."""
    numbers = {"scale": settings["scaling"], "softcap": settings.get("softcap") or 0.0}
    y = _operator("Attention", (query, key, value, mask), torch.float32, query.shape, **numbers)
    return y.transpose(1, 2).contiguous(), None


class _Float(nn.Module):
    """A weight that is stored in fewer bits than it is computed in."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.float()


class Decoder(nn.Module):
    """What is exported: a causal language model of transformers with its cache as plain tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        config = model.config
        self.layers = config.num_hidden_layers
        self.heads = config.num_key_value_heads
        self.head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor, past: list[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer in range(self.layers):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        out = self.model(
            input_ids=input_ids,
            attention_mask=self._masks(input_ids.shape[1], attention_mask),
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        return (out.logits, *(tensor for layer in cache.layers for tensor in (layer.keys, layer.values)))

    def _masks(self, count: int, attention_mask: torch.Tensor) -> Any:
        """What to add to attention scores, `[b, 1, s, past + s]`; of models with windows in some layers by the layer's kind."""
        total = attention_mask.shape[1]
        queries = torch.arange(count)[:, None] + (total - count)
        keys = torch.arange(total)[None]
        seen = (keys <= queries) & attention_mask[:, None, None, :].bool()
        config, lowest = self.model.config, torch.finfo(torch.float32).min
        window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
        near = seen if window is None else seen & (keys > queries - window)
        kinds = set(getattr(config, "layer_types", None) or [])
        if len(kinds) < 2:
            return torch.where(seen if kinds == {"full_attention"} else near, 0.0, lowest)
        return {kind: torch.where(near if kind == "sliding_attention" else seen, 0.0, lowest) for kind in kinds}


def _model(quantized: Quantized, progress: Callable[[int, int], None] | None) -> nn.Module:
    """transformers' model with the layers of the plan as operators, everything else as it is stored."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register("onnx", attention)
    rest = {key: value for key, value in quantized.config.items() if key not in ("torch_dtype", "dtype", "model_type")}
    config = AutoConfig.for_model(quantized.config["model_type"], **rest)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, attn_implementation="onnx").eval()
    others = quantized.others()
    for done, (name, form) in enumerate(quantized.plan.items(), 1):
        bias = others.pop(f"{name}.bias", None)
        kind = Int4Linear if form.name == "int4" else Int8Linear
        model.set_submodule(name, kind(quantized.linear(name), None if bias is None else bias.float()))
        if progress:
            progress(done, len(quantized.plan))
    shared = {}
    for name, tensor in others.items():
        parent, _, last = name.rpartition(".")
        shared[name] = nn.Parameter(tensor if tensor.dim() > 1 else tensor.float(), requires_grad=False)
        setattr(model.get_submodule(parent), last, shared[name])
    if model.config.tie_word_embeddings:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    for module in list(model.modules()):
        weight = getattr(module, "weight", None)
        if weight is not None and weight.dim() > 1:
            nn.utils.parametrize.register_parametrization(module, "weight", _Float(), unsafe=True)
    return model


def _export(decoder: Decoder, kind: str) -> Any:
    """torch's ONNXProgram of `decoder`."""
    batch, count, before = 2, 3, 5  # of the example, whose sizes become dynamic
    shape = (batch, decoder.heads, before, decoder.head)
    past = [torch.zeros(shape) for _ in range(2 * decoder.layers)]
    ids = torch.zeros(batch, count, dtype=torch.int64)
    positions = torch.arange(before, before + count).expand(batch, -1)
    example = (ids, torch.ones(batch, before + count, dtype=torch.int64), positions.clone(), past)
    free = torch.export.Dim.DYNAMIC
    sizes = ({0: free, 1: free}, {0: free, 1: free}, {0: free, 1: free}, [{0: free, 2: free} for _ in past])
    try:
        with torch.no_grad(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            return torch.onnx.export(
                decoder,
                example,
                dynamo=True,
                dynamic_shapes=sizes,
                input_names=["input_ids", "attention_mask", "position_ids", *_names("past_key_values", decoder.layers)],
                output_names=["logits", *_names("present", decoder.layers)],
                opset_version=OPSET,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise UserError(f"torch cannot export a {kind} to ONNX: {' '.join(str(error).split())[:200]}") from error


def _names(prefix: str, layers: int) -> list[str]:
    return [f"{prefix}.{layer}.{which}" for layer in range(layers) for which in ("key", "value")]


def logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """fp32 logits `[b, s, vocabulary]` that onnxruntime computes on the CPU, by ONNX's definitions, for ids `[b, s]`: half of
    them at once, the others one after the other with the cache."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Levels above fuse INT8 layers into kernels whose sums saturate on x86 without VNNI; here the file is measured, not they.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    try:
        session = onnxruntime.InferenceSession(str(folder / NAME), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own classes have no common parent
        raise RunError(f"onnxruntime cannot load {folder / NAME}: {' '.join(str(error).split())[:200]}") from error
    shapes = {each.name: each.shape for each in session.get_inputs() if each.name.startswith("past_key_values.")}
    cache = {name: torch.zeros(len(ids), shape[1], 0, shape[3]).numpy() for name, shape in shapes.items()}
    found, start = [], 0
    for part in (ids[:, : ids.shape[1] // 2], *ids[:, ids.shape[1] // 2 :].split(1, 1)):
        end = start + part.shape[1]
        positions = torch.arange(start, end).expand(len(ids), -1)
        mask = torch.ones(len(ids), end, dtype=torch.int64)
        inputs = {"input_ids": part.numpy(), "attention_mask": mask.numpy(), "position_ids": positions.numpy()}
        values, *present = session.run(None, inputs | cache)
        cache, start = dict(zip(cache, present, strict=True)), end
        found.append(torch.from_numpy(values))
    return torch.cat(found, 1)
