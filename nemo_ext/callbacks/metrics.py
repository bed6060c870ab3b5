"""Writes what a run does into its folder: metrics.jsonl, status.json, TensorBoard, and Weights & Biases when asked for."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import re
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from nemo_ext import run_folder
from nemo_ext.callbacks import sinks
from nemo_ext.callbacks.stop import StopOnSignal
from nemo_ext.errors import RunError, UserError, explain, is_lost_connection
from nemo_ext.platform import hardware

GIB = 1024**3


class MetricsCallback(pl.Callback):
    """One JSON line per optimizer step and per validation, written by one rank, without a collective of its own.

    The writing rank is the first one that has the loss: last pipeline stage, data, context and tensor rank 0. Its losses are
    already means over the global batch (Megatron's loss reduction runs over the data-parallel group), so nothing is gathered;
    the gradient norm is the whole model's on every rank.

    On a GPU a step's loss is copied behind the step, and its line written when the next one ends: nothing waits for the device.
    Validation, saving and the end write what is pending. A resumed run first drops the lines after the
    step it resumes from.

    A gradient norm that is not finite raises `RunError` on every rank in the same step (all ranks have the same norm), a loss
    that is not finite on every rank of the last stage: nobody is left waiting in a collective. Not so without `stop_on_nan`: a
    `LossGuard` has kept such a step out.

    Stands before callbacks that evaluate or save at the end of a step, so that the step is timed without them.

    Args:
        run_dir: the run's folder.
        tokens_per_step: tokens in a global batch.
        flops_per_token: forward and backward, `Architecture.flops_per_token(seq)`.
        num_devices: GPUs (or CPU processes) of the whole run; `tflops` is per device.
        max_steps: the last step of the run.
        tensorboard: write TensorBoard events into the run's folder.
        wandb: the Weights & Biases project, or None. Raises `UserError` where the package is missing.
        log_every: steps between lines; validation, saving and the last step always get one.
        stop_on_nan: end the run at a loss or gradient norm that is not finite.
        flops_per_input: of what encoders get, by modality, forward and backward, `multimodal.flops.trained_flops`; how many
            inputs a step has says the data module's `encoded(step)`.
    """

    def __init__(
        self,
        run_dir: str,
        tokens_per_step: int,
        flops_per_token: float,
        num_devices: int,
        max_steps: int,
        tensorboard: bool = True,
        wandb: str | None = None,
        log_every: int = 1,
        stop_on_nan: bool = True,
        flops_per_input: dict[str, float] | None = None,
    ) -> None:
        if wandb:
            sinks.import_wandb()
        self.run_dir = run_dir
        self.tokens_per_step = tokens_per_step
        self.flops_per_token = flops_per_token
        self.flops_per_input = flops_per_input
        self.num_devices = num_devices
        self.max_steps = max_steps
        self.tensorboard = tensorboard
        self.wandb = wandb
        self.log_every = log_every
        self.stop_on_nan = stop_on_nan

        self._begun = False
        self._writes = self._has_loss = False  # this rank's part
        self._phase = ""
        self._started: float | None = None  # this start's first moment, the records' clock
        self._tokens = 0
        self._lr: float | None = None
        self._grad_norm: float | None = None
        self._mark: float | None = None  # when the running step began
        self._pending: tuple[dict[str, Any], Any] | None = None  # a step's record and its loss, on its way to the host
        self._val_losses: list[Any] = []
        self._sinks: list[sinks.Sink] = []

    # Hooks, in the order in which Lightning calls them.

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin(trainer)
        self._watch_grad_norm(trainer)
        self._set_phase("training", trainer.global_step)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        self._set_phase("training", trainer.global_step)
        if trainer.optimizers:  # the schedule moves on before the batch ends; NeMo multiplies a group's by `pre_lr_mult`
            rates = (group["lr"] / group.get("pre_lr_mult", 1.0) for group in trainer.optimizers[0].param_groups)
            self._lr = max(rates, default=None)
        if self._mark is None:
            self._mark = time.perf_counter()

    def _operations(self, trainer: pl.Trainer, step: int) -> float:
        """Floating-point operations of training step `step` (from 1), over all ranks."""
        total = self.tokens_per_step * self.flops_per_token
        if self.flops_per_input:
            total += sum(count * self.flops_per_input[each] for each, count in trainer.datamodule.encoded(step - 1).items())
        return total

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        step_time, self._mark = now - self._mark, now
        step = trainer.global_step
        self._tokens += self.tokens_per_step
        self._flush()
        if self._has_loss:
            loss = (outputs["loss"] if isinstance(outputs, dict) else outputs).detach()
            tokens_per_s = self.tokens_per_step / step_time
            record = {
                "step": step,
                "loss": None,
                "lr": self._lr,
                "grad_norm": self._grad_norm,
                "tokens_per_s": tokens_per_s,
                "tflops": self._operations(trainer, step) / step_time / self.num_devices / 1e12,
                "memory": hardware.peak_memory() / GIB,
                "step_time": step_time,
                "tokens": self._tokens,
                "time": time.time(),
            }
            for callback in trainer.callbacks:
                record |= getattr(callback, "figures", {})
            self._pending = record, Arriving(loss) if loss.is_cuda else loss
        if self.stop_on_nan and self._grad_norm is not None and not math.isfinite(self._grad_norm):
            self._flush(final=True)
            raise _not_finite("gradient norm", self._grad_norm, step)
        if self._pending and not isinstance(self._pending[1], Arriving):
            self._flush()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin(trainer)
        self._pause("evaluating", trainer.global_step)
        self._val_losses = []

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *unused: Any) -> None:
        if self._has_loss:
            self._val_losses.append((outputs["loss"] if isinstance(outputs, dict) else outputs).detach())

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._writes and self._val_losses:
            weights = getattr(trainer.datamodule, "val_weights", None) or [1.0] * len(self._val_losses)
            loss = sum(w * float(loss) for w, loss in zip(weights, self._val_losses, strict=True)) / sum(weights)
            ppl = math.exp(loss) if loss < 700 else math.inf
            self._write({"step": trainer.global_step, "val_loss": loss, "val_ppl": ppl, "time": time.time()})
        self._val_losses = []

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._pause("saving", trainer.global_step)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._flush(final=True)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step >= self.max_steps:
            self._set_phase("finished", trainer.global_step)
        else:
            received = next((each.received for each in trainer.callbacks if isinstance(each, StopOnSignal)), None)
            self._set_phase("stopped", trainer.global_step, signal=received.name if received else None)
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        with contextlib.suppress(Exception):  # the device is gone, or the loss is what failed: the first exception is to be told
            self._flush(final=True)
        with contextlib.suppress(Exception):
            self._close()
        if isinstance(exception, KeyboardInterrupt) or is_lost_connection(exception):
            return  # another rank knows why
        if isinstance(exception, RunError) and self._begun and not self._writes:
            return  # raised on the writing rank too
        message, step = explain(exception, self.run_dir), trainer.global_step
        again = not isinstance(exception, (RunError, UserError))
        if found := re.search("found (NaN|Inf) in local grad norm", str(exception)):  # Megatron's check_for_nan_in_grad, mid-step
            message, again = str(_not_finite("gradient", float(found[1]), step + 1)), False
        with contextlib.suppress(OSError):  # a full disk: the worker says it again when there is space
            code = getattr(exception, "exit_code", 1)
            run_folder.write_failure(self.run_dir, message, code, step, self.max_steps, started=self._started, again=again)

    # What the hooks share.

    def _begin(self, trainer: pl.Trainer) -> None:
        """Find this rank's part; the writing one drops lines of a later step than the run starts from. Once per process."""
        if self._begun:
            return
        self._begun = True
        self._has_loss, self._writes = _roles(trainer)
        step, fitting = trainer.global_step, trainer.state.fn == "fit"
        self._tokens = step * self.tokens_per_step
        if not self._writes:
            return
        if fitting:
            kept = run_folder.truncate_records(self.run_dir, step)
            self._tokens = next((r["tokens"] for r in reversed(kept) if r["step"] == step and r.get("tokens")), self._tokens)
        self._started = time.time()
        self._sinks = sinks.open_sinks(self.run_dir, step, self.tensorboard, self.wandb)

    def _watch_grad_norm(self, trainer: pl.Trainer) -> None:
        """Keep the gradient norm that Megatron's optimizer returns from a step: Lightning's logged copy costs a device sync."""
        optimizer = trainer.optimizers[0]
        step = optimizer.step

        @functools.wraps(step)
        def watched(*args: Any, **kwargs: Any) -> Any:
            result = step(*args, **kwargs)
            norm = result[1] if isinstance(result, tuple) and len(result) == 3 else None  # (loss, norm, zeros); None: skipped
            self._grad_norm = None if norm is None else float(norm)
            return result

        optimizer.step = watched

    def _pause(self, phase: str, step: int) -> None:
        """Something other than a step begins: its time is no step's."""
        self._flush(final=True)
        self._mark = None
        self._set_phase(phase, step)

    def _flush(self, final: bool = False) -> None:
        """Write the pending step if its turn has come, or in any case when `final`."""
        if self._pending is None:
            return
        record, loss = self._pending
        if record["step"] % self.log_every and not final:
            return
        self._pending = None
        record["loss"] = float(loss)
        if self._writes:
            self._write(record)
        if self.stop_on_nan and not math.isfinite(record["loss"]):
            raise _not_finite("loss", record["loss"], record["step"])

    def _write(self, record: dict[str, Any]) -> None:
        line = json.dumps(run_folder.finite(record)) + "\n"
        with open(Path(self.run_dir) / run_folder.METRICS, "a") as file:
            file.write(line)
        for sink in self._sinks:
            sink.write(record)

    def _set_phase(self, phase: str, step: int, **more: Any) -> None:
        if self._writes and phase != self._phase:
            self._phase = phase
            run_folder.write_status(self.run_dir, phase, step, self.max_steps, started=self._started, **more)

    def _close(self) -> None:
        for sink in self._sinks:
            sink.close()
        self._sinks = []


class Arriving:
    """A number of a GPU, copied to the host behind what runs there now. Reading it waits for that, not for what came after it."""

    def __init__(self, value: torch.Tensor) -> None:
        self._value = value.to("cpu", non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record()

    def __float__(self) -> float:
        self._copied.synchronize()
        return float(self._value)


def _roles(trainer: pl.Trainer) -> tuple[bool, bool]:
    """Whether this rank has the loss, and whether it is the one that writes."""
    from megatron.core import parallel_state as mpu

    if not mpu.model_parallel_is_initialized():
        return True, trainer.is_global_zero
    has_loss = mpu.is_pipeline_last_stage(ignore_virtual=True)
    first = mpu.get_data_parallel_rank(with_context_parallel=True) == 0 and mpu.get_tensor_model_parallel_rank() == 0
    return has_loss, has_loss and first


def _not_finite(what: str, value: float, step: int) -> RunError:
    return RunError(f"{what} is {value} at step {step}: lower lr=, lengthen the warm-up, look for broken data, or on_nan=skip")
