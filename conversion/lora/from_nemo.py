"""LoRA adapters from NeMo 2 to PEFT, exact, tensor by tensor, without a model. The folder is described in `lora_nemo`."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from conversion import families
from conversion.atomic import fingerprint, resumable_folder
from conversion.dist_checkpoint import SavedTensor, read
from conversion.hf_to_nemo import KEY_PREFIX
from conversion.lora import adapter as lora
from conversion.lora import per_linear, senses
from conversion.lora.adapter import Computed
from conversion.lora.nemo import MAGNITUDE, A, B, Place, Slot, dtype_name, find, peft_config, refuse_dora, slots_of, unscaled
from conversion.workers import Progress
from nemo_ext.architecture import Architecture
from nemo_ext.errors import UserError


def convert(adapter_dir: Path, out_dir: Path, alpha: float | None = None, progress: Progress | None = None) -> Path:
    """Convert a NeMo adapter folder, or the checkpoint of a run that trained one, into the PEFT folder `out_dir` and return that.

    An adapter that came from PEFT comes back with its own modules, ranks and configuration, bit for bit, as long as every
    module's A and B stayed in their places. Anything else is exported as it is: a fused adapter's A is copied to all its parts.
    Of a model that sees or hears come its encoder's adapter and its projector too (`conversion.lora.senses`).
    `alpha` is for a checkpoint without `adapter.json`.
    """
    weights, settings = find(Path(adapter_dir), alpha)
    if (made := settings.get("kind")) == "moe_dora":
        raise UserError(f"{adapter_dir} is a MoE-DoRA: PEFT and transformers have no routers; its run continues and evaluates it")
    if made in per_linear.TENSORS:
        return per_linear.convert(weights, settings, Path(out_dir), progress)
    saved, prefix = read(weights), settings.get("module_prefix", "model.")
    beside = senses.read(saved, settings, prefix)
    stacks = _stacks(saved)
    if not stacks and not beside.adapted:
        raise UserError(f"{weights} has no adapters: it is a whole model")
    config, tensors = _language(adapter_dir, stacks, settings, prefix) if stacks else (settings["peft_config"], {})
    if beside.tensors:
        config, tensors = beside.config(config, bool(stacks)), {**tensors, **beside.tensors}
    with resumable_folder(out_dir, fingerprint(sorted(weights.iterdir()), "lora_from_nemo", settings)) as unfinished:
        lora.write(unfinished, config, tensors, progress)
    return Path(out_dir)


def _language(
    adapter_dir: Path, stacks: Mapping[str, Mapping[str, SavedTensor]], settings: Mapping[str, Any], prefix: str
) -> tuple[dict[str, Any], dict[str, Computed]]:
    """PEFT's configuration and tensors of a language model's adapter."""
    architecture = Architecture(**settings["architecture"])
    family = families.FAMILIES[architecture.family]
    dora = any(MAGNITUDE in stack for stack in stacks.values())
    split = settings.get("kind") == "canonical_dora" or any(".adapter.adapter_" in key for key in stacks)
    kind = ("canonical_dora" if split else "dora") if dora else ("canonical_lora" if split else "lora")
    slots = [slot for slot in slots_of(family, architecture, kind) if slot.key in stacks]
    if unknown := set(stacks) - {slot.key for slot in slots}:
        raise UserError(f"{adapter_dir} adapts {min(unknown)}, which has no place in PEFT's adapter of a {family.name}")
    _check_stacks(slots, stacks, architecture, Path(adapter_dir))
    if kind == "dora":
        refuse_dora(slots, family, architecture, Path(adapter_dir))
    places = {name: Place(**place) for name, place in settings.get("modules", {}).items()}
    if _unmoved(slots, places, stacks, architecture):
        config = settings["peft_config"]
    else:
        config = _config(settings, slots, stacks, dora, prefix)
        places = _whole(slots, stacks, architecture)
    modules = _modules(slots, places, stacks, architecture)
    return config, {prefix + name.removeprefix("model."): tensor for name, tensor in modules.items()}


def _stacks(saved: Mapping[str, SavedTensor]) -> dict[str, dict[str, SavedTensor]]:
    """{slot: {"linear_in.weight": A of all layers, ...}} of a checkpoint's language model."""
    stacks: dict[str, dict[str, SavedTensor]] = {}
    for key, tensor in saved.items():
        if key.startswith(senses.PLACE):
            continue
        match = re.fullmatch(r"(.+\.adapter(?:\.adapter_\w+)?)\.(linear_(?:in|out)\.weight|weight_magnitude)", key)
        if match:
            stacks.setdefault(match[1].removeprefix(KEY_PREFIX), {})[match[2]] = tensor
        elif ".adapter." in key:
            raise UserError(f"the checkpoint has {key}, which is not a tensor of LoRA")
    return stacks


