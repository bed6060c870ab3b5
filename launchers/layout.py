"""The plan of a training recipe's keys: from keys to a request, and from the planned layout back to keys."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import recipes
from launchers.memory import Tower
from launchers.plan import Plan, Request
from nemo_ext import gpus
from nemo_ext.errors import UserError
from nemo_ext.multimodal.description import Sense
from nemo_ext.multimodal.freezing import FROZEN, num_trained

GIB = 2**30


def trained(method, keys: dict[str, Any], architecture) -> int:
    """Parameters of the decoder that have gradients and optimizer states."""
    from nemo_ext import adapters

    if method.modality and keys["train_language"] == FROZEN:
        return 0
    kind = recipes.adapter(method, keys)
    return adapters.trained(architecture, kind, keys) if kind else architecture.num_parameters()


def tower(keys: dict[str, Any], architecture, sense: Sense | None) -> Tower | None:
    """What the planner has to know of a model's sense."""
    if sense is None:
        return None
    parts = num_trained(recipes.trained_parts(keys), architecture, (sense,), keys)
    encoder, projector = sense.encoder, sense.projector_parameters(architecture.hidden_size)
    positions = math.prod(encoder.grid)
    ffn = encoder.config.get("intermediate_size") or encoder.config["encoder_ffn_dim"]
    return Tower(
        name=keys["tower"] or f"that of {keys['model']}", parameters=encoder.num_parameters() + projector, projector=projector,
        trained=parts["tower"] + parts["projector"], layers=encoder.num_computed_layers, hidden_size=encoder.hidden_size,
        ffn_hidden_size=ffn, positions=positions, embeddings=sense.tokens, keeps=parts["tower"] > 0,
    )  # fmt: skip


def request(
    keys: dict[str, Any], machine, trainable: float, nf4: bool, tower: Tower | None = None, statistics: float = 0.0,
    packed: bool = False,
) -> Request:  # fmt: skip
    """What is asked of the planner. `trainable`: the share of the decoder's parameters with gradients; `statistics`: bytes that
    an adapter keeps of each of its own; `packed`: rows hold several conversations. Raises UserError where nothing says how much
    memory a device has."""
    memory = device_memory(keys, machine)
    names = "nodes gpus seq global_batch micro_batch tp pp vp cp ep precision recompute distributed_optimizer device double_quant"
    same = {name: keys[name] for name in (*names.split(), "cuda_graphs", "fp8_recipe")}
    wanted = {"nf4": nf4, **same, **device(keys, machine)}
    return Request(
        **wanted, gpu_memory=memory, trainable=trainable, statistics=statistics, sequence_parallel=keys["sp"],
        cross_entropy="te" if keys["output_layer"] == "separate" else keys["output_layer"],
        tower=tower, packed=packed, balanced=keys["balance_stages"] and tower is None,
    )  # fmt: skip


def device_memory(keys: dict[str, Any], machine) -> float:
    """Bytes that a GPU, or a process of a CPU, has. `machine` is None where it is another's that is planned for.

    Raises UserError where nothing says it.
    """
    if keys["gpu_memory"]:
        return keys["gpu_memory"] * GIB
    if keys["device"] == "cpu" and machine is not None:
        return machine.memory_bytes / keys["gpus"]
    if machine is not None and machine.gpus:
        return min(gpu.memory_bytes for gpu in machine.gpus)
    raise UserError(f"planning for another machine: give gpu={'|'.join(gpus.KINDS)} or gpu_memory= in GiB")


def device(keys: dict[str, Any], machine) -> dict[str, Any]:
    """Fields of a request that say what a device is: the kind that `gpu=` names, or this machine's own."""
    if keys["device"] == "cpu":
        return {"cores": max(1.0, machine.cpu_count / keys["gpus"]) if machine is not None else 1.0}
    if keys["gpu"]:
        return {"gpu": keys["gpu"]}
    if machine is None or not machine.gpus:
        return {"gpu": "h200" if keys["gpu_memory"] > 100 else "h100", "instead_of": "a GPU that gpu= does not name"}
    own = machine.gpus[0]
    found = gpus.find(own.name, own.compute_capability, own.memory_bytes)
    return {"gpu": found.kind.name, "interconnect": found.interconnect, "instead_of": found.instead_of}


def keys_of(planned: Plan) -> dict[str, Any]:
    """The keys that a layout decides."""
    layout = planned.layout
    return {"tp": layout.tp, "pp": layout.pp, "vp": layout.vp or 1, "cp": layout.cp, "ep": layout.ep,
            "sp": layout.sequence_parallel, "micro_batch": layout.micro_batch, "recompute": layout.recompute,
            "cuda_graphs": planned.request.cuda_graphs}  # fmt: skip


def brief(planned: Plan, trained: int) -> str:
    """The plan in one line; `trained` is the number of parameters with gradients."""
    from nemo_ext.report import batch_text, count_text, layout_text

    layout, memory = dataclasses.asdict(planned.layout), planned.memory.total / GIB
    device = "process" if planned.request.device == "cpu" else "GPU"
    only = f", {count_text(trained)} trained" if trained < planned.parameters else ""
    return (
        f"{count_text(planned.parameters)} parameters{only}; {layout_text(layout)}; {planned.tokens_per_step:,} tokens a step in "
        f"{batch_text(layout)}; {memory:.1f} of {planned.request.gpu_memory / GIB:.1f} GiB a {device}"
    )
