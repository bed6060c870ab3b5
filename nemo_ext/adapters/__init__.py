"""What an adapter adapts, in Hugging Face's names and NeMo's. Imports neither torch nor NeMo."""

from __future__ import annotations

import math
from typing import Any

from nemo_ext.architecture import Architecture
from nemo_ext.errors import UserError

# Hugging Face's linears of a layer: the target of nemo_ext.adapters.lora.CanonicalLoRA
ATTENTION = {"q_proj": "linear_q", "k_proj": "linear_k", "v_proj": "linear_v", "o_proj": "linear_proj"}
GATED_MLP = {"gate_proj": "linear_fc1_gate", "up_proj": "linear_fc1_up", "down_proj": "linear_fc2"}
LINEARS = {
    "mixtral": ATTENTION,  # the experts' are not adapted
    "phi": {"q_proj": "linear_q", "k_proj": "linear_k", "v_proj": "linear_v", "dense": "linear_proj", "fc1": "linear_fc1",
            "fc2": "linear_fc2"},
    "phi3": {"qkv_proj": "linear_qkv", "o_proj": "linear_proj", "gate_up_proj": "linear_fc1", "down_proj": "linear_fc2"},
}  # fmt: skip
MLP = ("linear_fc1", "linear_fc2")


def linears(family: str) -> dict[str, str]:
    """{Hugging Face's name: NeMo's target} of the linears in a layer of an architecture's family that LoRA can adapt."""
    return LINEARS.get(family, {**ATTENTION, **GATED_MLP})


def targets(family: str, selected: str | list[str]) -> list[str]:
    """The linears that "all-linear", "attention", "mlp" and names select, in a layer's order; a string has commas between them.

    Raises UserError where it selects nothing, or names what the family does not have.
    """
    known = linears(family)
    mlp = [name for name, target in known.items() if target.startswith(MLP)]
    groups = {"all-linear": list(known), "attention": [name for name in known if name not in mlp], "mlp": mlp}
    wanted: list[str] = []
    for name in map(str, selected) if isinstance(selected, list) else filter(None, map(str.strip, str(selected).split(","))):
        if not (found := groups.get(name, [name] if name in known else [])):
            choices = ", ".join([*known, *(group for group, names in groups.items() if names)])
            raise UserError(f"targets= has {name}, which is no linear of a {family} model: {choices}")
        wanted += found
    if not wanted:
        raise UserError(f"targets={selected} names no linear: {', '.join([*known, *groups])}")
    return [name for name in known if name in wanted]


def shape(architecture: Architecture, name: str) -> tuple[int, int]:
    """(input, output) features of a linear by its name in Hugging Face's model."""
    a = architecture
    h, queries, keys, ffn = a.hidden_size, a.attention_width, a.kv_width, a.ffn_hidden_size
    target = linears(a.family)[name]
    return {
        "linear_q": (h, queries),
        "linear_k": (h, keys),
        "linear_v": (h, keys),
        "linear_qkv": (h, queries + 2 * keys),
        "linear_proj": (queries, h),
        "linear_fc1_gate": (h, ffn),
        "linear_fc1_up": (h, ffn),
        "linear_fc1": (h, 2 * ffn if a.gated_linear_unit else ffn),
        "linear_fc2": (ffn, h),
    }[target]


def num_parameters(architecture: Architecture, names: list[str], rank: int) -> int:
    """How many parameters A `[rank, in]` and B `[out, rank]` have in all layers."""
    return architecture.num_layers * rank * sum(sum(shape(architecture, name)) for name in names)


def transform_settings(architecture: Architecture, keys: dict[str, Any]) -> dict[str, Any]:
    """A recipe's keys as the arguments of `nemo_ext.adapters.transforms.transform`.

    NeMo multiplies B A by alpha / dim: rank-stabilised LoRA's alpha / sqrt(rank) (Kalajdzievski 2023, arXiv:2312.03732) takes an
    alpha that is sqrt(rank) times larger.
    """
    known = linears(architecture.family)
    return {
        "kind": "canonical_lora",
        "target_modules": sorted(known[name] for name in targets(architecture.family, keys["targets"])),
        "dim": keys["rank"],
        "alpha": keys["alpha"] * math.sqrt(keys["rank"]) if keys["rslora"] else keys["alpha"],
        "dropout": keys["dropout"],
    }
