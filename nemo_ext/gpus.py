"""The kinds of GPU that runs are planned for, and what differs between them: the one place for it.

A kind is found by its marketing name, or by `gpu=` for another machine. A GPU that is none of them is planned for as the
nearest of its architecture, and the plan says so. Rates are the makers' data sheets': dense products, bytes a second in one
direction. What a run sustains of them is fitted to measurements (`launchers/cost.py`), made on H100 and H200 alone: figures for
the other kinds come from the model and are labelled. Imports nothing heavy.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

GIB = 2**30
NVLINK, PCIE = "nvlink", "pcie"
PCIE_4 = 3.2e10  # 16 lanes, one direction
CARDS = {"pcie", "nvl", "mig"}  # in the names of cards for slots, some with bridges between pairs, and of parts cut in pieces

# Scalings of FP8 that Transformer Engine 2.12 has for an architecture, the quickest first. On an H200, 8B alone: delayed 756
# TFLOP/s, by tensor 2 % less, by block 687. Ada has the first two, not measured; its tensor cores take no scales of blocks.
HOPPER_FP8, ADA_FP8 = ("delayed", "tensorwise", "blockwise"), ("delayed", "tensorwise")


@dataclass(frozen=True)
class Kind:
    """What one kind of GPU has. `fp8` is None where its tensor cores have no FP8."""

    name: str
    title: str
    capability: tuple[int, int]  # CUDA compute capability
    memory: int  # bytes, as torch reports them
    bf16: float  # floating-point operations a second; fp16 the same, fp32 in TF32 half of it
    fp8: float | None
    bandwidth: float  # of its memory
    interconnect: str  # between the GPUs of a node
    link: float  # of one GPU to the others of its node
    network: float  # of one GPU to other nodes, with the adapter that such machines are usually sold with
    measured: bool  # this project's recipes ran on it
    fp8_recipes: tuple[str, ...] = ()

    @property
    def fp32(self) -> float:
        """Transformer Engine multiplies fp32 in TF32."""
        return self.bf16 / 2


KINDS = {
    kind.name: kind
    for kind in (
        # SXM5, 80 GB HBM3, NVLink 4 (900 GB/s in both directions), 400 Gb/s a GPU. LoRA and micro batches were measured on it.
        Kind("h100", "H100", (9, 0), int(79.1 * GIB), 9.89e14, 1.979e15, 3.35e12, NVLINK, 4.5e11, 5e10, True, HOPPER_FP8),
        # The same chip with 141 GB HBM3e: room for pipelines that an H100 splits further. 1B and 8B were measured on it.
        Kind("h200", "H200", (9, 0), int(139.8 * GIB), 9.89e14, 1.979e15, 4.8e12, NVLINK, 4.5e11, 5e10, True, HOPPER_FP8),
        # SXM4, 80 GB HBM2e, NVLink 3 (600 GB/s), 200 Gb/s a GPU. No FP8: precision=fp8 is refused. Not measured.
        Kind("a100", "A100", (8, 0), int(79.1 * GIB), 3.12e14, None, 2.039e12, NVLINK, 3e11, 2.5e10, False),
        # Ada, 48 GB GDDR6, no NVLink: tensor parallelism is dear, so data and pipeline parallelism win. Attention in 16 bits, by
        # cuDNN as on the others: Transformer Engine's FP8 attention begins with Hopper. Not measured.
        Kind("l40", "L40", (8, 9), int(44.4 * GIB), 1.81e14, 3.62e14, 8.64e11, PCIE, PCIE_4, 2.5e10, False, ADA_FP8),
    )
}


@dataclass(frozen=True)
class Found:
    """The kind that a GPU is planned for as, how GPUs of its machine reach each other, and the GPU's name where it is another."""

    kind: Kind
    interconnect: str
    instead_of: str | None = None


def find(name: str, capability: tuple[int, int], memory: int) -> Found:
    """The kind of a GPU by its marketing name ("NVIDIA H100 80GB HBM3"), or else the nearest of its architecture.

    Cards for PCIe slots and parts cut in pieces (MIG) are not the kind that they are named after.
    """
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    for kind in KINDS.values():
        if kind.name in words and not CARDS & words:
            return Found(kind, kind.interconnect)
    if capability >= (9, 0):
        kind = KINDS["h200" if memory > 100 * GIB else "h100"]
    else:
        kind = KINDS["l40" if capability >= (8, 9) else "a100"]
    servers = capability[1] == 0 and not {"pcie", "nvl"} & words  # 8.0, 9.0, 10.0: chips of servers with NVLink
    return Found(kind, NVLINK if servers else PCIE, instead_of=name)
