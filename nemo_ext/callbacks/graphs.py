"""A step's micro batches as one CUDA graph: the host starts them once, not kernel by kernel."""

from __future__ import annotations

import functools
from typing import Any

from lightning.pytorch.callbacks import Callback


class StepGraph(Callback):
    """Has NeMo capture the forward and backward passes of the second step's micro batches and replay them in those after it.

    The optimizer and evaluations stay as they are. Every step has the same shapes, no callback sees single micro batches, and
    random numbers come from Transformer Engine's tracker (the strategy's `use_te_rng_tracker`).

    NeMo asks the model's configuration whether to do so. Its constructor cannot be told: NeMo 2.7.3 runs its checks twice, and
    those of Megatron-Core 0.15.3 refuse what the first ones made of it.
    """

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        order_copies()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        pl_module.config.enable_cuda_graph, pl_module.config.cuda_graph_scope = True, "full_iteration"

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module.config.enable_cuda_graph = False


def order_copies() -> None:
    """Let a step's batches be copied to where the graph reads them only after the graph of the step before has read its own.

    The stream on which Megatron-Core 0.15.3 copies waits for nothing; later versions' does. A host that is ahead would overwrite
    tokens and labels under a graph that still reads them, without an error. Clipping makes the host wait for every step, and so
    does a `LossGuard` where the loss is; the first stages of a pipeline without clipping do not wait.
    """
    import torch
    from megatron.core.full_cuda_graph import StaticBufferLoader

    upstream = StaticBufferLoader.__call__
    if hasattr(upstream, "__wrapped__"):
        return

    @functools.wraps(upstream)
    def load(self, *arguments, **keywords):
        self.stream.wait_stream(torch.cuda.current_stream())
        return upstream(self, *arguments, **keywords)

    StaticBufferLoader.__call__ = load
