"""Steps that would spoil a run: a loss or gradient that is no number, and a loss that jumps."""

from __future__ import annotations

import functools
import math
import statistics
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

from nemo_ext import faults
from nemo_ext.errors import RunError
from nemo_ext.run_folder import CHECKPOINTS, newest_checkpoint

IN_A_ROW = 5  # bad steps one after the other: it is not the batch


class LossGuard(Callback):
    """Looks at every step's loss and gradient norm before the optimizer applies it, and keeps a bad one out.

    Bad is a step whose loss or gradient norm is not finite (`on_nan`), or whose loss is above `spike_factor` times the median of
    the last `spike_window` good losses, once there are so many (`on_spike`). Then

    - "skip" applies no update: weights, moments and the optimizer's count of steps are those before it. The schedule and the data
      go on, so that every later step has the batch and the learning rate it would have had.
    - "rollback" applies none either, and takes weights and optimizer states from the newest checkpoint; the run goes on with the
      next step's batch and learning rate. What was learnt since that checkpoint is given up: its batches are not repeated.
    - "stop" applies none and raises RunError, for a spike; a NaN's is raised by Megatron and the metrics.
    - "none" lets a spike be.

    All ranks agree by one all-reduce of two numbers a step over gloo. Recent losses are in the checkpoint, so that a resumed run
    decides as the one that was not stopped. After `IN_A_ROW` bad steps one after the other the run ends with RunError.

    Megatron's own rerun machine is not what does this: its modes that repeat a step need a training loop that it drives, which
    NeMo's is not, and switched off it only raises on the rank that saw the NaN.

    Stands before the callbacks that evaluate or save at the end of a step.
    """

    def __init__(
        self, run_dir: str, on_nan: str = "stop", on_spike: str = "none", spike_factor: float = 1.5, spike_window: int = 32
    ) -> None:
        self.run_dir, self.on_nan, self.on_spike = run_dir, on_nan, on_spike
        self.spike_factor = spike_factor
        self.losses: deque[float] = deque(maxlen=spike_window)
        self.in_a_row = 0
        self.figures: dict[str, Any] = {}  # for the step's line in metrics.jsonl
        self._loss: torch.Tensor | None = None
        self._norm = 0.0
        self._to_roll_back = False

    def state_dict(self) -> dict[str, Any]:
        """The same on every rank."""
        return {"losses": list(self.losses)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.losses.extend(state_dict["losses"])

    def on_train_start(self, trainer, pl_module) -> None:
        from megatron.core import parallel_state

        self._has_loss = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        self._group = torch.distributed.new_group(backend="gloo")
        optimizer = trainer.optimizers[0].mcore_optimizer
        optimizer.get_grad_norm = self._noting(optimizer.get_grad_norm)
        optimizer.step_with_ready_grads = self._guarding(optimizer.step_with_ready_grads, trainer)

    def on_megatron_step_end(self, step, reduced) -> None:
        if not step.forward_only:
            self._loss = reduced["loss"] if isinstance(reduced, dict) else reduced

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.figures = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if self._to_roll_back:
            self._to_roll_back = False
            self._roll_back(trainer)

    def _noting(self, get_grad_norm: Callable[[], float]) -> Callable[[], float]:
        @functools.wraps(get_grad_norm)
        def noted() -> float:
            self._norm = get_grad_norm()
            return self._norm

        return noted

    def _guarding(self, apply: Callable[[], bool], trainer) -> Callable[[], bool]:
        @functools.wraps(apply)
        def guarded() -> bool:
            return apply() if self._good(trainer) else False

        return guarded

    def _good(self, trainer) -> bool:
        """Whether the step may be applied, the same answer on every rank. Raises RunError."""
        step = trainer.global_step + 1
        loss, finite = self._agree()
        action, what = self.on_nan, f"loss {loss:.4g}, gradient norm {self._norm:.4g}"
        if finite:
            if not self._spikes(loss):
                self.losses.append(loss)
                self.in_a_row = 0
                return True
            action = self.on_spike
            what = f"loss {loss:.4f}, above {self.spike_factor:g} times the median {statistics.median(self.losses):.4f}"
        elif action == "stop":
            return True  # the metrics say it when its line is written
        if action == "stop":
            raise RunError(f"{what} at step {step}: lower lr=, look for broken data, or on_spike=skip passes over such steps")
        self.in_a_row += 1
        if self.in_a_row == IN_A_ROW:
            raise RunError(f"{what} at step {step}, the {IN_A_ROW}th bad step in a row: lower lr=, or look for broken data")
        self.figures = {"skipped": True}
        self._to_roll_back = action == "rollback"
        if action == "skip" and trainer.is_global_zero:
            faults.note(self.run_dir, "skip", step, f"step {step} is not applied: {what}")
        return False

    def _agree(self) -> tuple[float, bool]:
        """(loss, whether it and the gradient norm are finite) of all ranks."""
        loss = float(self._loss) if self._has_loss else -math.inf
        finite = (math.isfinite(loss) or not self._has_loss) and math.isfinite(self._norm)
        found = torch.tensor([loss if math.isfinite(loss) else -math.inf, 0.0 if finite else 1.0], dtype=torch.float64)
        torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX, group=self._group)
        loss, bad = found.tolist()
        return (math.nan if math.isinf(loss) else loss), not bad

    def _spikes(self, loss: float) -> bool:
        known = len(self.losses) == self.losses.maxlen
        return self.on_spike != "none" and known and loss > self.spike_factor * statistics.median(self.losses)

    def _roll_back(self, trainer) -> None:
        """Take weights and optimizer states from the newest checkpoint. Collective. Raises RunError where there is none."""
        strategy, step = trainer.strategy, trainer.global_step
        if strategy.async_save:
            strategy.checkpoint_io.maybe_finalize_save_checkpoint(blocking=True)
        found = [newest_checkpoint(Path(self.run_dir) / CHECKPOINTS)]
        torch.distributed.broadcast_object_list(found, src=0, group=self._group)
        if found[0] is None:
            raise RunError(f"step {step} is bad and there is no checkpoint to roll back to: lower every=, or use skip")
        saved_step, path = found[0]
        rates = [group["lr"] for group in trainer.optimizers[0].param_groups]  # the schedule has set the next step's
        state = strategy.load_checkpoint(path)
        strategy.load_model_state_dict(state)
        strategy.load_optimizer_state_dict(state)
        for group, rate in zip(trainer.optimizers[0].param_groups, rates, strict=True):
            group["lr"] = rate
        if trainer.is_global_zero:
            message = f"step {step} is bad: weights and optimizer are those of step {saved_step} again"
            faults.note(self.run_dir, "rollback", step, message, to=saved_step)
