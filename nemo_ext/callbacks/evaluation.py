"""Evaluation on held-out text before the first step, every so often, and after the last."""

from __future__ import annotations

from lightning.pytorch.callbacks import Callback


class Evaluation(Callback):
    """Runs Lightning's validation loop at step 0, every `every` steps and at the end; the trainer's own schedule is off.

    Lightning's sanity check cannot be used for the evaluation before training: NeMo switches it off under pipeline parallelism.
    """

    def __init__(self, every: int):
        self.every = every
        self.evaluated_step = -1

    def on_train_start(self, trainer, pl_module) -> None:
        if trainer.global_step == 0 and not trainer.should_stop:
            self.evaluate(trainer)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step % self.every == 0 and trainer.global_step < trainer.max_steps:
            self.evaluate(trainer)

    def on_train_end(self, trainer, pl_module) -> None:
        if trainer.global_step >= trainer.max_steps:
            self.evaluate(trainer)

    def evaluate(self, trainer) -> None:
        """One pass over the held-out batches, at most once a step; nothing where no document was held out."""
        if trainer.global_step == self.evaluated_step or not trainer.datamodule.has_heldout:
            return
        self.evaluated_step = trainer.global_step
        connector = trainer._logger_connector
        first_loop_iter = connector._first_loop_iter  # the training loop's, which the validation loop overwrites
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.run()
        trainer.training = True
        connector._first_loop_iter = first_loop_iter
