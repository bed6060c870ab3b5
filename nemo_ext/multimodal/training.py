"""NeMo's model configuration, data step and forward step for a model with senses.

Importing this module imports NeMo; call `nemo_ext.platform.activate()` first.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import nemo_run as run
from megatron.core import parallel_state
from nemo.collections.llm.gpt.model.base import gpt_data_step
from torch import Tensor, nn

from nemo_ext.multimodal import model as models
from nemo_ext.multimodal.description import AUDIO, VISION, Sense
from nemo_ext.multimodal.freezing import Trained, freeze

MEDIA = tuple(name for modality in (VISION, AUDIO) for name in models.media_names(modality))


def with_senses(model: run.Config, senses: Sequence[Sense], trained: Trained, recompute: bool = False) -> run.Config:
    """A language model's NeMo-Run object (`nemo_ext.modeling.model_config`) as that of the same model with senses.

    `recompute` keeps only layers' inputs of a trained encoder for the backward pass. Changes `model` and returns it.
    """
    fields = {name: getattr(model.config, name) for name in model.config.__arguments__}
    added = dict(senses=[sense.to_dict() for sense in senses], language=trained.language, tower=trained.tower)
    config = _with_senses(model.config.__fn_or_cls__)
    model.config = run.Config(
        config, **{**fields, **added, "recompute_encoder": recompute, "data_step_fn": data_step, "forward_step_fn": forward_step}
    )
    return model


@functools.cache
def _with_senses(config: type) -> type:
    """The NeMo configuration of a language model, which also gives it senses."""

    @dataclass
    class WithSenses(config):
        senses: list[dict[str, Any]] | None = None
        language: str = "full"
        tower: str = "frozen"
        recompute_encoder: bool = False

        def configure_model(self, *arguments: Any, **options: Any) -> nn.Module:
            """Megatron's model; its senses on the first pipeline stage; frozen what is not trained."""
            model = super().configure_model(*arguments, **options)
            models.attach(model, [Sense.from_dict(sense) for sense in self.senses])
            for sense in getattr(model, "senses", {}).values():
                sense.recompute = self.recompute_encoder
            freeze(model, Trained(self.language, self.tower))
            return model

    WithSenses.__name__ = WithSenses.__qualname__ = f"{config.__name__}WithSenses"
    return WithSenses


def data_step(batches: Iterator) -> dict[str, Tensor | None]:
    """NeMo's, and on the first pipeline stage the media of a batch."""
    batch = next(batches)
    batch = batch[0] if isinstance(batch, tuple) else batch
    media = {name: value for name, value in batch.items() if name in MEDIA}
    taken = gpt_data_step(iter([{name: value for name, value in batch.items() if name not in MEDIA}]))
    if parallel_state.is_pipeline_first_stage():
        taken.update({name: value.cuda(non_blocking=True) for name, value in media.items()})
    return taken


def forward_step(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """NeMo's, of a model that takes media: `model` is its LightningModule, whose own forward has no room for them."""
    from nemo.collections.llm.gpt.model.base import get_packed_seq_params

    inner = model.module
    while hasattr(inner, "module"):
        inner = inner.module
    media = {name: batch[name] for name in MEDIA if name in batch} if hasattr(inner, "senses") else {}
    if "cu_seqlens" in batch:
        media["packed_seq_params"] = get_packed_seq_params(batch)
    return model.module(
        input_ids=batch["tokens"],
        position_ids=batch["position_ids"],
        attention_mask=batch.get("attention_mask"),
        labels=batch["labels"],
        **media,
    )
