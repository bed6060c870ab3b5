"""Hugging Face's encoders of images and sounds as torch modules, and the features that a projector sees of them.

Modules keep Hugging Face's parameter names. Layers above the chosen one are kept, so that a model is written as it was read, and
not computed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from nemo_ext.multimodal.description import AUDIO, Encoder

MODULES = {
    "siglip_vision_model": (SiglipVisionConfig, SiglipVisionModel),
    "clip_vision_model": (CLIPVisionConfig, CLIPVisionModel),
    "whisper": (WhisperConfig, WhisperEncoder),
}


def build(encoder: Encoder) -> nn.Module:
    """The encoder with random weights in fp32: `SiglipVisionModel`, `CLIPVisionModel` or `WhisperEncoder`."""
    config, module = MODULES[encoder.config["model_type"]]
    settings = {name: value for name, value in encoder.config.items() if name not in ("torch_dtype", "dtype")}
    return module(config(**settings, attn_implementation="sdpa"))


def features(module: nn.Module, encoder: Encoder, inputs: Tensor, recompute: bool = False) -> Tensor:
    """What the projector sees, `[n, positions, hidden]`, of images `[n, 3, H, W]` or log-mel windows `[n, mel bins, frames]`.

    `recompute` keeps only each layer's input for the backward pass.
    """
    hidden = _embedded(module, encoder, inputs)
    for layer in computed_layers(module, encoder):
        hidden = checkpoint(_run, layer, encoder, hidden, use_reentrant=False) if recompute else _run(layer, encoder, hidden)
    if encoder.feature_layer is None and (norm := _final_norm(module, encoder)) is not None:
        hidden = norm(hidden)
    return hidden[:, 1:] if encoder.has_class_token and not encoder.class_token else hidden


def unused(module: nn.Module, encoder: Encoder) -> Iterator[nn.Parameter]:
    """Parameters that features do not depend on: of layers above the chosen one, of norms and heads behind them."""
    used = [computed_layers(module, encoder)]
    norm = _final_norm(module, encoder)
    if encoder.modality == AUDIO:
        used += [module.conv1, module.conv2, module.embed_positions]
    else:
        used += [module.vision_model.embeddings, getattr(module.vision_model, "pre_layrnorm", None)]
    if encoder.feature_layer is None:
        used.append(norm)
    kept = {id(parameter) for part in used if part is not None for parameter in part.parameters()}
    return (parameter for parameter in module.parameters() if id(parameter) not in kept)


def computed_layers(module: nn.Module, encoder: Encoder) -> nn.ModuleList:
    """The layers that features depend on."""
    layers = module.layers if encoder.modality == AUDIO else module.vision_model.encoder.layers
    return layers[: encoder.num_computed_layers]


def _final_norm(module: nn.Module, encoder: Encoder) -> nn.Module | None:
    """The norm of the last hidden state. CLIP normalises only its pooled class token."""
    if encoder.modality == AUDIO:
        return module.layer_norm
    return module.vision_model.post_layernorm if isinstance(module, SiglipVisionModel) else None


def _embedded(module: nn.Module, encoder: Encoder, inputs: Tensor) -> Tensor:
    """The first hidden state."""
    if encoder.modality == AUDIO:
        hidden = nn.functional.gelu(module.conv2(nn.functional.gelu(module.conv1(inputs)))).transpose(1, 2)
        return hidden + module.embed_positions(torch.arange(hidden.shape[1], device=hidden.device))
    vision = module.vision_model
    hidden = vision.embeddings(inputs)
    return vision.pre_layrnorm(hidden) if isinstance(module, CLIPVisionModel) else hidden


def _run(layer: nn.Module, encoder: Encoder, hidden: Tensor) -> Tensor:
    """One layer on all positions, none masked."""
    masks = {"siglip_vision_model": 1, "clip_vision_model": 2, "whisper": 2}[encoder.config["model_type"]]
    output = layer(hidden, *[None] * masks)
    return output if isinstance(output, Tensor) else output[0]
