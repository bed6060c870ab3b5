"""FlashAttention-4 in a model that is trained (`nemo_ext/platform/flash_attention.py`)."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import Callback

from nemo_ext.errors import UserError
from nemo_ext.platform import flash_attention


class UseFlashAttention(Callback):
    """Before the first micro batch. Raises UserError where the machine cannot, or where a model has no layer that it fits."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        found = sum(flash_attention.use(chunk) for chunk in trainer.strategy.megatron_parallel)
        if not found:
            raise UserError("attention=flash4: no layer of this model is one that it computes: attention=transformer_engine")
