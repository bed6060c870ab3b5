"""Steps of the embedded engine whose loss or gradient is no number. Import after `nemo_ext.platform.activate()`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from nemo_ext import faults, run_folder
from nemo_ext.errors import RunError

IN_A_ROW = 5  # bad steps one after the other: it is not the answers


class BadSteps(TrainerCallback):
    """Keeps them out as `nemo_ext/callbacks/guard.py` does in other runs: with `on_nan` "skip" no update is applied, and schedule
    and problems go on; with "rollback" weights and Adam's states are also those of the newest checkpoint again. After
    `IN_A_ROW` of them one after the other it raises RunError, as at the first where there is no checkpoint to go back to.

    Not for "stop", which the trainer does by itself.
    """

    def __init__(self, trainer: Any, run_dir: Path, on_nan: str) -> None:
        self.trainer, self.run_dir, self.on_nan = trainer, run_dir, on_nan
        self.in_a_row, self.bad = 0, False

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        self.bad = self.trainer.lost or not all(bool(gradient.isfinite().all()) for gradient in gradients)
        if not self.bad:
            self.in_a_row = 0
            return
        self.in_a_row, step = self.in_a_row + 1, state.global_step + 1
        if self.in_a_row == IN_A_ROW:
            raise RunError(f"step {step} is the {IN_A_ROW}th in a row whose loss or gradient is no number: lower lr=")
        optimizer.zero_grad(set_to_none=True)  # which leaves Adam nothing to do
        self.trainer.lost = False
        self.trainer.figures |= {"loss": None, "grad_norm": None, "skipped": True}
        if self.on_nan == "skip":
            faults.note(self.run_dir, "skip", step, f"step {step} is not applied: its loss or gradient is no number")

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        if not self.bad or self.on_nan != "rollback":
            return
        step, found = state.global_step, run_folder.newest_checkpoint(Path(args.output_dir))
        if found is None:
            raise RunError(f"step {step} is bad and there is no checkpoint to roll back to: lower every=, or use skip")
        rates = [group["lr"] for group in optimizer.param_groups]  # the schedule has set the next step's
        self.trainer._load_from_checkpoint(str(found[1]))
        optimizer.load_state_dict(torch.load(found[1] / "optimizer.pt", map_location="cpu", weights_only=True))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        message = f"step {step} is bad: weights and optimizer are those of step {found[0]} again"
        faults.note(self.run_dir, "rollback", step, message, to=found[0])
