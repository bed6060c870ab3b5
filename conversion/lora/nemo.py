"""NeMo 2's LoRA adapters: the folder, where its tensors lie, and how a model takes them.

A NeMo adapter folder has `weights/`, a Megatron distributed checkpoint with the adapter's tensors only, and `adapter.json`:

- `kind`: "canonical_lora", an adapter for each linear that Hugging Face has (`linear_qkv.adapter.adapter_q.linear_in.weight`),
  "lora", one for each of Megatron's fused linears (`linear_qkv.adapter.linear_in.weight`), "dora", as "lora" with magnitudes, or
  "canonical_dora", as "canonical_lora" with magnitudes;
- `target_modules`, `dim`, `alpha`, `dropout`: the arguments of NeMo's transform (`nemo_ext.adapters.transforms.transform`), and
  `ranks` and `alphas` of single targets that differ;
- `base`, `architecture`, and the `senses` of a model that sees or hears: what it adapts; `peft_config`: PEFT's configuration;
- `modules`: for each of PEFT's modules where it lies: the first rank component, the rank, and the factor in its B.

NeMo has one rank and one scale for all layers, since a checkpoint stacks them: A is `[layers, dim, in]`, B `[layers, out, dim]`.
A smaller rank is filled up with zeros in A and B, which training leaves zero (each one's gradient is a product with the other),
and so are layers and parts without an adapter. Another scale goes into B as a factor; that is exact if the factor is a power of
two, and B is kept in fp32 otherwise, so that 16-bit values come back bit for bit.

In the fused form, parts with the same A keep it and its rank; others are put side by side, A as [A_q; A_k; A_v] and B as blocks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from conversion import families, nemo_folder
from conversion.families import Family, Row
from conversion.hf_to_nemo import KEY_PREFIX
from nemo_ext import adapters, run_folder
from nemo_ext.architecture import Architecture
from nemo_ext.errors import UserError, explain
from nemo_ext.multimodal.description import Sense

if TYPE_CHECKING:
    from torch import nn

SETTINGS = nemo_folder.ADAPTER
SETTINGS_KEYS = {"kind", "target_modules", "architecture", "module_prefix", "peft_config", "modules"}
KINDS = ("canonical_lora", "lora", "dora", "canonical_dora")
CANONICAL = ("canonical_lora", "canonical_dora")  # an adapter for each linear that Hugging Face has
PEFT = ("lora", "dora")  # the methods whose adapters PEFT has as LoRA
# Hugging Face's parts of Megatron's fused linears: NeMo's module and its target
PARTS = {
    "q_proj": ("adapter_q", "linear_q"),
    "k_proj": ("adapter_k", "linear_k"),
    "v_proj": ("adapter_v", "linear_v"),
    "gate_proj": ("adapter_gate", "linear_fc1_gate"),
    "up_proj": ("adapter_up", "linear_fc1_up"),
}
A, B, MAGNITUDE = "linear_in.weight", "linear_out.weight", "weight_magnitude"


@dataclass(frozen=True)
class Slot:
    """One adapter module of the Megatron model, in every layer: its key, NeMo's target and the parts that it covers.

    `parts` are Hugging Face's modules with `{i}` for the layer, all or one of those that `row` fuses.
    """

    key: str  # decoder.layers.self_attention.linear_qkv.adapter[.adapter_q]
    target: str
    parts: tuple[str, ...]
    row: Row

    @property
    def fused(self) -> bool:
        return len(self.parts) == len(self.row.hf)

    def merge(self, a: Architecture, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Tensors whose first axis are the parts' output features -> Megatron's."""
        return self.row.layout.merge(a, tensors) if self.fused else tensors[0]

    def split(self, a: Architecture, tensor: torch.Tensor) -> list[torch.Tensor]:
        return self.row.layout.split(a, tensor) if self.fused else [tensor]

    def widths(self, a: Architecture) -> list[int]:
        """Output features of every part."""
        return [families.shape(self.row.hf[f"{part}.weight"], a)[0] for part in self.parts]

    def inputs(self, a: Architecture) -> int:
        return families.shape(self.row.hf[f"{self.parts[0]}.weight"], a)[1]


