"""Encoders to compose a model with: those of a Hugging Face folder, and random ones of a published shape."""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from conversion import hub_cache, safetensors_io
from conversion.hf_to_nemo import read_config
from conversion.multimodal.configuration import complete
from conversion.multimodal.rows import WRAPPED_VISION, Shapes, encoder_shapes
from nemo_ext import run_folder
from nemo_ext.errors import UserError
from nemo_ext.multimodal import towers
from nemo_ext.multimodal.description import AUDIO, MODALITIES

# Whole models that have an encoder inside: where its configuration is, and its own model_type
_WHOLE = {"siglip": ("vision_config", "siglip_vision_model"), "clip": ("vision_config", "clip_vision_model")}
_PREFIXES = (WRAPPED_VISION, "", "encoder.", "model.encoder.")
_NOT_OF_THE_ENCODER = ("architectures", "torch_dtype", "dtype", "transformers_version", "_name_or_path", "_commit_hash")
PREPROCESSOR = "preprocessor_config.json"


@dataclass(frozen=True)
class Part:
    """A tensor to be written: its dtype and shape, and how to get it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Tower:
    """An encoder: its complete configuration, its tensors by the names of its rows, and its preprocessor_config.json."""

    config: dict[str, Any]
    tensors: Mapping[str, Part]
    preprocessor: dict[str, Any]
    files: tuple[Path, ...] = ()


def tower(source: str | Mapping[str, Any], seed: int, dtype: torch.dtype = torch.float32) -> Tower:
    """The encoder of `source`: "hf:FOLDER", "random:NAME", or a configuration, which gets random weights of `dtype`.

    Raises UserError for an unknown name or kind of encoder, and for missing or ill-shaped tensors.
    """
    if isinstance(source, Mapping):
        return _random(complete(source), seed, dtype)
    kind, _, rest = source.partition(":")
    if kind == "random":
        return _random(complete(towers.shape(rest)), seed, dtype)
    if kind != "hf" or not rest:
        raise UserError(f"tower={source} is unknown: give hf:FOLDER, or random:NAME with one of {', '.join(towers.SHAPES)}")
    folder = Path(rest).expanduser()
    found = folder if folder.is_dir() else hub_cache.find(rest)
    if found is None:
        raise UserError(f"tower={source}: neither a folder nor a model in Hugging Face's local cache")
    return _read(found)


def random_parts(shapes: Shapes, seed: int, dtype: torch.dtype, initial: Callable[..., torch.Tensor]) -> dict[str, Part]:
    """Parts that `initial(name, shape, generator)` fills when they are read; each name has a generator of its own."""

    def fill(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return initial(name, shape, torch.Generator().manual_seed(zlib.crc32(name.encode(), seed))).to(dtype)

    return {name: Part(dtype, shape, functools.partial(fill, name, shape)) for name, shape in shapes.items()}


def _random(config: dict[str, Any], seed: int, dtype: torch.dtype) -> Tower:
    tensors = random_parts(encoder_shapes(config), seed, dtype, _initial)
    return Tower(config, tensors, default_preprocessor(config))


def _initial(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """As SigLIP begins: Xavier for linears, LeCun for convolutions, positions with 1/sqrt(width); Whisper's are sinusoids."""
    width = shape[-1]
    if name == "embed_positions.weight":
        return _sinusoids(*shape)
    if "position_embedding" in name or "class_embedding" in name:
        return torch.randn(shape, generator=generator) * width**-0.5
    if len(shape) == 1:
        return torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
    if "conv" in name or "patch_embedding" in name:
        return torch.randn(shape, generator=generator) * math.prod(shape[1:]) ** -0.5
    rows = shape[-2] // 3 if name.endswith("in_proj_weight") else shape[-2]
    bound = math.sqrt(6 / (rows + width))
    return torch.rand(shape, generator=generator) * 2 * bound - bound


def _sinusoids(length: int, width: int) -> torch.Tensor:
    """Whisper's positions `[length, width]`: sines, then cosines, of wavelengths from 2 pi to 10000 times that."""
    rates = torch.exp(-math.log(10_000) / (width // 2 - 1) * torch.arange(width // 2))
    angles = torch.arange(length)[:, None] * rates[None]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _read(folder: Path) -> Tower:
    found = read_config(folder)
    config, kind = found, found.get("model_type")
    if kind in _WHOLE:
        part, own = _WHOLE[kind]
        config = {"model_type": own, **found.get(part, {})}
    if config.get("model_type") not in MODALITIES:
        known = ", ".join([*_WHOLE, *MODALITIES])
        raise UserError(f"tower={folder}: config.json has model_type={kind!r}, no encoder that is known; known: {known}")
    config = {key: value for key, value in complete(config).items() if key not in _NOT_OF_THE_ENCODER}
    if MODALITIES[config["model_type"]] == AUDIO:
        known = ("d_model", "num_mel_bins", "max_source_positions", "activation_function", "scale_embedding", "init_std")
        config = {key: config[key] for key in config if key == "model_type" or key in known or key.startswith("encoder_")}
    stored = safetensors_io.open_folder(folder)
    shapes = encoder_shapes(config)
    first = next(iter(shapes)).removeprefix(WRAPPED_VISION)
    prefix = next((prefix for prefix in _PREFIXES if prefix + first in stored), _PREFIXES[0])
    tensors = {}
    for name, shape in shapes.items():
        in_file = prefix + name.removeprefix(WRAPPED_VISION)
        info = stored.get(in_file)
        if info is None:
            raise UserError(f"tower={folder} lacks tensor {in_file}, which its config.json asks for")
        if info.shape != shape:
            raise UserError(f"tower={folder}: tensor {in_file} has shape {list(info.shape)}, config.json asks for {list(shape)}")
        tensors[name] = Part(info.dtype, info.shape, info.read)
    preprocessor = run_folder.read_json(folder / PREPROCESSOR) or default_preprocessor(config)
    return Tower(config, tensors, preprocessor, (folder / "config.json", *safetensors_io.files_of(stored)))


def default_preprocessor(config: Mapping[str, Any]) -> dict[str, Any]:
    """preprocessor_config.json as published encoders of this kind have it, for this one's size."""
    if MODALITIES[config["model_type"]] == AUDIO:
        seconds = config["max_source_positions"] // 50
        return {"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": config["num_mel_bins"],
                "sampling_rate": 16_000, "hop_length": 160, "n_fft": 400, "chunk_length": seconds, "n_samples": seconds * 16_000,
                "nb_max_frames": seconds * 100, "padding_side": "right", "padding_value": 0.0}  # fmt: skip
    side = config["image_size"]
    common = {"do_resize": True, "resample": 3, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
    square = {"height": side, "width": side}
    if config["model_type"] == "siglip_vision_model":
        half = [0.5, 0.5, 0.5]
        return {"image_processor_type": "SiglipImageProcessor", **common, "size": square, "image_mean": half, "image_std": half}
    return {"image_processor_type": "CLIPImageProcessor", **common, "size": {"shortest_edge": side}, "do_center_crop": True,
            "crop_size": square, "do_convert_rgb": True, "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711]}  # fmt: skip
