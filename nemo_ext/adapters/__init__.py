"""What an adapter adapts, in Hugging Face's names and NeMo's. Imports neither torch nor NeMo."""

from __future__ import annotations

import math
from collections.abc import Mapping
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
TRANSFORMS = {"lora": "canonical_lora", "dora": "canonical_dora", "moe_dora": "moe_dora"}  # a method's kind: its transform's


def linears(family: str) -> dict[str, str]:
    """{Hugging Face's name: NeMo's target} of the linears in a layer of an architecture's family that LoRA can adapt."""
    return LINEARS.get(family, {**ATTENTION, **GATED_MLP})


def targets(family: str, selected: str | list[str], key: str = "targets") -> list[str]:
    """The linears that "all-linear", "attention", "mlp" and names select, in a layer's order; a string has commas between them.

    Raises UserError where it selects nothing, or names what the family does not have; `key` is where it was given.
    """
    known = linears(family)
    mlp = [name for name, target in known.items() if target.startswith(MLP)]
    groups = {"all-linear": list(known), "attention": [name for name in known if name not in mlp], "mlp": mlp}
    wanted: list[str] = []
    for name in map(str, selected) if isinstance(selected, list) else filter(None, map(str.strip, str(selected).split(","))):
        if not (found := groups.get(name, [name] if name in known else [])):
            choices = ", ".join([*known, *(group for group, names in groups.items() if names)])
            raise UserError(f"{key}= has {name}, which is no linear of a {family} model: {choices}")
        wanted += found
    if not wanted:
        raise UserError(f"{key}={selected} names no linear: {', '.join([*known, *groups])}")
    return [name for name in known if name in wanted]


def ranks(family: str, keys: dict[str, Any]) -> dict[str, int]:
    """The rank of each linear that a recipe's `targets` select: its own of `ranks`, else `rank`. Raises UserError."""
    return _assigned(family, keys, "ranks", keys["rank"], int)


def alphas(family: str, keys: dict[str, Any]) -> dict[str, float]:
    """The alpha of each linear that a recipe's `targets` select: its own of `alphas`, else `alpha`. Raises UserError."""
    return _assigned(family, keys, "alphas", keys["alpha"], float)


def _assigned(family: str, keys: dict[str, Any], key: str, default: Any, number: type) -> dict[str, Any]:
    """{linear: number} from "q_proj:8,mlp:32" or a mapping; `default` for those that it does not name."""
    chosen, given = targets(family, keys["targets"]), keys.get(key) or {}
    if not isinstance(given, Mapping):
        parts = given if isinstance(given, list) else str(given).split(",")
        given = dict(str(part).strip().rpartition(":")[::2] for part in parts)
    values = dict.fromkeys(chosen, default)
    for name, value in given.items():
        try:
            found = number(str(value))
        except ValueError:
            found = 0
        if not found > 0:
            kind = "an integer" if number is int else "a number"
            raise UserError(f"{key}={name}:{value} must give {kind} above 0 to a linear, as in {key}=q_proj:8,mlp:32")
        if not (named := [each for each in targets(family, name, key) if each in chosen]):
            raise UserError(f"{key}={name}:{value}: targets={keys['targets']} has no {name}")
        values.update(dict.fromkeys(named, found))
    return values


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


def num_parameters(architecture: Architecture, names: list[str], rank: int | Mapping[str, int]) -> int:
    """How many parameters A `[rank, in]` and B `[out, rank]` have in all layers; `rank` of all, or of each by its name."""
    ranks = rank if isinstance(rank, Mapping) else dict.fromkeys(names, rank)
    return architecture.num_layers * sum(ranks[name] * sum(shape(architecture, name)) for name in names)


def trained(architecture: Architecture, kind: str, keys: dict[str, Any]) -> int:
    """How many parameters a recipe's adapter has. Raises UserError where its size does not fit."""
    names = targets(architecture.family, keys["targets"])
    if kind == "adalora":  # and the singular values
        if keys["target_rank"] >= keys["init_rank"]:
            raise UserError(f"target_rank={keys['target_rank']} must be below init_rank={keys['init_rank']}: ranks are cut")
        return num_parameters(architecture, names, keys["init_rank"]) + architecture.num_layers * keys["init_rank"] * len(names)
    if kind == "fourierft":
        return architecture.num_layers * frequencies(architecture, names, keys) * len(names)
    a_and_b = num_parameters(architecture, names, ranks(architecture.family, keys))
    if kind == "lora":
        return a_and_b
    inputs, outputs = (sum(sides) for sides in zip(*(shape(architecture, name) for name in names), strict=True))
    layer = a_and_b // architecture.num_layers + outputs  # with the magnitudes
    if kind == "dora":
        return architecture.num_layers * layer
    top = top_layers(architecture, keys)
    return (architecture.num_layers - top) * layer + top * keys["experts"] * (layer + inputs)


