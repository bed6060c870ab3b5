"""Mixtral: NeMo's configuration, with experts that Megatron treats alike at every expert parallel size."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.models.gpt import GPTModel
from nemo.collections import llm

EXPERTS = ".mlp.experts."


@dataclass
class MixtralConfig(llm.MixtralConfig):
    """Mixtral at any size, whose training resumes at any expert parallel size."""

    def configure_model(self, *args, **kwargs) -> GPTModel:
        """Megatron's model with its experts marked as such also where every process has all of them.

        Megatron-Core 0.15 gives the experts an optimizer of their own only with expert parallelism, and refuses the states of one
        optimizer where it has two. The mark changes the grouping of parameters, not what is reduced over which processes.
        """
        model = super().configure_model(*args, **kwargs)
        for name, parameter in model.named_parameters():
            if EXPERTS in name:
                parameter.allreduce = False
        return model
