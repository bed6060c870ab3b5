"""MoE-DoRA's tensors by Hugging Face's linears, from a run's checkpoint.

No format of others holds them: they are read for a model that computes with them (`nemo_ext.evaluation.adapted`). Unlike other
adapters', they are saved layer by layer: `decoder.layers.3.mlp.linear_fc2.adapter.linear_in.weight`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conversion import families
from conversion.dist_checkpoint import read
from conversion.hf_to_nemo import KEY_PREFIX
from conversion.lora.nemo import MAGNITUDE, A, B, slots_of
from nemo_ext.architecture import Architecture
from nemo_ext.errors import UserError
from nemo_ext.evaluation.adapted import Experts

ROUTER = "router.weight"


def of_checkpoint(weights: Path, settings: Mapping[str, Any]) -> dict[str, Experts]:
    """{module of the Hugging Face model: its experts} of the checkpoint `weights`, which `settings` (`adapter.json`) describe.

    Raises UserError for a checkpoint that lacks tensors.
    """
    a = Architecture(**settings["architecture"])
    saved, found = read(weights), {}
    ranks, alphas = settings.get("ranks", {}), settings.get("alphas", {})
    for layer in range(a.num_layers):
        for slot in slots_of(families.FAMILIES[a.family], a, "canonical_dora"):
            if slot.target not in settings["target_modules"]:
                continue
            key = KEY_PREFIX + slot.key.replace("decoder.layers.", f"decoder.layers.{layer}.", 1)
            own = {name: saved.get(f"{key}.{name}") for name in (A, B, MAGNITUDE, ROUTER)}
            if missing := [name for name in (A, B, MAGNITUDE) if own[name] is None]:
                raise UserError(f"{weights} lacks {key}.{missing[0]}: it is no checkpoint of this adapter")
            rank = ranks.get(slot.target, settings["dim"])
            count = own[A].shape[0] // rank
            up = slot.split(a, own[B].read())[0]
            magnitude = slot.split(a, own[MAGNITUDE].read().reshape(count, -1).T)[0].T
            module = settings["module_prefix"] + slot.parts[0].format(i=layer).removeprefix("model.")
            found[module] = Experts(
                own[A].read().unflatten(0, (count, rank)),
                up.unflatten(1, (count, rank)).transpose(0, 1),
                magnitude,
                own[ROUTER].read() if own[ROUTER] is not None else None,
                alphas.get(slot.target, settings["alpha"]) / rank,
                settings["top_k"],
            )
    return found
