"""Kernels that a recipe's keys ask for, in a model that is trained (`recipes/kernels.py`)."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import Callback

from nemo_ext.errors import UserError


class UseKernels(Callback):
    """Before a model's first micro batch, which may be an evaluation's.

    `attention`: "flash4" for `nemo_ext.platform.flash_attention`; `output_layer`: "fused" or "fp8" for
    `nemo_ext.platform.output_layer`. Raises UserError where the machine cannot, or where no layer of the model is one that
    FlashAttention-4 computes.
    """

    def __init__(self, attention: str, output_layer: str):
        self.attention, self.output_layer = attention, output_layer

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        stages = trainer.strategy.megatron_parallel
        if self.attention == "flash4":
            from nemo_ext.platform import flash_attention

            if not sum(flash_attention.use(stage) for stage in stages):
                raise UserError("attention=flash4: no layer of this model is one that it computes: attention=transformer_engine")
        if self.output_layer != "separate":
            from nemo_ext.platform import output_layer

            for stage in stages:
                output_layer.use(stage, fp8=self.output_layer == "fp8")
