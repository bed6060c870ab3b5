"""AdaLoRA's and FourierFT's adapters from a run's checkpoint to PEFT, exact, tensor by tensor, without a model.

Both have one adapter for each linear of the Hugging Face model, stacked over the layers: `....adapter.adapter_q.left`
`[layers, out, rank]`, `values` `[layers, rank]`, `right` `[layers, rank, in]` and `kept` `[layers, rank]` of AdaLoRA's
P diag(E) Q, `coefficients` `[layers, n]` of FourierFT. `adapter.json` says what they are, as for LoRA (`conversion.lora.nemo`),
and how ranks were allocated.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from conversion import families
from conversion.atomic import fingerprint, resumable_folder
from conversion.dist_checkpoint import SavedTensor, read
from conversion.hf_to_nemo import KEY_PREFIX
from conversion.lora import adapter as lora
from conversion.lora.adapter import Computed
from conversion.lora.nemo import Slot, peft_config, slots_of
from conversion.workers import Progress
from nemo_ext.architecture import Architecture
from nemo_ext.errors import UserError

TENSORS = {"adalora": ("left", "values", "right", "kept"), "fourierft": ("coefficients",)}


def convert(weights: Path, settings: Mapping[str, Any], out_dir: Path, progress: Progress | None = None) -> Path:
    """Write the checkpoint `weights`, which `settings` (`adapter.json`) describe, as the PEFT folder `out_dir`; return that.

    Raises UserError for tensors that the description does not have.
    """
    kind, a = settings["kind"], Architecture(**settings["architecture"])
    family = families.FAMILIES[a.family]
    slots = [slot for slot in slots_of(family, a, "canonical_lora") if slot.target in settings["target_modules"]]
    stacks = [(slot, _stack(weights, kind, slot)) for slot in slots]
    modules = [part.removeprefix("model.layers.{i}.") for slot in slots for part in slot.parts]
    base = settings.get("base")
    if kind == "adalora":
        config, tensors = _adalora(settings, stacks, a)
    else:
        config, tensors = _fourierft(settings, stacks, a)
    prefix = settings["module_prefix"]
    placed = {prefix + name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    if "rank_pattern" in config:
        config["rank_pattern"] = {prefix + name.removeprefix("model."): kept for name, kept in config["rank_pattern"].items()}
    targets = peft_config(modules, prefix, 1, 1, 0.0)["target_modules"]
    config = {"task_type": "CAUSAL_LM", "base_model_name_or_path": base, "target_modules": targets, "bias": "none",
              "fan_in_fan_out": False, "inference_mode": True, "modules_to_save": None, **config}  # fmt: skip
    with resumable_folder(out_dir, fingerprint(sorted(weights.iterdir()), "lora_per_linear", settings)) as unfinished:
        lora.write(unfinished, config, placed, progress)
    return Path(out_dir)


def _stack(weights: Path, kind: str, slot: Slot) -> dict[str, SavedTensor]:
    stored = _read(weights)
    found = {name: stored.get(f"{KEY_PREFIX}{slot.key}.{name}") for name in TENSORS[kind]}
    if missing := [name for name, tensor in found.items() if tensor is None]:
        raise UserError(f"{weights} lacks {slot.key}.{missing[0]}: it is no checkpoint of this adapter")
    return found


@functools.lru_cache(maxsize=1)
def _read(weights: Path) -> Mapping[str, SavedTensor]:
    return read(weights)


def _adalora(
    settings: Mapping[str, Any], stacks: Sequence[tuple[Slot, Mapping[str, SavedTensor]]], a: Architecture
) -> tuple[dict[str, Any], dict[str, Computed]]:
    """Only what is not cut is written: `rank_pattern` says of every rank component whether it is."""
    allocation = settings["allocation"]
    tensors, pattern = {}, {}
    for layer in range(a.num_layers):
        for slot, stack in stacks:
            module = slot.parts[0].format(i=layer)
            values = stack["values"].read(layer)
            kept = (stack["kept"].read(layer) != 0) | (values != 0)
            pattern[f"{module}.lora_E"] = kept.tolist()
            rank, dtype = int(kept.sum()), values.dtype
            right = functools.partial(_right, stack, layer, kept)
            left = functools.partial(_left, slot, stack, layer, kept, a)
            tensors[f"{module}.lora_A"] = Computed((rank, slot.inputs(a)), dtype, right)
            tensors[f"{module}.lora_B"] = Computed((slot.widths(a)[0], rank), dtype, left)
            tensors[f"{module}.lora_E"] = Computed((rank, 1), dtype, functools.partial(_values, stack, layer, kept))
    alpha = settings["alpha"]
    config = {
        "peft_type": "ADALORA",
        "init_r": allocation["init_rank"],
        "target_r": allocation["target_rank"],
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": settings["dropout"],
        "tinit": allocation["warmup"],
        "tfinal": allocation["final"],
        "deltaT": allocation["interval"],
        "beta1": allocation["importance_decay"],
        "beta2": allocation["uncertainty_decay"],
        "orth_reg_weight": allocation["orthogonality"],
        "total_step": allocation["steps"],
        "rank_pattern": pattern,
        "init_lora_weights": True,
    }
    return config, tensors


def _right(stack: Mapping[str, SavedTensor], layer: int, kept: torch.Tensor) -> torch.Tensor:
    return stack["right"].read(layer)[kept].contiguous()


def _left(slot: Slot, stack: Mapping[str, SavedTensor], layer: int, kept: torch.Tensor, a: Architecture) -> torch.Tensor:
    return slot.split(a, stack["left"].read(layer))[0][:, kept].contiguous()


def _values(stack: Mapping[str, SavedTensor], layer: int, kept: torch.Tensor) -> torch.Tensor:
    return stack["values"].read(layer)[kept][:, None].contiguous()


def _fourierft(
    settings: Mapping[str, Any], stacks: Sequence[tuple[Slot, Mapping[str, SavedTensor]]], a: Architecture
) -> tuple[dict[str, Any], dict[str, Computed]]:
    tensors = {}
    for layer in range(a.num_layers):
        for slot, stack in stacks:
            stacked = stack["coefficients"]
            name = f"{slot.parts[0].format(i=layer)}.fourierft_spectrum"
            tensors[name] = Computed(stacked.shape[1:], stacked.dtype, functools.partial(stacked.read, layer))
    config = {
        "peft_type": "FOURIERFT",
        "n_frequency": settings["n_frequency"],
        "scaling": settings["scaling"],
        "random_loc_seed": settings["frequency_seed"],
        "init_weights": False,
    }
    return config, tensors
