"""Which layers may have few bits: ModelOpt's sensitivities, and the choice that a budget of bits allows.

ModelOpt scores a layer's format by the squared error of its output weighted by the loss's squared gradient there. All layers
begin with the smallest format; those whose score falls most for the bits it costs get the larger one, until the budget is spent.
"""

from __future__ import annotations

import contextlib
import copy
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from conversion.quantization import arithmetic, layers
from conversion.quantization.calibrate import Batches
from conversion.quantization.formats import Format
from nemo_ext.errors import UserError

PASSES = 2  # one to calibrate each format, one to score


def budget(text: str) -> float:
    """The bits of `auto=bits:4.8`; UserError for anything else."""
    kind, _, number = text.partition(":")
    with contextlib.suppress(ValueError):
        if kind == "bits" and 0 < (bits := float(number)) < 100:
            return bits
    raise UserError(f"auto={text} is not bits:NUMBER, for example auto=bits:4.8")


def bits(plan: Mapping[str, Format], model: nn.Module) -> float:
    """Bits a weight of the plan's layers, scales of groups counted."""
    sizes = {name: model.get_submodule(name).weight.numel() for name in plan}
    return sum(form.bits * sizes[name] for name, form in plan.items()) / sum(sizes.values())


def choose(model: nn.Module, names: list[str], small: Format, large: Format, limit: float, batches: Batches) -> dict[str, Format]:
    """A format for each layer of `names` with at most `limit` bits a weight over them; `model` is left as it is.

    Raises UserError for a limit that even the small format exceeds.
    """
    if limit < small.bits:
        raise UserError(
            f"auto=bits:{limit:g} is less than the {small.bits:g} bits of {small.name}: give more, or a larger group="
        )
    scores = sensitivities(model, names, (small, large), batches)
    sizes = {name: model.get_submodule(name).weight.numel() for name in names}
    total = sum(sizes.values())
    used = small.bits * total
    plan = dict.fromkeys(names, small)
    groups = layers.groups(names)
    gain = {members: scores[members][0] - scores[members][1] for members in groups}
    for members in sorted(groups, key=lambda each: gain[each] / sum(sizes[name] for name in each), reverse=True):
        cost = (large.bits - small.bits) * sum(sizes[name] for name in members)
        if gain[members] > 0 and used + cost <= limit * total:
            used += cost
            plan |= dict.fromkeys(members, large)
    return plan


def sensitivities(
    model: nn.Module, names: list[str], formats: tuple[Format, ...], batches: Batches
) -> dict[tuple[str, ...], list[float]]:
    """ModelOpt's score of each format for each group of layers; `model` is left as it is."""
    import modelopt.torch.quantization as mtq

    arithmetic.install()
    copied = copy.deepcopy(model)
    others = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in names]
    device = next(model.parameters()).device
    count = -(-len(batches.ids) // batches.batch)
    with _quiet():
        _, state = mtq.auto_quantize(
            copied,
            constraints={"effective_bits": 15.9},  # loose: the choice is made here, where scales of groups count
            quantization_formats=[_config(form) for form in formats],
            data_loader=batches,
            forward_step=lambda each, ids: each(ids.to(device), labels=ids.to(device), use_cache=False),
            loss_func=lambda output, ids: output.loss,
            disabled_layers=others or None,
            num_calib_steps=count,
            num_score_steps=count,
        )
    found = {}
    for members in layers.groups(names):
        stats = next(
            state["candidate_stats"][f"{name}.quant_recipe"]
            for name in members
            if f"{name}.quant_recipe" in state["candidate_stats"]
        )
        by_bits = sorted(zip((_bits(each) for each in stats["formats"]), stats["scores"], strict=True))
        found[members] = [float(score) for _, score in by_bits[: len(formats)]]
    return found


def _bits(recipe: Any) -> float:
    return float(recipe.compression)


def _config(form: Format) -> dict[str, Any]:
    weight, inputs = form.modelopt()
    return {
        "quant_cfg": {"*weight_quantizer": weight, "*input_quantizer": inputs, "default": {"enable": False}},
        "algorithm": "max",
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nothing of what ModelOpt and its solver, another program, print."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            with contextlib.redirect_stdout(nowhere):
                yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