@dataclass(frozen=True)
class Place:
    """Where a module of PEFT's lies in its slot: rank components [start, start + rank), B multiplied by `factor`."""

    start: int
    rank: int
    factor: float
    dtype: str


def describe(
    architecture: Architecture,
    keys: dict[str, Any],
    base: str,
    dtype: str,
    prefix: str = "model.",
    kind: str | None = "lora",
    senses: Sequence[Sense] = (),
    nf4: bool = False,
) -> dict[str, Any]:
    """`adapter.json` of a run that trains a new adapter: `keys` are its recipe's (rank, alpha, rslora, dropout, targets).

    `kind` is the method's of `nemo_ext.adapters`, None where only encoders of `senses` have an adapter. `base` names the model,
    `dtype` is what its weights are trained in, `prefix` stands for "model." in the base's names. `nf4`: the base's linears are
    in 4 bits in training.
    """
    family = families.FAMILIES[architecture.family]
    if kind:
        settings = adapters.transform_settings(architecture, keys, kind)
    else:
        settings = {"kind": None, "target_modules": [], "dim": keys["rank"], "alpha": keys["alpha"], "dropout": keys["dropout"]}
    names = adapters.targets(architecture.family, keys["targets"]) if kind else []
    parts = [part for slot in slots_of(family, architecture, "canonical_lora") for part in slot.parts]
    parts = [part for part in parts if part.rsplit(".", 1)[1] in names]
    described = {**settings, "base": base, "architecture": architecture.to_dict(), "module_prefix": prefix}
    if nf4:
        described["nf4"] = {"double_quant": keys["double_quant"]}
    if senses:
        described["senses"] = [sense.to_dict() for sense in senses]
    if kind == "adalora":
        described["allocation"] = adapters.allocation(keys)
    if kind not in (*PEFT, None):
        return {**described, "peft_config": None, "modules": {}}
    ranks, alphas = adapters.ranks(architecture.family, keys), adapters.alphas(architecture.family, keys)
    places = {part: vars(Place(0, ranks[part.rsplit(".", 1)[1]], 1.0, dtype)) for part in parts}
    config = peft_config(
        [part.removeprefix("model.layers.{i}.") for part in parts], prefix, keys["rank"], keys["alpha"], keys["dropout"]
    )
    own = {
        "base_model_name_or_path": base,
        "use_rslora": keys["rslora"],
        "use_dora": kind == "dora",
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != keys["rank"]},
        "alpha_pattern": {name: alpha for name, alpha in alphas.items() if alpha != keys["alpha"]},
    }
    return {
        **described,
        "peft_config": {**config, **own},
        "modules": {part.format(i=layer): place for layer in range(architecture.num_layers) for part, place in places.items()},
    }


def peft_config(modules: Sequence[str], prefix: str, rank: int, alpha: float, dropout: float) -> dict[str, Any]:
    """PEFT's configuration of an adapter for these modules of every layer ("mlp.up_proj")."""
    targets: str | list[str] = sorted({module.rsplit(".", 1)[1] for module in modules})
    if prefix != "model.":  # a model with other towers, whose modules may have the same names
        targets = rf"{re.escape(prefix)}layers\.\d+\.({'|'.join(map(re.escape, sorted(modules)))})"
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": dropout,
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
    }


def find(path: Path, alpha: float | None) -> tuple[Path, dict[str, Any]]:
    """The weights and settings of an adapter folder, or of a run's checkpoint with its settings under the run's `model/`."""
    if (path / SETTINGS).is_file():
        folder, file, architecture = path, path / SETTINGS, {}
    else:
        checkpoint = nemo_folder.find(path, adapter=True)
        folder, architecture = checkpoint.folder, checkpoint.architecture.to_dict()
        file = folder.absolute().parents[1] / run_folder.MODEL / SETTINGS
    weights = folder / nemo_folder.WEIGHTS
    if not file.is_file():
        if alpha is None:
            raise UserError(f"{path} has no {SETTINGS}, and its tensors do not say LoRA's alpha: give it, alpha=32 for example")
        return weights, {"architecture": architecture, "alpha": alpha}
    settings = run_folder.read_json(file)
    if settings is None or not SETTINGS_KEYS <= set(settings):
        raise UserError(f"{file} does not describe an adapter: copy it again")
    if alpha is not None and alpha != settings.get("alpha"):
        raise UserError(f"alpha={alpha}, but {file} says {settings.get('alpha')}: leave alpha= out")
    return weights, settings


