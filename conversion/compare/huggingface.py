"""transformers' model of a Hugging Face folder, run on prompts: the reference of every comparison."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from conversion import safetensors_io
from conversion.compare.activations import (
    LOGITS,
    Activation,
    Trace,
    first_input,
    first_output,
    recording,
    require_memory,
    round_weights,
)
from conversion.compare.media import Media, sense_hooks
from conversion.hf_to_nemo import read_config
from nemo_ext.errors import UserError

MLP_NORMS = ("pre_feedforward_layernorm", "post_attention_layernorm")  # the norm that reads the residual stream after attention
FINAL_NORMS = ("norm", "final_layernorm")


def traces(
    folder: Path,
    prompts: Sequence[torch.Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    round_to: torch.dtype | None = None,
    layers: bool = False,
    media: Sequence[Media | None] | None = None,
) -> list[Trace]:
    """Run each prompt (`[s]`, int64) through the model with eager attention, one at a time without padding; with its `media`.

    `dtype` is the one of weights and computation; `round_to` rounds the weights first. `layers` records the hidden states too.
    Raises UserError if the model does not fit the memory, or the folder lacks some of its tensors.
    """
    stored = safetensors_io.open_folder(folder)
    parameters = sum(math.prod(info.shape) for info in stored.values())
    require_memory(1.1 * parameters * dtype.itemsize, f"{folder} in {str(dtype).removeprefix('torch.')}")
    model = _load(folder, dtype).eval().cuda()
    round_weights(model, round_to)
    hooks = _hooks(model) if layers else []
    found = []
    try:
        with torch.inference_mode():
            for ids, given in zip(prompts, media or [None] * len(prompts), strict=True):
                trace: Trace = {}
                more = given.for_huggingface("cuda", dtype) if given else {}
                with recording(hooks, trace):
                    logits = model(ids[None].cuda(), use_cache=False, **more).logits[0]
                trace[LOGITS] = Activation("lm_head", logits.float().cpu())
                found.append(trace)
    finally:
        del model
        gc.collect()
        torch.cuda.empty_cache()
    return found


def _load(folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    """transformers' model, or our assembly of its parts where it has none."""
    import transformers

    from conversion.multimodal.configuration import CLASSES, OWN_TYPE

    kind = read_config(folder).get("model_type")
    if kind == OWN_TYPE:
        from conversion.compare.assembled import Assembled

        return Assembled(folder, dtype)
    model, report = getattr(transformers, CLASSES.get(kind, "AutoModelForCausalLM")).from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    if missing := report["missing_keys"]:
        raise UserError(f"{folder} lacks {len(missing)} tensors that transformers' model has, first {sorted(missing)[0]}")
    return model


def _hooks(model: torch.nn.Module) -> list[tuple[str, str, torch.nn.Module, Callable]]:
    """Where the points of a trace are in a model, found by what all decoders and encoders of transformers have."""
    path, decoder = next(
        (name, module)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "layers", None), torch.nn.ModuleList) and hasattr(module, "embed_tokens")
    )
    prefix = f"{path}." if path else ""
    hooks = sense_hooks(model)
    for i, layer in enumerate(decoder.layers):
        if i == 0:
            hooks.append(("embedding", f"{prefix}embed_tokens", layer, first_input))
        name = f"{prefix}layers.{i}"
        norms = [getattr(layer, norm, None) for norm in MLP_NORMS]
        if norm := next((norm for norm in norms if norm is not None), None):
            hooks.append((f"layers.{i}.attention", f"{name}.self_attn", norm, first_input))
            children = (child for child in ("mlp", "block_sparse_moe") if hasattr(layer, child))
            name = f"{name}.{next(children)}"
        hooks.append((f"layers.{i}", name, layer, first_output))
    norm = next(norm for norm in FINAL_NORMS if hasattr(decoder, norm))
    return [*hooks, ("norm", f"{prefix}{norm}", getattr(decoder, norm), first_output)]