def statistics(architecture: Architecture, kind: str | None, keys: dict[str, Any]) -> int:
    """Bytes that an adapter of this kind keeps beside weights, gradients and optimizer states, in all layers.

    AdaLoRA has two fp32 averages of each element, its importance and how uncertain that is, and of each singular value whether
    it is kept.
    """
    if kind != "adalora":
        return 0
    values = architecture.num_layers * keys["init_rank"] * len(targets(architecture.family, keys["targets"]))
    return 8 * trained(architecture, kind, keys) + 4 * values


def top_layers(architecture: Architecture, keys: dict[str, Any]) -> int:
    """How many of the last layers have several experts: half of them where it is not said. Raises UserError."""
    layers = architecture.num_layers
    if (top := keys["top_layers"] or (layers + 1) // 2) > layers:
        raise UserError(f"top_layers={top}, but the model has {layers} layers")
    return top


def frequencies(architecture: Architecture, names: list[str], keys: dict[str, Any]) -> int:
    """How many coefficients FourierFT learns of each of these linears. Raises UserError for more than the smallest has."""
    smallest = min(names, key=lambda name: math.prod(shape(architecture, name)))
    inputs, outputs = shape(architecture, smallest)
    if (count := keys["n_frequency"]) > inputs * outputs:
        raise UserError(f"n_frequency={count} is more than {smallest} has: {outputs} x {inputs} = {outputs * inputs}")
    return count


def allocation(keys: dict[str, Any]) -> dict[str, Any]:
    """How AdaLoRA allocates ranks, by `rank_allocation.RankAllocation`'s names. Raises UserError where it has no step for it."""
    same = ("init_rank", "target_rank", "steps", "importance_decay", "uncertainty_decay", "orthogonality")
    return {**{name: keys[name] for name in same}, **rank_schedule(keys)}


def rank_schedule(keys: dict[str, Any]) -> dict[str, int]:
    """When AdaLoRA cuts ranks: the steps before and after, and those between two cuts. Raises UserError for too many."""
    steps = keys["steps"]
    warmup = steps // 10 if keys["rank_warmup"] is None else keys["rank_warmup"]
    final = 3 * steps // 10 if keys["rank_final"] is None else keys["rank_final"]
    if warmup + final >= steps:
        raise UserError(f"rank_warmup={warmup} and rank_final={final} leave no step of steps={steps} in which ranks are cut")
    return {"warmup": warmup, "final": final, "interval": keys["delta_t"] or max(1, steps // 100)}


def transform_settings(architecture: Architecture, keys: dict[str, Any], kind: str = "lora") -> dict[str, Any]:
    """A recipe's keys as the arguments of `nemo_ext.adapters.transforms.transform`; `kind` is the method's.

    NeMo multiplies B A by alpha / dim: rank-stabilised LoRA's alpha / sqrt(rank) (Kalajdzievski 2023, arXiv:2312.03732) takes an
    alpha that is sqrt(rank) times larger. `ranks` and `alphas` are what single targets have instead of `dim` and `alpha`.
    """
    family, known = architecture.family, linears(architecture.family)
    names = targets(family, keys["targets"])
    where = {"kind": kind, "target_modules": sorted(known[name] for name in names)}
    if kind == "adalora":
        return {**where, "dim": keys["init_rank"], "alpha": keys["alpha"], "dropout": keys["dropout"]}
    if kind == "fourierft":
        count = frequencies(architecture, names, keys)
        return {**where, "n_frequency": count, "scaling": keys["scaling"], "frequency_seed": keys["frequency_seed"],
                "start": keys["spectrum_start"]}  # fmt: skip
    dims, numerators = ranks(family, keys), alphas(family, keys)

    def alpha(value: float, rank: int) -> float:
        return value * math.sqrt(rank) if keys["rslora"] else value

    settings = {
        "kind": TRANSFORMS[kind],
        "target_modules": sorted(known[name] for name in names),
        "dim": keys["rank"],
        "alpha": alpha(keys["alpha"], keys["rank"]),
        "dropout": keys["dropout"],
    }
    if keys.get("ranks") or keys.get("alphas"):
        settings["ranks"] = {known[name]: dims[name] for name in names}
        settings["alphas"] = {known[name]: alpha(numerators[name], dims[name]) for name in names}
    if kind == "moe_dora":
        settings |= {"experts": keys["experts"], "top_k": keys["top_k"], "top_layers": top_layers(architecture, keys)}
    return settings
