"""NeMo's PEFT transforms by their kind, and how a model takes one.

Importing this module imports NeMo; call `nemo_ext.platform.activate()` first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from nemo.collections.llm import fn
from nemo.collections.llm.peft import dora
from nemo.lightning.pytorch.callbacks.peft import PEFT
from torch import nn

from nemo_ext.adapters.adalora import AdaLoRA
from nemo_ext.adapters.dora import DoRA
from nemo_ext.adapters.fourierft import FourierFT
from nemo_ext.adapters.lora import CanonicalLoRA, LoRA
from nemo_ext.adapters.moe_dora import MoEDoRA

KINDS = {"lora": LoRA, "canonical_lora": CanonicalLoRA, "dora": dora.DoRA, "canonical_dora": DoRA, "moe_dora": MoEDoRA,
         "adalora": AdaLoRA, "fourierft": FourierFT}  # fmt: skip


def transform(settings: Mapping[str, Any]) -> PEFT:
    """The transform that an adapter was made for: `settings` has its kind and that kind's arguments, perhaps among others."""
    kind = KINDS[settings["kind"]]
    known = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in settings.items() if name in known})


def apply(peft: PEFT, model: nn.Module) -> nn.Module:
    """Put the adapters into Megatron's model, in place, and freeze everything else."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if isinstance(peft, MoEDoRA):
        peft.place(model)
    return fn.walk(model, peft.transform)
