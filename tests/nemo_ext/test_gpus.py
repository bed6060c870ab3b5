"""Which kind of GPU a machine has, by the names that drivers give."""

import pytest

from nemo_ext.gpus import GIB, KINDS, find


@pytest.mark.parametrize(
    ("name", "capability", "kind"),
    [
        ("NVIDIA H100 80GB HBM3", (9, 0), "h100"),
        ("NVIDIA H200", (9, 0), "h200"),
        ("NVIDIA A100-SXM4-80GB", (8, 0), "a100"),
        ("NVIDIA L40", (8, 9), "l40"),
    ],
)
def test_known_by_name(name, capability, kind):
    found = find(name, capability, 80 * GIB)
    assert (found.kind, found.interconnect, found.instead_of) == (KINDS[kind], KINDS[kind].interconnect, None)


@pytest.mark.parametrize(
    ("name", "capability", "memory", "kind", "interconnect"),
    [
        ("NVIDIA H100 PCIe", (9, 0), 80, "h100", "pcie"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", (9, 0), 10, "h100", "nvlink"),
        ("NVIDIA H800", (9, 0), 80, "h100", "nvlink"),
        ("NVIDIA H100 NVL", (9, 0), 94, "h100", "pcie"),
        ("NVIDIA H200 NVL", (9, 0), 140, "h200", "pcie"),
        ("NVIDIA B200", (10, 0), 180, "h200", "nvlink"),
        ("NVIDIA L40S", (8, 9), 44, "l40", "pcie"),
        ("NVIDIA GeForce RTX 4090", (8, 9), 24, "l40", "pcie"),
        ("NVIDIA A10", (8, 6), 24, "a100", "pcie"),  # Ampere: no FP8
        ("Tesla V100-SXM2-16GB", (7, 0), 16, "a100", "nvlink"),
    ],
)
def test_others_are_the_nearest_of_their_architecture(name, capability, memory, kind, interconnect):
    found = find(name, capability, memory * GIB)
    assert (found.kind.name, found.interconnect, found.instead_of) == (kind, interconnect, name)


def test_figures():
    """What plans rest on: FP8 from Ada on, as fast again as bf16; NVLink but for the L40."""
    for kind in KINDS.values():
        assert (kind.fp8 is not None) == (kind.capability >= (8, 9))
        assert kind.fp8 is None or kind.fp8 == pytest.approx(2 * kind.bf16, rel=0.01)
        assert kind.link > kind.network or kind.name == "l40"
    assert [kind.name for kind in KINDS.values() if kind.interconnect == "pcie"] == ["l40"]
