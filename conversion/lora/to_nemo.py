"""LoRA adapters from PEFT to NeMo 2, exact, tensor by tensor, without a model. The folder is described in `lora_nemo`."""

from __future__ import annotations

import collections
import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from conversion import families, nemo_folder
from conversion.atomic import fingerprint, resumable_folder
from conversion.dist_checkpoint import LIMITS, Chunk, StoredTensor, write
from conversion.families import Family
from conversion.hf_to_nemo import KEY_PREFIX, read_config
from conversion.lora import adapter as lora
from conversion.lora.adapter import Adapter, Update
from conversion.lora.nemo import (
    KINDS,
    MAGNITUDE,
    SETTINGS,
    A,
    B,
    Place,
    Slot,
    dtype_name,
    linears,
    refuse_dora,
    scaled,
    slots_of,
    wide,
)
from conversion.workers import Progress
from nemo_ext.architecture import Architecture
from nemo_ext.errors import UserError

NEMO_METADATA = "adapter_metadata.json"  # where NeMo looks for the base of an adapter checkpoint


def convert(
    adapter_dir: Path, base: Path, out_dir: Path, kind: str | None = None, progress: Progress | None = None, workers: int = 2
) -> Path:
    """Convert the PEFT folder `adapter_dir` into the NeMo adapter folder `out_dir` and return that.

    `base` is the model that it adapts, a Hugging Face or a NeMo folder; only its configuration is read. `kind` is one of
    `KINDS`; without it "canonical_lora", or "dora" for an adapter with magnitudes, which NeMo itself loads. A conversion that was
    killed goes on where it was.

    Raises UserError: what `lora.read` refuses, modules or shapes that the base does not have, and what NeMo's adapters cannot
    hold (embeddings, outputs, experts, replaced modules).
    """
    adapter = lora.read(adapter_dir)
    if (made := adapter.config["peft_type"]) != "LORA":
        raise UserError(f"{adapter_dir} is {made}'s, which NeMo does not have: merge it instead")
    kind = _kind(adapter, kind)
    architecture, nemo_base = _architecture(Path(base))
    family = families.FAMILIES[architecture.family]
    placed, prefix = _place(adapter, family, architecture)
    slots = [slot for slot in slots_of(family, architecture, kind) if any(part in placed for part in slot.parts)]
    if adapter.dora:
        _check_magnitudes(slots, placed, architecture, adapter)
    if kind == "dora":
        refuse_dora(slots, family, architecture, adapter.folder)
    tensors, settings = _compose(adapter, slots, placed, architecture)
    settings = {
        "kind": kind,
        "target_modules": sorted({slot.target for slot in slots}),
        **settings,
        "dropout": adapter.config.get("lora_dropout", 0.0),
        "base": str(Path(base).absolute()),
        "architecture": architecture.to_dict(),
        "module_prefix": prefix,
        "peft_config": adapter.config,
    }
    key = fingerprint([adapter.folder / lora.WEIGHTS, adapter.folder / lora.CONFIG], "lora_to_nemo", LIMITS, settings)
    with resumable_folder(out_dir, key) as unfinished:
        folder, weights = unfinished.path, unfinished.path / nemo_folder.WEIGHTS
        extra = {} if kind == "canonical_dora" else _extra_states(slots, architecture)
        write(weights, tensors, extra, progress, workers, unfinished)
        if nemo_base:
            (weights / NEMO_METADATA).write_text(json.dumps({"model_ckpt_path": str(nemo_base.absolute())}))
        (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")
    return Path(out_dir)


def _kind(adapter: Adapter, kind: str | None) -> str:
    if kind is None:
        return "dora" if adapter.dora else "canonical_lora"
    if kind not in KINDS:
        raise UserError(f"kind={kind} is not one of {', '.join(KINDS)}")
    if kind.endswith("dora") != adapter.dora:
        raise UserError(f"{adapter.folder} {'has' if adapter.dora else 'has no'} DoRA magnitudes: kind={kind} does not hold it")
    return kind


def _architecture(base: Path) -> tuple[Architecture, Path | None]:
    """The base's architecture, and its folder if it is a NeMo checkpoint."""
    if (base / "config.json").is_file():
        return families.architecture(read_config(base)), None
    checkpoint = nemo_folder.find(base)
    return checkpoint.architecture, checkpoint.folder


def _place(adapter: Adapter, family: Family, a: Architecture) -> tuple[dict[str, dict[int, Update]], str]:
    """({module with {i}: {layer: update}}, what stands for "model." in the adapter's names), checked against the base."""
    rows = {name.removesuffix(".weight"): (row, name) for row in linears(family, a) for name in row.hf}
    placed: dict[str, dict[int, Update]] = {}
    prefix = "model."
    for module, update in adapter.updates.items():
        name, found = lora.canonical(family, module)
        match = re.fullmatch(r"(model\.layers\.)(\d+)(\..+)", name)
        part = f"{match[1]}{{i}}{match[3]}" if match else name
        if not match or part not in rows:
            raise UserError(f"{adapter.folder} adapts {module}, which NeMo's LoRA of a {family.name} does not: merge it instead")
        if int(match[2]) >= a.num_layers:
            raise UserError(f"{adapter.folder} adapts {module}, but the base has {a.num_layers} layers: it is for another base")
        row, tensor = rows[part]
        expected = families.shape(row.hf[tensor], a)
        if update.transposed or update.shape != expected:
            raise UserError(
                f"{adapter.folder} changes {module} by {list(update.shape)}, but the base has {list(expected)} there: "
                "it is for another base"
            )
        placed.setdefault(part, {})[int(match[2])] = update
        prefix = found
    if adapter.replaced:
        raise UserError(
            f"{adapter.folder} replaces {min(adapter.replaced)} as a whole (modules_to_save), which NeMo's LoRA cannot: merge it"
        )
    for part in rows:
        for layer in range(a.num_layers):
            module = prefix + part.removeprefix("model.").format(i=layer)
            named = adapter.config.get("target_modules") != "all-linear" and lora.is_target(adapter.config, module)
            if named and layer not in placed.get(part, {}):
                raise UserError(f"{adapter.folder} targets {module} but lacks its tensors: it is incomplete or for another base")
    return placed, prefix


def _check_magnitudes(
    slots: Sequence[Slot], placed: Mapping[str, Mapping[int, Update]], a: Architecture, adapter: Adapter
) -> None:
    for part in (part for slot in slots for part in slot.parts):
        if len(placed.get(part, {})) < a.num_layers:
            raise UserError(
                f"{adapter.folder} adapts only parts of Megatron's linears by DoRA ({part.format(i='*')} lacks some): "
                "the magnitudes of the rest depend on the base's weights; merge it instead"
            )


def _compose(
    adapter: Adapter, slots: Sequence[Slot], placed: Mapping[str, Mapping[int, Update]], a: Architecture
) -> tuple[dict[str, StoredTensor], dict[str, Any]]:
    """The checkpoint's tensors, each chunk ready to be read, and dim, alpha and modules of the settings."""
    scales = collections.Counter(update.scale for update in adapter.updates.values())
    scale = scales.most_common(1)[0][0]
    layers: dict[tuple[str, int], dict[str, tuple[Update, Place]]] = {}
    for slot in slots:
        for layer in range(a.num_layers):
            updates = {part: placed[part][layer] for part in slot.parts if layer in placed.get(part, {})}
            layers[slot.key, layer] = _arrange(updates, scale)
    dim = max(place.start + place.rank for parts in layers.values() for _, place in parts.values())

    tensors: dict[str, StoredTensor] = {}
    for slot in slots:
        inputs, outputs = slot.inputs(a), sum(slot.widths(a))
        here = [layers[slot.key, layer] for layer in range(a.num_layers)]
        used = [item for parts in here for item in parts.values()]
        down = _promote(update.a.dtype for update, _ in used)
        up = _promote(wide(update.b.dtype, place.factor) for update, place in used)
        key = KEY_PREFIX + slot.key
        tensors[f"{key}.{A}"] = _stack(
            (dim, inputs), down, [functools.partial(_down, parts, dim, inputs, down) for parts in here]
        )
        tensors[f"{key}.{B}"] = _stack((outputs, dim), up, [functools.partial(_up, slot, parts, dim, a, up) for parts in here])
        if adapter.dora:
            dtype = _promote(update.magnitude.dtype for update, _ in used if update.magnitude)
            tensors[f"{key}.{MAGNITUDE}"] = _stack(
                (outputs,), dtype, [functools.partial(_magnitude, slot, parts, a, dtype) for parts in here]
            )
    modules = {
        part.format(i=layer): vars(place)
        for slot in slots
        for layer in range(a.num_layers)
        for part, (_, place) in layers[slot.key, layer].items()
    }
    alpha = scale * dim
    return tensors, {"dim": dim, "alpha": int(alpha) if float(alpha).is_integer() else alpha, "modules": modules}


def _arrange(updates: Mapping[str, Update], scale: float) -> dict[str, tuple[Update, Place]]:
    """Where the parts of one linear go among its rank components: all to the same if they share A, else side by side."""
    first = next(iter(updates.values()), None)
    shared = len(updates) > 1 and all(u.a.shape == first.a.shape and u.a.dtype == first.a.dtype for u in updates.values())
    if shared:
        a = first.a.read()
        shared = all(torch.equal(update.a.read(), a) for update in updates.values())
    arranged, start = {}, 0
    for part, update in updates.items():
        factor = 1.0 if update.scale == scale else update.scale / scale
        arranged[part] = update, Place(0 if shared else start, update.rank, factor, dtype_name(update.b.dtype))
        start += update.rank
    return arranged


def _stack(shape: tuple[int, ...], dtype: torch.dtype, reads: Sequence[Any]) -> StoredTensor:
    chunks = [Chunk((i, *[0] * len(shape)), (1, *shape), read) for i, read in enumerate(reads)]
    return StoredTensor((len(reads), *shape), dtype, chunks)


def _down(parts: Mapping[str, tuple[Update, Place]], dim: int, inputs: int, dtype: torch.dtype) -> torch.Tensor:
    result = torch.zeros(dim, inputs, dtype=dtype)
    for update, place in parts.values():
        result[place.start : place.start + place.rank] = update.a.read()
    return result


def _up(slot: Slot, parts: Mapping[str, tuple[Update, Place]], dim: int, a: Architecture, dtype: torch.dtype) -> torch.Tensor:
    blocks = []
    for part, width in zip(slot.parts, slot.widths(a), strict=True):
        block = torch.zeros(width, dim, dtype=dtype)
        if part in parts:
            update, place = parts[part]
            block[:, place.start : place.start + place.rank] = scaled(update.b.read(), place.factor, dtype)
        blocks.append(block)
    return slot.merge(a, blocks)


def _magnitude(slot: Slot, parts: Mapping[str, tuple[Update, Place]], a: Architecture, dtype: torch.dtype) -> torch.Tensor:
    return slot.merge(a, [parts[part][0].magnitude.read().flatten().to(dtype) for part in slot.parts])


def _promote(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    return functools.reduce(torch.promote_types, dtypes)


def _extra_states(slots: Sequence[Slot], a: Architecture) -> dict[str, Any]:
    """What Megatron's linears save beside their weights: nothing, but a loader asks for it."""
    return {
        f"{KEY_PREFIX}{slot.key}.{linear}._extra_state/shard_{layer}_{a.num_layers}": None
        for slot in slots
        for linear in ("linear_in", "linear_out")
        for layer in range(a.num_layers)
    }
