"""Random numbers that a resumed run draws again: a function of seed, step and pipeline stage, with no state to save."""

from __future__ import annotations

import random

import numpy as np
import torch
from lightning.pytorch.callbacks import Callback


class SeedEachStep(Callback):
    """Seeds every generator before each step of a model with dropout; without dropout nothing is drawn and nothing done.

    Tensor-parallel ranks get different streams inside tensor-parallel regions and the same outside, as Megatron requires.
    """

    def __init__(self, seed: int, adapter_dropout: float = 0.0):
        self.seed, self.adapter_dropout = seed, adapter_dropout

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        config = pl_module.config
        if not (config.hidden_dropout or config.attention_dropout or self.adapter_dropout):
            return
        from megatron.core import parallel_state, tensor_parallel

        words = (self.seed, trainer.global_step, parallel_state.get_pipeline_model_parallel_rank())
        seed = int(np.random.SeedSequence(words).generate_state(1)[0]) >> 1  # a positive int32
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        tensor_parallel.model_parallel_cuda_manual_seed(seed)
