"""What breaks a run in the tests, does by hand what a policy promises, or looks on. Callbacks for the cases of layouts.py."""

from __future__ import annotations

import json
import time
import traceback
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback

from nemo_ext.callbacks.graphs import StepGraph


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
    """A rank takes `times` as long over its forward passes as it would, by what the one before took on this machine."""

    def __init__(self, rank: int, times: float):
        self.rank, self.times = rank, times
        self.began, self.seconds = 0.0, 0.05

    def on_megatron_microbatch_start(self, step) -> None:
        if step.trainer.global_rank == self.rank:
            time.sleep(self.seconds * (self.times - 1))
            self.began = time.perf_counter()

    def on_megatron_microbatch_end(self, step) -> None:
        self.seconds = max(0.02, time.perf_counter() - self.began)


class Weights(Callback):
    """Leaves this rank's trained weights in out/weights.pt."""

    def __init__(self, out: str):
        self.out = Path(out)

    def on_train_end(self, trainer, *unused) -> None:
        if trainer.is_global_zero:
            chunk = trainer.strategy.megatron_parallel[0]
            torch.save({name: p.detach().clone() for name, p in chunk.named_parameters()}, self.out / "weights.pt")


class Reads(Callback):
    """Writes where Python took values out of tensors from the beginning of a step to that of the next: for each the callers."""

    METHODS = ("item", "tolist", "cpu", "nonzero", "__bool__", "__float__", "__int__", "__index__")

    def __init__(self, step: int, file: str):
        self.step, self.file = step, file
        self.places, self.taken = [], {}

    def on_train_batch_start(self, trainer, *unused) -> None:
        if trainer.global_step + 1 == self.step:
            for name in self.METHODS:
                self.taken[name] = getattr(torch.Tensor, name)
                setattr(torch.Tensor, name, self.noting(self.taken[name]))
        elif self.taken:
            for name, method in self.taken.items():
                setattr(torch.Tensor, name, method)
            self.taken = {}
            Path(self.file).write_text(json.dumps(self.places))

    def noting(self, method):
        def noted(tensor, *arguments, **options):
            frames = traceback.extract_stack(limit=8)[-2::-1]
            self.places.append(" < ".join(f"{frame.filename}:{frame.lineno}" for frame in frames))
            return method(tensor, *arguments, **options)

        return noted


class GraphStandIn(StepGraph):
    """Where NeMo would capture and replay a graph, notes what for, and runs it: a list of `forward_only`."""

    def __init__(self, file: str):
        self.file, self.seen = file, []

    def on_train_start(self, trainer, pl_module) -> None:
        from nemo.lightning import megatron_parallel

        def stand_in(run):
            def noted(**arguments):
                self.seen.append(arguments["forward_only"])
                return run(**arguments)

            return noted

        self.module, self.upstream = megatron_parallel, megatron_parallel.FullCudaGraphWrapper
        megatron_parallel.FullCudaGraphWrapper = stand_in

    def on_train_end(self, trainer, pl_module) -> None:
        self.module.FullCudaGraphWrapper = self.upstream
        Path(self.file).write_text(json.dumps(self.seen))
