"""Checkpoints that a kill at any moment cannot spoil, kept to the newest few.

A checkpoint is written under a temporary name beside its final one, flushed to disk, and renamed when every rank has written
its part: `checkpoints/step-000120` is complete or absent. Asynchronous saves rename when they are done, some steps later.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Checkpoint

from nemo_ext.run_folder import checkpoints, newest_checkpoint

PARTIAL = ".partial"


class AtomicCheckpoint(Checkpoint):
    """Saves every `every` steps, at the end and on request, keeping the newest `keep`.

    Collective: every rank calls `save`. Model, optimizer, schedule, loops and the data module's position are saved through
    the strategy as a Megatron distributed checkpoint, which loads at another layout.
    """

    def __init__(self, folder: str, every: int, keep: int, async_save: bool):
        self.folder, self.every, self.keep, self.async_save = Path(folder), every, keep, async_save
        self.saved_step = -1
        self.last_model_path = ""  # NeMo's resume sets it

    def setup(self, trainer, pl_module, stage) -> None:
        if trainer.is_global_zero:
            for leftover in self.folder.glob(f"*{PARTIAL}"):
                shutil.rmtree(leftover)
        if (found := newest_checkpoint(self.folder)) is not None:
            self.saved_step = found[0]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step % self.every == 0:
            self.save(trainer)

    def on_train_end(self, trainer, pl_module) -> None:
        self.save(trainer)

    def save(self, trainer) -> None:
        """Save the current step, unless it is saved already."""
        step = trainer.global_step
        if step == self.saved_step or not self.keep:
            return
        self.saved_step = step
        final = self.folder / f"step-{step:06d}"
        partial = final.with_name(final.name + PARTIAL)

        def publish() -> None:
            if torch.distributed.is_initialized():
                torch.distributed.barrier()
            if trainer.is_global_zero:
                flush(partial)
                os.rename(partial, final)
                flush(self.folder)
                for _, old in checkpoints(self.folder)[: -self.keep]:
                    shutil.rmtree(old)

        options = dict(finalize_fn=publish) if self.async_save else None
        trainer.save_checkpoint(partial, storage_options=options)
        if not self.async_save:
            publish()


def flush(folder: Path) -> None:
    """Flush a folder's files and entries to the disk."""
    for path in [folder, *folder.rglob("*")] if folder.name.endswith(PARTIAL) else [folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
