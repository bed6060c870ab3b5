"""No waits of the host for the GPU in a step that nobody needs."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from megatron.core import parallel_state
from nemo.lightning.megatron_parallel import MaskedTokenLossReduction


class SummedLoss(MaskedTokenLossReduction):
    """NeMo's mean over the learnt tokens of a global batch, over all of its micro batches.

    NeMo leaves out those that have no learnt token, for which the host must look at each one's count, and so waits until the GPU
    is done with the step before it gives it the gradient norm and the optimizer to do. Their sums are 0.
    """

    def reduce(self, losses_reduced_per_micro_batch: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        """The mean, [], from each micro batch's `loss_sum_and_ub_size`, [2]: the sum of its losses, and of how many tokens."""
        if not losses_reduced_per_micro_batch:  # no last pipeline stage
            return super().reduce(losses_reduced_per_micro_batch)
        total = torch.stack([each["loss_sum_and_ub_size"] for each in losses_reduced_per_micro_batch]).sum(dim=0)
        torch.distributed.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        return total[0] / total[1]


class LossWithoutWaiting(Callback):
    """Leaves one wait to a training step: for the gradient norm, which clipping needs.

    A model that takes NeMo's mean of losses takes `SummedLoss`. And Lightning's log takes nothing: NeMo gives it the loss for a
    progress bar, and Lightning reads such values at the end of every step, with a bar or without one, after the optimizer.
    """

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if type(pl_module.training_loss_reduction) is MaskedTokenLossReduction:
            pl_module._training_loss_reduction = SummedLoss()
        pl_module.log = _drop


def _drop(*arguments: Any, **options: Any) -> None:
    """In the place of `LightningModule.log`."""