def _check_stacks(slots: Sequence[Slot], stacks: Mapping[str, Mapping[str, SavedTensor]], a: Architecture, folder: Path) -> None:
    for slot in slots:
        stack = stacks[slot.key]
        if missing := {A, B} - set(stack):
            raise UserError(f"{folder} lacks {slot.key}.{min(missing)}")
        dim = stack[A].shape[1]
        expected = {
            A: (a.num_layers, dim, slot.inputs(a)),
            B: (a.num_layers, sum(slot.widths(a)), dim),
            MAGNITUDE: (a.num_layers, sum(slot.widths(a))),
        }
        for name, tensor in stack.items():
            if tensor.shape != expected[name]:
                shapes = f"{list(tensor.shape)}, its architecture asks for {list(expected[name])}"
                raise UserError(f"{folder}: {slot.key}.{name} has shape {shapes}")


def _unmoved(slots: Sequence[Slot], places: Mapping[str, Place], stacks: Mapping[str, Any], a: Architecture) -> bool:
    """Whether every part of every linear still uses only the rank components that `adapter.json` gives it."""
    names = {part.format(i=layer) for slot in slots for part in slot.parts for layer in range(a.num_layers)}
    if not places or set(places) - names:
        return False
    for slot in slots:
        for layer in range(a.num_layers):
            for part, b in zip(slot.parts, slot.split(a, stacks[slot.key][B].read(layer)), strict=True):
                if place := places.get(part.format(i=layer)):
                    b = torch.cat([b[:, : place.start], b[:, place.start + place.rank :]], dim=1)
                if b.any():
                    return False
    return True


def _whole(slots: Sequence[Slot], stacks: Mapping[str, Mapping[str, SavedTensor]], a: Architecture) -> dict[str, Place]:
    """Every part with all rank components of its slot."""
    places = {}
    for slot in slots:
        b = stacks[slot.key][B]
        for part in slot.parts:
            for layer in range(a.num_layers):
                places[part.format(i=layer)] = Place(0, b.shape[2], 1.0, dtype_name(b.dtype))
    return places


def _modules(
    slots: Sequence[Slot], places: Mapping[str, Place], stacks: Mapping[str, Mapping[str, SavedTensor]], a: Architecture
) -> dict[str, Computed]:
    """PEFT's tensors of the modules in `places`, layer by layer."""
    tensors = {}
    for layer in range(a.num_layers):
        for slot in slots:
            for position, part in enumerate(slot.parts):
                if (place := places.get(part.format(i=layer))) is None:
                    continue
                module, stack, width = part.format(i=layer), stacks[slot.key], slot.widths(a)[position]
                down = functools.partial(_read_down, stack, layer, place)
                up = functools.partial(_read_up, slot, stack, layer, position, place, a)
                dtype = stack[B].dtype
                if dtype != getattr(torch, place.dtype):
                    dtype = up().dtype
                tensors[f"{module}.lora_A.weight"] = Computed((place.rank, slot.inputs(a)), stack[A].dtype, down)
                tensors[f"{module}.lora_B.weight"] = Computed((width, place.rank), dtype, up)
                if MAGNITUDE in stack:
                    magnitude = functools.partial(_read_magnitude, slot, stack, layer, position, a)
                    tensors[f"{module}.lora_magnitude_vector"] = Computed((width,), stack[MAGNITUDE].dtype, magnitude)
    return tensors


def _read_down(stack: Mapping[str, SavedTensor], layer: int, place: Place) -> torch.Tensor:
    return stack[A].read(layer)[place.start : place.start + place.rank].contiguous()


def _read_up(
    slot: Slot, stack: Mapping[str, SavedTensor], layer: int, position: int, place: Place, a: Architecture
) -> torch.Tensor:
    b = slot.split(a, stack[B].read(layer))[position]
    return unscaled(b[:, place.start : place.start + place.rank], place).contiguous()


def _read_magnitude(slot: Slot, stack: Mapping[str, SavedTensor], layer: int, position: int, a: Architecture) -> torch.Tensor:
    return slot.split(a, stack[MAGNITUDE].read(layer))[position].contiguous()


def _config(
    settings: Mapping[str, Any], slots: Sequence[Slot], stacks: Mapping[str, Mapping[str, SavedTensor]], dora: bool, prefix: str
) -> dict[str, Any]:
    """PEFT's configuration of an adapter that NeMo made."""
    modules = [part.removeprefix("model.layers.{i}.") for slot in slots for part in slot.parts]
    rank = stacks[slots[0].key][A].shape[1]
    return {**peft_config(modules, prefix, rank, settings["alpha"], settings.get("dropout", 0.0)), "use_dora": dora}
