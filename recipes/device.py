"""What a run's device is, by `device=`, `gpu=` and `gpu_memory=`, which all recipes have; and what keys are on it by default.

What a kind of GPU decides beside these is planned from its figures (`nemo_ext.gpus`): how a model is split, micro batches,
recomputation. Levers that are on or off on every GPU are `recipes.keys`' defaults; docs/gpu.md has what each was seen to bring.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from nemo_ext.command_line import check_value
from nemo_ext.errors import UserError
from nemo_ext.gpus import KINDS


@dataclass(frozen=True)
class Default:
    """What a key of the training recipes is on a CPU and on a GPU where it is not given, and what on a GPU speaks for it."""

    cpu: Any
    gpu: Any
    why: str = ""


# H100 and H200 alone were measured: A100 and L40 take these over.
DEFAULTS = {
    "precision": Default("fp32", "bf16", "FP8 is 1.2 (1B) to 1.4 times (8B) as fast and rounds more: precision=fp8"),
    "seq": Default(256, 4096, "two rows fill the 8,192 tokens that a GPU is given at once"),
    "global_batch": Default(8, 128),
    "async_save": Default(False, True, "training stands still for 0.1 s a checkpoint, not 38 (17 GB of a 1B at TP2)"),
    "val_batches": Default(4, 8),
}


def defaults(keys: dict[str, Any]) -> dict[str, Any]:
    """The values of `DEFAULTS` for the device of `keys`."""
    return {name: getattr(default, keys["device"]) for name, default in DEFAULTS.items()}


def lines(keys: dict[str, Any], given: dict[str, Any], gpu: str | None) -> list[str]:
    """What a GPU, planned for as the kind `gpu`, decides of resolved keys, for people: those not given that are as `DEFAULTS` has
    them, and why."""
    if keys["device"] == "cpu":
        return []
    taken = [name for name, each in DEFAULTS.items() if each.why and given.get(name) is None and keys[name] == each.gpu]
    found = [f"{name}={str(keys[name]).lower()}: {DEFAULTS[name].why}" for name in taken]
    if found and gpu and not KINDS[gpu].measured:
        found.append(f"these were measured on H100 and H200, not on {KINDS[gpu].title}")
    return [f"{'' if place else 'defaults':<11} {text}" for place, text in enumerate(found)]


def settle(keys: dict[str, Any], schema: dict[str, dataclasses.Field], cuda: bool) -> None:
    """Fill in `device`, and what `gpu=` implies of it and of its memory. Raises UserError."""
    check_value("gpu", keys["gpu"], schema["gpu"])
    if keys["gpu"] and keys["device"] == "cpu":
        raise UserError(f"gpu={keys['gpu']} device=cpu: leave one of them out")
    if keys["gpu"]:
        keys["device"] = "gpu"
        keys["gpu_memory"] = keys["gpu_memory"] or KINDS[keys["gpu"]].memory / 2**30
    keys["device"] = keys["device"] or ("gpu" if cuda else "cpu")
