"""What an adapter's run trains of a model's senses, as PEFT has it: adapters of encoders, and parts that are trained as a whole.

A run that gives a model eyes or ears with LoRA saves, beside the language model's adapter, `senses.vision.projector.NAME`,
perhaps `senses.vision.newline`, and of the encoder either `LINEAR.adapter.linear_in.weight` or its own tensors. PEFT calls parts
that are trained as a whole `modules_to_save`. LLaVA-NeXT's newline is a parameter without a module, of which PEFT says nothing:
it is written under its own name, which PEFT loads.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from conversion import families
from conversion.dist_checkpoint import SavedTensor
from conversion.hf_to_nemo import KEY_PREFIX
from conversion.lora.adapter import Computed
from conversion.multimodal.rows import NEWLINE, sense_rows
from nemo_ext.errors import UserError
from nemo_ext.multimodal.description import Sense

PLACE = f"{KEY_PREFIX}senses."
SIDES = {"linear_in.weight": "lora_A.weight", "linear_out.weight": "lora_B.weight"}


@dataclass(frozen=True)
class Beside:
    """PEFT's tensors by name, the linears that have an adapter, and the modules that are trained as a whole."""

    tensors: Mapping[str, Computed]
    adapted: Sequence[str] = ()
    whole: Sequence[str] = ()

    def config(self, language: Mapping[str, Any], adapts_language: bool) -> dict[str, Any]:
        """PEFT's configuration of the whole adapter, from that of the language model's part."""
        patterns = [language["target_modules"]] if adapts_language else []
        if self.adapted:
            patterns.append("|".join(map(re.escape, self.adapted)))
        pattern = "|".join(f"(?:{each})" for each in patterns)
        return {**language, "target_modules": pattern, "modules_to_save": list(self.whole) or None}


def read(saved: Mapping[str, SavedTensor], settings: Mapping[str, Any], prefix: str) -> Beside:
    """What the checkpoint `saved` has of the senses that `settings` (`adapter.json`) describe; nothing of a text model's.

    `prefix` is what stands for "model." in the names of the base's language model. Raises UserError for tensors that the
    description does not have.
    """
    own = {name.removeprefix(KEY_PREFIX): tensor for name, tensor in saved.items() if name.startswith(PLACE)}
    senses = [Sense.from_dict(each) for each in settings.get("senses", ())]
    hidden = settings["architecture"]["hidden_size"]
    rows = {row.megatron: next(iter(row.hf)) for sense in senses for row in sense_rows(sense, hidden)}
    tensors, adapted, whole = {}, [], set()
    for name, tensor in own.items():
        linear, _, side = name.partition(".adapter.")
        known = rows.get(f"{linear}.weight" if side else name)
        if known is None or side not in ("", *SIDES):
            raise UserError(f"the checkpoint has {name}, which no sense of its adapter.json has")
        module = families.hf_name(known, prefix)
        if side:
            module = module.removesuffix(".weight")
            adapted += [module] if side == "linear_in.weight" else []
            module = f"{module}.{SIDES[side]}"
        else:
            whole.add(known)
        tensors[module] = Computed(tensor.shape, tensor.dtype, tensor.read)
    modules = [families.hf_name(name, prefix) for name in covered(rows.values(), whole) if name != NEWLINE]
    return Beside(tensors, adapted, modules)


def covered(names: Collection[str], chosen: Collection[str], at: str = "") -> Iterator[str]:
    """The largest modules all of whose tensors, among `names`, are `chosen`, and chosen tensors that are in no such module."""
    below = [name for name in names if name.startswith(at)]
    parts = dict.fromkeys(at + name.removeprefix(at).partition(".")[0] for name in below)
    for part in parts:
        inside = [name for name in below if name == part or name.startswith(f"{part}.")]
        if all(name in chosen for name in inside):
            yield part
        elif any(name in chosen for name in inside):
            yield from covered(inside, chosen, f"{part}.")
