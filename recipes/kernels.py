"""Keys that choose kernels of GPUs, and what each holds for. Imports nothing heavy."""

from __future__ import annotations

from typing import Any

from nemo_ext import flash_attention
from nemo_ext.architecture import Architecture
from nemo_ext.errors import UserError
from nemo_ext.gpus import KINDS
from nemo_ext.platform import hardware


def check(keys: dict[str, Any], shape: Architecture, documents: bool) -> None:
    """Refuse what is wrong whatever is planned, before anything is read; a graph that is not asked for and cannot be is False.
    `documents`: whether the method learns them.

    Raises UserError.
    """
    why = _no_graph(keys, shape)
    if keys["cuda_graphs"] and why:
        raise UserError(f"cuda_graphs=true{why}")
    if keys["cuda_graphs"] is None and (why or not documents or keys["precision"] not in ("bf16", "fp8")):
        keys["cuda_graphs"] = False
    _output_layer(keys, shape)


def check_attention(keys: dict[str, Any], shape: Architecture) -> None:
    """Raises UserError where FlashAttention-4 is asked for and cannot be. Looks at a machine with GPUs unless `gpu=` is given."""
    if keys["attention"] != "flash4":
        return
    kind = KINDS.get(keys["gpu"])
    lacking = flash_attention.missing() if hardware.has_cuda() and not kind else None
    reasons = {
        "it is for GPUs": keys["device"] == "cpu",
        f"its kernels here are Hopper's, and gpu={keys['gpu']} is none": kind and kind.capability[0] != flash_attention.HOPPER,
        f"it computes in 16 bits, not precision={keys['precision']}": keys["precision"] == "fp32",
        f"rows are not split over devices, and cp={keys['cp']}": (keys["cp"] or 1) > 1,
        f"it was measured with heads of 64 and 128, not {shape.kv_channels}": shape.kv_channels not in flash_attention.HEADS,
        "this model has a window": shape.sliding_window,
        "this model caps its scores": shape.attn_logit_softcapping,
        f"this machine {lacking}": lacking,
    }
    if found := next((reason for reason, holds in reasons.items() if holds), None):
        raise UserError(f"attention=flash4: {found}: attention=transformer_engine")


def _no_graph(keys: dict[str, Any], shape: Architecture) -> str | None:
    """Why a step cannot be captured, in words that follow "cuda_graphs=true"; None where it can."""
    if keys["device"] == "cpu":
        return " is for GPUs"
    if shape.num_moe_experts is not None:
        return " would repeat one step's choice of experts: cuda_graphs=false"
    if keys["recompute"] not in ("auto", "none"):
        return f": nothing can be recomputed in a graph, and recompute={keys['recompute']}"
    if keys["on_nan"] == "stop" and not keys["clip"]:
        return ": NaN is looked for in the norm of the gradients, which clip=0 leaves out: clip=1, or on_nan=skip"
    return None


def _output_layer(keys: dict[str, Any], shape: Architecture) -> None:
    """Refuse what `nemo_ext.platform.output_layer` does not compute. Raises UserError."""
    given = keys["output_layer"]
    if given == "separate":
        return
    needed = ("fp8",) if given == "fp8" else ("bf16", "fp8")
    if keys["device"] == "cpu" or keys["precision"] not in needed:
        there = "a CPU" if keys["device"] == "cpu" else f"precision={keys['precision']}"
        raise UserError(f"output_layer={given} is for GPUs with precision={' or '.join(needed)}, not for {there}")
    for what, there in (("a bias", shape.add_output_bias), ("soft caps", shape.final_logit_softcapping is not None)):
        if there:
            raise UserError(f"output_layer={given}: {shape.family}'s has {what}: output_layer=separate")
