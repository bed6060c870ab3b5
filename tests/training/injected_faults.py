"""What breaks a run in the tests, and what does by hand what a policy promises. Callbacks for the cases of layouts.py."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback


class BrokenBatch(Callback):
    """The micro batches of a step on one rank have a loss that is no number."""

    def __init__(self, step: int, rank: int = 0):
        self.step, self.rank = step, rank

    def on_megatron_microbatch_start(self, step, batch) -> None:
        if not step.forward_only and step.trainer.global_step + 1 == self.step and step.trainer.global_rank == self.rank:
            batch["loss_mask"].fill_(float("nan"))


class LoudStep(Callback):
    """Through one step the embedding is thirty times what it was, and then again what it was."""

    def __init__(self, step: int):
        self.step = step

    def on_train_batch_start(self, trainer, *unused) -> None:
        if trainer.global_step + 1 == self.step:
            self.weight = next(trainer.strategy.megatron_parallel[0].parameters()).data
            self.copy = self.weight.clone()
            self.weight.mul_(30)

    def on_train_batch_end(self, trainer, *unused) -> None:
        if trainer.global_step == self.step:
            self.weight.copy_(self.copy)


class BrokenWeights(Callback):
    """A weight becomes no number before a step."""

    def __init__(self, step: int):
        self.step = step

    def on_train_batch_start(self, trainer, *unused) -> None:
        if trainer.global_step + 1 == self.step:
            next(trainer.strategy.megatron_parallel[0].parameters()).data.view(-1)[0] = float("nan")


class Return(Callback):
    """After step `back_at` everything that was learnt is as after step `copied_at`: a rollback by hand, or, for the
    step before, an update that was not applied."""

    def __init__(self, copied_at: int, back_at: int):
        self.copied_at, self.back_at = copied_at, back_at

    def on_train_batch_end(self, trainer, *unused) -> None:
        chained = trainer.optimizers[0].mcore_optimizer.chained_optimizers
        inner = [each.optimizer for each in chained]
        tensors = [p.data for chunk in trainer.strategy.megatron_parallel for p in chunk.parameters()]
        tensors += [p.data for one in inner for group in one.param_groups for p in group["params"]]
        tensors += [value for one in inner for state in one.state.values() for value in state.values() if torch.is_tensor(value)]
        if trainer.global_step == self.copied_at:
            self.tensors = [tensor.clone() for tensor in tensors]
            self.counts = [group.get("step") for one in inner for group in one.param_groups]
        if trainer.global_step == self.back_at:
            for tensor, copy in zip(tensors, self.tensors, strict=True):
                tensor.copy_(copy)
            for group, count in zip((group for one in inner for group in one.param_groups), self.counts, strict=True):
                if count is not None:
                    group["step"] = count


class SlowRank(Callback):
    """A rank takes longer over its forward passes."""

    def __init__(self, rank: int, seconds: float):
        self.rank, self.seconds = rank, seconds

    def on_megatron_microbatch_start(self, step) -> None:
        if step.trainer.global_rank == self.rank:
            time.sleep(self.seconds)


class Weights(Callback):
    """Leaves this rank's trained weights in out/weights.pt."""

    def __init__(self, out: str):
        self.out = Path(out)

    def on_train_end(self, trainer, *unused) -> None:
        if trainer.is_global_zero:
            chunk = trainer.strategy.megatron_parallel[0]
            torch.save({name: p.detach().clone() for name, p in chunk.named_parameters()}, self.out / "weights.pt")
