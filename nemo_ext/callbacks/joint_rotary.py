"""Queries, keys and values split and rotated in one kernel (`nemo_ext/platform/rotary.py`)."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import Callback


class JointRotary(Callback):
    """Lets Megatron's attention do so before its first micro batch, which may be an evaluation's."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        from nemo_ext.platform import rotary  # which imports Triton, for GPUs

        rotary.install()
