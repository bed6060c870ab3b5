"""LoRA and its relatives in PEFT's format, read and written tensor by tensor.

The files are `adapter_config.json` and `adapter_model.safetensors`.

An adapted linear computes `W x + scale * B A x` with A `[r, in]` and B `[out, r]` (Hu et al. 2021, arXiv:2106.09685). The scale
is `lora_alpha / r`, with rsLoRA `lora_alpha / sqrt(r)` (Kalajdzievski 2023, arXiv:2312.03732). DoRA has a magnitude `m` `[out]`
beside them: every row of `W + scale * B A` is stretched to the length m (Liu et al. 2024, arXiv:2402.09353). AdaLoRA's
`B diag(E) A` has the scale `lora_alpha / (init_r + 1e-5)` (Zhang et al. 2023, arXiv:2303.10512), and FourierFT adds the inverse
Fourier transform of a few coefficients (Gao et al. 2024, arXiv:2405.03003).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from conversion import families, safetensors_io, shards
from conversion.atomic import Unfinished
from conversion.families import Family
from conversion.families.table import WRAPPED
from conversion.multimodal.rows import NEWLINE
from conversion.safetensors_io import TensorInfo
from conversion.shards import Shard
from conversion.workers import Progress
from nemo_ext.adapters import spectrum
from nemo_ext.errors import UserError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
NEEDED = {"LORA": ("r", "lora_alpha"), "ADALORA": ("init_r", "lora_alpha"),
          "FOURIERFT": ("scaling", "random_loc_seed")}  # fmt: skip
PREFIX = "base_model.model."  # PEFT's wrapper around the model
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Initialisations that leave the base as it is; the others (PiSSA, OLoRA, LoftQ, ...) train against a changed base.
INITIALISATIONS = (True, False, "gaussian", "eva", "orthogonal")
UNSUPPORTED = (
    "layer_replication", "trainable_token_indices", "target_parameters", "alora_invocation_tokens", "use_qalora", "use_bdlora",
    "arrow_config", "kasa_config", "monteclora_config", "lora_bias",
)  # fmt: skip
_TENSOR = re.compile(
    r"(?P<module>.+)\.(?:(?P<kind>lora_A|lora_B|lora_E|lora_magnitude_vector|fourierft_spectrum)(?:\.default)?(?:\.weight)?"
    r"|(?P<embedding>lora_embedding_A|lora_embedding_B)(?:\.default)?)"
)


@dataclass(frozen=True)
class Computed:
    """A tensor that is computed when it is read; has what `TensorInfo` has."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Update:
    """What the adapter does to the weight of one module."""

    a: TensorInfo  # [r, in]
    b: TensorInfo  # [out, r]
    scale: float
    magnitude: TensorInfo | None = None  # [out]
    transposed: bool = False  # the weight is stored [in, out], as an embedding's or GPT-2's

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def delta(self, shape: tuple[int, int]) -> torch.Tensor:
        """What is added to a weight `[out, in]` before any magnitude, fp32."""
        return self.scale * (self.b.read().float() @ self.a.read().float())

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a weight of this shape has place for it."""
        return self.shape == shape

    def __str__(self) -> str:
        return str(list(self.shape))

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the weight that the update is added to."""
        shape = (self.b.shape[0], self.a.shape[1])
        return shape[::-1] if self.transposed else shape


