"""Tensor names and shapes of encoders and projectors: the rows that a family's table has besides its own in a model with senses.

An encoder's tensors keep Hugging Face's names and layouts, `senses.vision.encoder.NAME` for LLaVA's `vision_tower.NAME`; Megatron
holds them whole on every rank. Checkpoints of transformers come in three spellings: `vision_tower.vision_model.` beside
`language_model.model.` (what transformers 4 writes and everything reads), the same after `model.`, and without `vision_model.`
(transformers 5).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from conversion.families.table import WRAPPED, Family, Row
from conversion.multimodal.configuration import MODALITY_TOWERS
from nemo_ext.architecture import Architecture
from nemo_ext.multimodal.description import Sense

Shapes = dict[str, tuple[int, ...]]
WRAPPED_VISION = "vision_model."
PROJECTOR, NEWLINE = "multi_modal_projector", "image_newline"


def with_senses(family: Family, architecture: Architecture, senses: Sequence[Sense], names: Iterable[str] = ()) -> Family:
    """The family's table with rows for the senses, in the spelling of a checkpoint with these `names`; itself without senses."""
    if not senses:
        return family
    short = any(name.removeprefix("model.").startswith("vision_tower.encoder.") for name in names)
    rows = [row for sense in senses for row in sense_rows(sense, architecture.hidden_size, short)]
    ignored = (*family.ignored, ".embeddings.position_ids")
    return dataclasses.replace(family, rows=(*rows, *family.rows), prefixes=WRAPPED, ignored=ignored)


def sense_rows(sense: Sense, hidden_size: int, short: bool = False) -> Iterator[Row]:
    """The rows of one sense, for a decoder of this width; `short` leaves `vision_model.` out of Hugging Face's names."""
    place, tower = f"senses.{sense.modality}", MODALITY_TOWERS[sense.modality]
    for name, shape in encoder_shapes(sense.encoder.config).items():
        yield Row({f"{tower}.{name.removeprefix(WRAPPED_VISION) if short else name}": shape}, f"{place}.encoder.{name}")
    for name, shape in projector_shapes(sense, hidden_size).items():
        yield Row({f"{PROJECTOR}.{name}": shape}, f"{place}.projector.{name}")
    if sense.tiling is not None:
        yield Row({NEWLINE: (hidden_size,)}, f"{place}.newline")


def canonical(name: str) -> str:
    """A tower's, projector's or newline's name in any spelling -> in that of the rows; other names as they are."""
    bare = name.removeprefix("model.")
    if bare.startswith("vision_tower."):
        return f"vision_tower.{WRAPPED_VISION}{bare.removeprefix('vision_tower.').removeprefix(WRAPPED_VISION)}"
    return bare if bare.startswith(("audio_tower.", f"{PROJECTOR}.")) or bare == NEWLINE else name


def encoder_shapes(config: Mapping[str, Any]) -> Shapes:
    """{name: shape} of an encoder's parameters, as of transformers' SiglipVisionModel, CLIPVisionModel or WhisperEncoder."""
    return {"siglip_vision_model": _siglip, "clip_vision_model": _clip, "whisper": _whisper}[config["model_type"]](config)


def projector_shapes(sense: Sense, hidden_size: int) -> Shapes:
    """{name: shape} of the projector's parameters, from joined features of the encoder to a decoder of width `hidden_size`."""
    projector = sense.projector
    width = sense.encoder.hidden_size * projector.downsample ** len(sense.encoder.grid)
    linears = {"linear_1": width} | ({"linear_2": hidden_size} if projector.kind == "mlp2x_gelu" else {})
    shapes: Shapes = {}
    for name, columns in linears.items():
        shapes |= _linear(name, hidden_size, columns, projector.bias)
    return shapes


def _linear(name: str, rows: int, columns: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (rows, columns)} | ({f"{name}.bias": (rows,)} if bias else {})


def _norm(name: str, size: int) -> Shapes:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def _attention(name: str, h: int, key_bias: bool = True) -> Shapes:
    shapes: Shapes = {}
    for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
        shapes |= _linear(f"{name}.{part}", h, h, key_bias or part != "k_proj")
    return shapes


def _vision_layers(config: Mapping[str, Any]) -> Shapes:
    h, ffn, shapes = config["hidden_size"], config["intermediate_size"], {}
    for i in range(config["num_hidden_layers"]):
        layer = f"vision_model.encoder.layers.{i}"
        shapes |= _norm(f"{layer}.layer_norm1", h) | _attention(f"{layer}.self_attn", h) | _norm(f"{layer}.layer_norm2", h)
        shapes |= _linear(f"{layer}.mlp.fc1", ffn, h) | _linear(f"{layer}.mlp.fc2", h, ffn)
    return shapes | _norm("vision_model.post_layernorm", h)


def _clip(config: Mapping[str, Any]) -> Shapes:
    h, patch, side = config["hidden_size"], config["patch_size"], config["image_size"] // config["patch_size"]
    return {
        "vision_model.embeddings.class_embedding": (h,),
        "vision_model.embeddings.patch_embedding.weight": (h, config["num_channels"], patch, patch),
        "vision_model.embeddings.position_embedding.weight": (side * side + 1, h),
        **_norm("vision_model.pre_layrnorm", h),
        **_vision_layers(config),
    }


def _siglip(config: Mapping[str, Any]) -> Shapes:
    h, patch, side = config["hidden_size"], config["patch_size"], config["image_size"] // config["patch_size"]
    shapes = {
        "vision_model.embeddings.patch_embedding.weight": (h, config["num_channels"], patch, patch),
        "vision_model.embeddings.patch_embedding.bias": (h,),
        "vision_model.embeddings.position_embedding.weight": (side * side, h),
        **_vision_layers(config),
    }
    if config.get("vision_use_head", True):
        head, ffn = "vision_model.head", config["intermediate_size"]
        shapes |= {f"{head}.probe": (1, 1, h)}
        shapes |= {f"{head}.attention.in_proj_weight": (3 * h, h), f"{head}.attention.in_proj_bias": (3 * h,)}
        shapes |= _linear(f"{head}.attention.out_proj", h, h) | _norm(f"{head}.layernorm", h)
        shapes |= _linear(f"{head}.mlp.fc1", ffn, h) | _linear(f"{head}.mlp.fc2", h, ffn)
    return shapes


def _whisper(config: Mapping[str, Any]) -> Shapes:
    h, ffn, mels = config["d_model"], config["encoder_ffn_dim"], config["num_mel_bins"]
    shapes = {"conv1.weight": (h, mels, 3), "conv1.bias": (h,), "conv2.weight": (h, h, 3), "conv2.bias": (h,)}
    shapes["embed_positions.weight"] = (config["max_source_positions"], h)
    for i in range(config["encoder_layers"]):
        layer = f"layers.{i}"
        shapes |= _attention(f"{layer}.self_attn", h, key_bias=False) | _norm(f"{layer}.self_attn_layer_norm", h)
        shapes |= _linear(f"{layer}.fc1", ffn, h) | _linear(f"{layer}.fc2", h, ffn) | _norm(f"{layer}.final_layer_norm", h)
    return shapes | _norm("layer_norm", h)
