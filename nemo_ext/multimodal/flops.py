"""Floating-point operations of an encoder and its projector, by the convention of `Architecture.flops_per_token`: two for each
multiply-add, backward twice forward, recomputation not counted. Plain arithmetic; imports neither torch nor NeMo.
"""

from __future__ import annotations

import math

from nemo_ext.multimodal.description import AUDIO, Encoder, Sense
from nemo_ext.multimodal.freezing import FULL, LORA, Trained


def _stem(encoder: Encoder) -> tuple[float, float]:
    """Multiply-adds of the convolutions before an encoder's layers, for one input: (of the first, of the second)."""
    c, h = encoder.config, encoder.hidden_size
    if encoder.modality == AUDIO:  # of three frames each, the first over twice as many
        frames = c["max_source_positions"]
        return 2 * frames * 3 * c["num_mel_bins"] * h, frames * 3 * h * h
    return math.prod(encoder.grid) * h * c.get("num_channels", 3) * c["patch_size"] ** 2, 0.0


def _layers(encoder: Encoder) -> tuple[float, float]:
    """Multiply-adds of the computed layers for one input: (of their linears, of attention, where every position sees all)."""
    h, ffn = encoder.hidden_size, encoder.config["encoder_ffn_dim" if encoder.modality == AUDIO else "intermediate_size"]
    positions = math.prod(encoder.grid) + encoder.has_class_token
    layers = encoder.num_computed_layers
    return layers * positions * (4 * h * h + 2 * h * ffn), layers * 2 * positions**2 * h


def encoder_flops(encoder: Encoder) -> float:
    """Of one input (an image, a tile, a window), forward."""
    return 2.0 * (sum(_stem(encoder)) + sum(_layers(encoder)))


def trained_flops(sense: Sense, hidden_size: int, trained: Trained, rank: int) -> float:
    """Of one input, forward and backward, of the encoder and the projector to a decoder of this width.

    A gradient is counted where one is computed: none of a frozen encoder, of frozen weights with adapters of `rank` beside them
    that of their inputs alone, none of pixels and sounds.
    """
    encoder, projector = sense.encoder, sense.projector
    (first, second), (linears, attention) = _stem(encoder), _layers(encoder)
    if trained.tower == FULL:
        total = 4 * first + 6 * (second + linears + attention)
    elif trained.tower == LORA:
        positions = math.prod(encoder.grid) + encoder.has_class_token
        adapters = positions * encoder.adapter_parameters(rank)
        total = 2 * (first + second) + 4 * linears + 6 * (attention + adapters)
    else:
        total = encoder_flops(encoder)
    features = encoder.hidden_size * projector.downsample ** len(encoder.grid)
    lower = sense.tokens * features * hidden_size
    upper = sense.tokens * hidden_size * hidden_size if projector.kind == "mlp2x_gelu" else 0
    return float(total + (6 if trained.tower in (FULL, LORA) else 4) * lower + 6 * upper)