@dataclass(frozen=True)
class Spectrum:
    """FourierFT's update of the weight of one module; it fits every weight that has as many frequencies."""

    coefficients: TensorInfo  # [n]
    scaling: float
    seed: int
    magnitude: None = None
    transposed: bool = False

    def delta(self, shape: tuple[int, int]) -> torch.Tensor:
        """What is added to a weight `[out, in]`, fp32."""
        return spectrum.matrix(self.coefficients.read(), *shape, self.seed, self.scaling)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a weight of this shape has place for it."""
        return len(shape) == 2 and self.coefficients.shape[0] <= math.prod(shape)

    def __str__(self) -> str:
        return f"{self.coefficients.shape[0]} frequencies"


@dataclass(frozen=True)
class Adapter:
    """A PEFT folder: its configuration, `{module: update}`, and the tensors that it replaces as a whole (`modules_to_save`)."""

    folder: Path
    config: dict[str, Any]
    updates: dict[str, Update | Spectrum]
    replaced: dict[str, TensorInfo]

    @property
    def dora(self) -> bool:
        return bool(self.config.get("use_dora"))


def read(folder: Path) -> Adapter:
    """The adapter in `folder`; the tensors stay on disk.

    Raises UserError: no adapter, several, pickled weights, no relative of LoRA, an option that changes what LoRA computes (the
    name is said), biases, a tensor without its partner, or ranks that differ from the configuration's.
    """
    folder = Path(folder)
    config = _read_config(folder)
    _refuse_options(folder, config)
    if not (folder / WEIGHTS).is_file():
        if (folder / "adapter_model.bin").is_file():
            raise UserError(f"{folder} has a pickled adapter_model.bin, which can run code: save it as safetensors first")
        raise UserError(f"{folder} has no {WEIGHTS}")

    found: dict[str, dict[str, TensorInfo]] = {}
    replaced = {}
    for key, info in safetensors_io.read_header(folder / WEIGHTS).items():
        name = key.removeprefix(PREFIX)
        if info.dtype not in FLOATS:
            raise UserError(f"{folder}: {key} is {_dtype(info)}, which is not floating point: the adapter is quantized")
        if match := _TENSOR.fullmatch(name):
            kind = match["kind"] or match["embedding"]
            found.setdefault(match["module"], {})[kind] = info
        elif ".lora_" in name or not _whole(config, name):
            raise UserError(f"{folder}: {key} is not a tensor of LoRA")
        else:
            replaced[name.replace(".base_layer.", ".")] = info
    if not found and not replaced:
        raise UserError(f"{folder / WEIGHTS} has no tensors")
    try:
        updates = {module: _update(folder, config, module, parts) for module, parts in found.items()}
    except (TypeError, ValueError, AttributeError, re.error) as error:
        raise UserError(f"{folder / CONFIG} is not a PEFT configuration: {error}") from error
    return Adapter(folder, config, updates, replaced)


def write(
    unfinished: Unfinished,
    config: Mapping[str, Any],
    tensors: Mapping[str, Computed | TensorInfo],
    progress: Progress | None = None,
) -> None:
    """Write PEFT's two files into a folder that is `unfinished`; `tensors` by PEFT's names without `base_model.model.`."""
    named = {PREFIX + name: tensor for name, tensor in tensors.items()}
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in named.items()}
    layout = [Shard(WEIGHTS, tuple(specs), safetensors_io.FORMAT)]
    shards.write(unfinished, layout, specs, lambda name: named[name].read(), progress)
    (unfinished.path / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def canonical(family: Family, name: str) -> tuple[str, str]:
    """A module's or tensor's name as the family's rows say it, and what stood there for "model."; "" where nothing did."""
    for prefix in sorted({*family.prefixes, *WRAPPED}, key=len, reverse=True):
        if name.startswith(prefix):
            return "model." + name.removeprefix(prefix), prefix
    return name, ""


def is_target(config: Mapping[str, Any], module: str) -> bool:
    """Whether PEFT's `target_modules`, `exclude_modules` and `layers_to_transform` select this module.

    Not for `target_modules="all-linear"`, which needs the model; PEFT stores the names that it found instead.
    """
    targets = config.get("target_modules") or []
    if _matches(config.get("exclude_modules") or [], module):
        return False
    if any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in config.get("modules_to_save") or []):
        return False
    if isinstance(targets, str):
        return _matches(targets, module)
    layers = config.get("layers_to_transform")
    if not _matches(targets, module) or layers is None or layers == []:
        return _matches(targets, module)
    patterns = config.get("layers_pattern") or [r"[^.]*"]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if match := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module):
            return int(match[1]) in ([layers] if isinstance(layers, int) else layers)
    return False


