"""The plan of a training recipe's keys: from keys to a request, and from the planned layout back to keys."""

from __future__ import annotations

import dataclasses
from typing import Any

from launchers.plan import Plan, Request
from nemo_ext.errors import UserError

GIB = 2**30


def trained(method, keys: dict[str, Any], architecture) -> int:
    """Parameters that have gradients and optimizer states."""
    from nemo_ext import adapters

    if not method.adapter:
        return architecture.num_parameters()
    return adapters.trained(architecture, method.adapter, keys)


def request(keys: dict[str, Any], machine, trainable: float, nf4: bool) -> Request:
    """What is asked of the planner. `trainable`: the share of the parameters with gradients. Raises UserError where nothing says
    how much memory a device has."""
    if keys["gpu_memory"]:
        memory = keys["gpu_memory"] * GIB
    elif keys["device"] == "cpu":
        memory = machine.memory_bytes / keys["gpus"]
    elif machine.gpus:
        memory = min(gpu.memory_bytes for gpu in machine.gpus)
    else:
        raise UserError("planning for GPUs this machine does not have: give gpu_memory= in GiB (80 for an H100, 48 for an L40)")
    names = "nodes gpus seq global_batch micro_batch tp pp vp cp ep precision recompute distributed_optimizer device double_quant"
    wanted = {"nf4": nf4, **{name: keys[name] for name in names.split()}}
    return Request(**wanted, gpu_memory=memory, trainable=trainable, sequence_parallel=keys["sp"], cross_entropy="te")


def keys_of(planned: Plan) -> dict[str, Any]:
    """The keys that a layout decides."""
    layout = planned.layout
    return {"tp": layout.tp, "pp": layout.pp, "vp": layout.vp or 1, "cp": layout.cp, "ep": layout.ep,
            "sp": layout.sequence_parallel, "micro_batch": layout.micro_batch, "recompute": layout.recompute}  # fmt: skip


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
