"""The output layer and the loss in one (`nemo_ext/platform/output_layer.py`)."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import Callback

from nemo_ext.platform import output_layer


class FusedOutput(Callback):
    """Marks the model's output layer before its first micro batch, which may be an evaluation's. `fp8`: its gradients in FP8."""

    def __init__(self, fp8: bool = False):
        self.fp8 = fp8

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        for chunk in trainer.strategy.megatron_parallel:
            output_layer.use(chunk, self.fp8)