def scaling(config: Mapping[str, Any], module: str) -> tuple[int, float]:
    """Rank and scale that the configuration gives a module, by `rank_pattern`, `alpha_pattern` and `use_rslora`."""
    rank = _by_pattern(config.get("rank_pattern") or {}, module, config["r"])
    alpha = _by_pattern(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
    if not isinstance(rank, int) or rank < 1:
        raise UserError(f"{CONFIG} gives {module} the rank {rank!r}: it must be a positive integer")
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def tensor_name(family_or_none: Family | None, names: Mapping[str, Any], name: str) -> str | None:
    """Which of a checkpoint's tensor `names` is the model's parameter `name`; None if none is.

    transformers saves some models under other names than their modules have (Gemma 3 with a vision part, LLaVA).
    """
    if name in names or family_or_none is None:
        return name if name in names else None
    if (beside := name.removeprefix("model.")) in names:  # the language model: a tower, a projector
        return beside
    stored = families.hf_name(canonical(family_or_none, name)[0], families.base_prefix(family_or_none, names))
    return stored if stored in names else None


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    if not file.is_file():
        several = sorted(each.parent.name for each in folder.glob(f"*/{CONFIG}")) if folder.is_dir() else []
        if several:
            names = ", ".join(several)
            raise UserError(
                f"{folder} holds {len(several)} adapters ({names}): name one of these folders, they convert one by one"
            )
        raise UserError(f"{folder} is not a PEFT adapter: it has no {CONFIG}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        if (kind := config["peft_type"]) not in NEEDED:
            raise UserError(f"{file} has peft_type={kind!r}; only {', '.join(NEEDED)} convert (LORA with or without DoRA)")
        for option in NEEDED[kind]:
            config[option]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{file} is not a PEFT configuration: {type(error).__name__} {error}") from error
    return config


def _refuse_options(folder: Path, config: Mapping[str, Any]) -> None:
    if config.get("bias", "none") != "none":
        raise UserError(f"{folder}: bias={config['bias']!r} trains the base's biases too: only 'none' converts")
    if config.get("fan_in_fan_out") and config["peft_type"] == "FOURIERFT":
        raise UserError(f"{folder}: fan_in_fan_out is for GPT-2's linears, which do not convert")
    for option in UNSUPPORTED:
        if config.get(option):
            raise UserError(f"{folder}: {option}={config[option]!r} computes something other than W x + scale * B A x")
    for option in ("target_modules", "exclude_modules"):
        names = config.get(option)
        if isinstance(names, str):
            try:
                re.compile(names)
            except re.error as error:
                raise UserError(f"{folder}: {option}={names!r} is not a regular expression: {error}") from error
        elif names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise UserError(f"{folder}: {option}={names!r} is neither a list of names nor a regular expression")
    if (start := config.get("init_lora_weights", True)) not in INITIALISATIONS:
        raise UserError(
            f"{folder}: init_lora_weights={start!r} changed the base's weights before training; save the adapter with "
            "PEFT's path_initial_model_for_weight_conversion first"
        )


def _update(folder: Path, config: Mapping[str, Any], module: str, parts: Mapping[str, TensorInfo]) -> Update | Spectrum:
    kind = "FOURIERFT" if "fourierft_spectrum" in parts else "ADALORA" if "lora_E" in parts else "LORA"
    if kind != config["peft_type"]:
        raise UserError(f"{folder}: {CONFIG} says {config['peft_type']}, but {module} has {' and '.join(sorted(parts))}")
    if kind == "FOURIERFT":
        return Spectrum(parts["fourierft_spectrum"], config["scaling"], config["random_loc_seed"])
    embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
    names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    if missing := [name for name in names if name not in parts]:
        raise UserError(f"{folder / WEIGHTS} lacks {missing[0]} of {module}")
    a, b = (parts[name] for name in names)
    magnitude = parts.get("lora_magnitude_vector")
    if kind == "ADALORA":
        a, rank, scale = _with_values(a, parts["lora_E"]), b.shape[-1], config["lora_alpha"] / (config["init_r"] + 1e-5)
    else:
        rank, scale = scaling(config, module)
    if len(a.shape) != 2 or len(b.shape) != 2:
        raise UserError(f"{folder}: {module} has A {list(a.shape)} and B {list(b.shape)}; only linears and embeddings convert")
    if a.shape[0] != rank or b.shape[1] != rank:
        raise UserError(f"{folder}: {module} has A {list(a.shape)} and B {list(b.shape)}, but {CONFIG} gives it rank {rank}")
    if bool(config.get("use_dora")) != (magnitude is not None):
        has = "lacks a magnitude" if magnitude is None else "has a magnitude"
        raise UserError(f"{folder}: {CONFIG} says use_dora={bool(config.get('use_dora'))}, but {module} {has}")
    if magnitude is not None and (embedding or math.prod(magnitude.shape) != b.shape[0]):
        raise UserError(f"{folder}: {module} has DoRA magnitudes {list(magnitude.shape)}; only linears' convert")
    return Update(a, b, scale, magnitude, transposed=embedding or bool(config.get("fan_in_fan_out")))


def _with_values(a: TensorInfo, values: TensorInfo) -> Computed:
    """diag(E) A."""
    return Computed(a.shape, torch.float32, lambda: values.read().float().reshape(-1, 1) * a.read().float())


def _whole(config: Mapping[str, Any], name: str) -> bool:
    """Whether a tensor of this name may be one that is replaced as a whole."""
    saved = config.get("modules_to_save") or []
    return name.endswith((".weight", ".bias", NEWLINE)) or any(f".{module}." in f".{name}" for module in saved)


def _by_pattern(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _matches(names: str | list[str], module: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _dtype(info: TensorInfo) -> str:
    return str(info.dtype).removeprefix("torch.")