def load_megatron(adapter_dir: Path, model: nn.Module) -> nn.Module:
    """Put the adapters of a NeMo adapter folder into this process's part of Megatron's GPTModel, with their weights.

    Works at any tensor and pipeline parallel layout; the model's parallel state must be there.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.core import CheckpointingException

    from nemo_ext.adapters import transforms

    weights, settings = find(Path(adapter_dir), None)
    reference = next(model.parameters())
    transforms.apply(transforms.transform(settings), model)
    own = {name: parameter for name, parameter in model.named_parameters() if ".adapter." in name}
    for parameter in own.values():
        parameter.data = parameter.data.to(reference)
    state = model.sharded_state_dict(prefix=KEY_PREFIX)
    wanted = {"state_dict": {name: value for name, value in state.items() if ".adapter." in name}}
    try:
        loaded = dist_checkpointing.load(wanted, str(weights))["state_dict"]
    except (CheckpointingException, KeyError, RuntimeError, OSError) as error:
        raise UserError(f"{weights} cannot be loaded: {explain(error, weights)}") from error
    for name, parameter in own.items():
        parameter.data.copy_(loaded[KEY_PREFIX + name])
    return model


def slots_of(family: Family, a: Architecture, kind: str) -> list[Slot]:
    """The adapter modules that NeMo's transform of this kind makes in a layer."""
    slots = []
    for row in linears(family, a):
        parts = tuple(name.removesuffix(".weight") for name in row.hf)
        linear = row.key.removesuffix(".weight")
        if len(parts) == 1 or kind not in CANONICAL:
            slots.append(Slot(f"{linear}.adapter", linear.rsplit(".", 1)[1], parts, row))
            continue
        for part in parts:
            module, target = PARTS[part.rsplit(".", 1)[1]]
            slots.append(Slot(f"{linear}.adapter.{module}", target, (part,), row))
    return slots


def linears(family: Family, a: Architecture) -> list[Row]:
    """The rows of a layer's linears, experts and routers left out."""
    return [
        row
        for row in family.rows_of(a)
        if list(row.axes(a)) == ["i"]
        and row.megatron.endswith(".weight")
        and all(len(symbols.split()) == 2 and "experts" not in symbols for symbols in row.hf.values())
    ]


def refuse_dora(slots: Sequence[Slot], family: Family, a: Architecture, folder: Path) -> None:
    """NeMo's DoRA stretches a linear's bias and what a norm behind it returns; PEFT's neither."""
    names = {row.megatron for row in family.rows_of(a)}
    for slot in slots:
        linear = slot.row.megatron.removesuffix(".weight")
        for parameter, thing in (("bias", "bias"), ("post_layernorm.weight", "norm")):
            if f"{linear}.{parameter}" in names:
                raise UserError(f"{folder}: NeMo's DoRA scales the {thing} of {slot.target} too, PEFT's does not: merge it")


def scaled(b: torch.Tensor, factor: float, dtype: torch.dtype) -> torch.Tensor:
    return b.to(dtype) if factor == 1.0 else (b.double() * factor).to(dtype)


def unscaled(b: torch.Tensor, place: Place) -> torch.Tensor:
    """B as PEFT had it, in its dtype if that holds every value."""
    exact = b if place.factor == 1.0 else (b.double() / place.factor).to(b.dtype)
    narrow = (b.double() / place.factor).to(getattr(torch, place.dtype))
    return narrow if torch.equal(scaled(narrow, place.factor, b.dtype), b) else exact


def wide(dtype: torch.dtype, factor: float) -> torch.dtype:
    """A dtype for a B of `dtype` times `factor`."""
    return torch.promote_types(dtype, torch.float32) if _rounds(factor, dtype) else dtype


def _rounds(factor: float, dtype: torch.dtype) -> bool:
    """Whether numbers of `dtype` times `factor` may need more bits: fp16's exponent is too short for any factor but 1."""
    return factor != 1.0 and (math.frexp(factor)[0] != 0.5 or dtype == torch.float16)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
