"""Which parts of a model with senses are trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nemo_ext import adapters
from nemo_ext.architecture import Architecture
from nemo_ext.errors import UserError
from nemo_ext.multimodal.description import Sense

if TYPE_CHECKING:
    from torch import nn

FROZEN, FULL, LORA = "frozen", "full", "lora"
STAGES = {"align": (FROZEN, FROZEN), "instruct": (FULL, FROZEN)}  # of LLaVA: what the language model and the tower do


@dataclass(frozen=True)
class Trained:
    """How the language model and the towers are trained: "frozen", "full" or "lora". Projectors and newlines always are."""

    language: str = FULL
    tower: str = FROZEN

    def __post_init__(self) -> None:
        if self.tower == LORA and self.language == FULL:
            raise UserError("train_tower=lora goes with train_language=frozen or lora, not with full")

    @property
    def adapter(self) -> bool:
        """Whether an adapter of anything is trained: checkpoints then hold what is trained and no more."""
        return LORA in (self.language, self.tower)


def num_trained(trained: Trained, architecture: Architecture, senses: Sequence[Sense], keys: dict[str, Any]) -> dict[str, int]:
    """How many parameters have gradients, by part: "language", "tower", "projector". `keys` are a recipe's, for adapters."""
    language = {FROZEN: 0, FULL: architecture.num_parameters()}.get(trained.language)
    if language is None:
        language = adapters.trained(architecture, LORA, keys)
    towers = {FROZEN: lambda e: 0, FULL: lambda e: e.num_parameters(), LORA: lambda e: e.adapter_parameters(keys["rank"])}
    return {
        "language": language,
        "tower": sum(towers[trained.tower](sense.encoder) for sense in senses),
        "projector": sum(sense.projector_parameters(architecture.hidden_size) for sense in senses),
    }


def freeze(model: nn.Module, trained: Trained) -> None:
    """Freeze what of a GPTModel is not trained, before Megatron wraps it: it then has no gradient buffer and no optimizer state.

    Adapters, which do not exist yet, are trained where they are put; what they adapt is frozen here.
    """
    senses = getattr(model, "senses", {})
    of_senses = {id(parameter) for sense in senses.values() for parameter in sense.parameters()}
    if trained.language != FULL:
        for parameter in model.parameters():
            if id(parameter) not in of_senses:
                parameter.requires_grad_(False)
    for sense in senses.values():
        if trained.tower != FULL:
            sense.encoder.requires_grad_(False)
        sense.train(sense.training)  # a frozen encoder computes as in use
