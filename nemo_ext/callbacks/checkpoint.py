"""Checkpoints that a kill at any moment cannot spoil, kept to the newest few.

A checkpoint is written under a temporary name beside its final one, flushed to disk, and renamed when every rank has written
its part: `checkpoints/step-000120` is complete or absent. Asynchronous saves (`nemo_ext/callbacks/staging.py`) rename when they
are done, some steps later. A list of the files and their sizes lies in it, by which the launcher knows one that was damaged
since.
"""

from __future__ import annotations

import functools
import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from lightning.pytorch.callbacks import Checkpoint

from nemo_ext.disk import sync, sync_tree
from nemo_ext.errors import RunError, free_bytes
from nemo_ext.platform.hardware import has_cuda, return_free_memory
from nemo_ext.run_folder import (
    PARTIAL,
    checkpoints,
    clear_partial,
    manifest_bytes,
    newest_checkpoint,
    remove_checkpoint,
    write_manifest,
)

GIB = 2**30


class AtomicCheckpoint(Checkpoint):
    """Saves every `every` steps, at the end and on request, keeping the newest `keep`; with `keep` 0 it saves nothing.

    Collective: every rank calls `save`. Model, optimizer, schedule, loops and the data module's position are saved through
    the strategy as a Megatron distributed checkpoint, which loads at another layout. The last step is saved after its
    evaluation, so that a run whose last checkpoint is complete has nothing left to do.

    Before each save rank 0 looks whether it will fit: as many bytes as the newest checkpoint has, or `size` before the first. If
    not, nothing is written, and every rank raises RunError: the older checkpoints stay.
    """

    def __init__(self, folder: str, every: int, keep: int, async_save: bool, size: int = 0):
        self.folder, self.every, self.keep, self.async_save, self.size = Path(folder), every, keep, async_save, size
        self.saved_step = 0  # the model as it came needs no saving
        self.last_model_path = ""  # NeMo's resume sets it
        self._calls = None  # of asynchronous saves
        self._memory: Future | None = None
        self._removal: threading.Thread | None = None

    def setup(self, trainer, pl_module, stage) -> None:
        if trainer.is_global_zero:
            clear_partial(self.folder)
        if (found := newest_checkpoint(self.folder)) is not None:
            self.saved_step = found[0]

    def on_train_start(self, trainer, pl_module) -> None:
        if not self.async_save or not self.keep:
            return
        from nemo_ext.callbacks.staging import StagedCalls

        self._calls = trainer.strategy.checkpoint_io.async_calls_queue = StagedCalls()
        optimizer = trainer.optimizers[0].mcore_optimizer
        optimizer.step = self._after_copies(optimizer.step)

    def _after_copies(self, step: Callable[[], tuple]) -> Callable[[], tuple]:
        @functools.wraps(step)
        def stepped() -> tuple:
            self._calls.staging.wait()
            return step()

        return stepped

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if self._calls is not None and has_cuda():
            if self._memory is None:  # the optimizer has its states now
                gc.collect()
                gc.freeze()  # Megatron has the collector look through everything at each save: 0.06 s
                self._memory = self._calls.prepare(expected_bytes(trainer))
                if getattr(pl_module.config, "enable_cuda_graph", False):
                    self._memory.result()  # the next step is captured, and no other thread may lock memory meanwhile
            elif self._memory.done():
                self._memory.result()  # raises where there is not enough: now, not at the first checkpoint
        if trainer.global_step % self.every == 0 and trainer.global_step < trainer.max_steps:
            self.save(trainer)

    def on_train_end(self, trainer, pl_module) -> None:
        self.save(trainer)
        self.finish(trainer)

    def finish(self, trainer) -> None:
        """Wait until the last checkpoint is complete and the older ones are gone. Collective."""
        if self.async_save:
            trainer.strategy.checkpoint_io.maybe_finalize_save_checkpoint(blocking=True)
        if self._removal is not None:
            self._removal.join()

    def on_exception(self, trainer, pl_module, exception) -> None:
        """Give back what an unfinished checkpoint takes: the disk may be full."""
        clear_partial(self.folder)

    def save(self, trainer) -> None:
        """Save the current step, unless it is saved already."""
        step = trainer.global_step
        if step == self.saved_step or not self.keep:
            return
        started = time.monotonic()
        self.finish(trainer)  # of the one before
        waited = time.monotonic() - started
        self._check_space(trainer)
        self.saved_step = step
        final = self.folder / f"step-{step:06d}"
        partial = final.with_name(final.name + PARTIAL)

        def publish() -> None:
            if torch.distributed.is_initialized():
                torch.distributed.barrier()
            if trainer.is_global_zero:
                write_manifest(partial)
                sync_tree(partial)
                os.rename(partial, final)
                sync(self.folder)
                print(f"checkpoint of step {step} is complete after {time.monotonic() - started:.1f} s", flush=True)
                self._removal = threading.Thread(target=self._remove_older)  # seconds, where they are large
                self._removal.start()

        if not has_cuda():  # else what is gathered now comes on top of the activations, which are gone
            return_free_memory()
        options = dict(finalize_fn=publish) if self.async_save else None
        with _state_taken_once(trainer.strategy):
            trainer.save_checkpoint(partial, storage_options=options)
        if self._calls is not None:
            still = time.monotonic() - started
            print(
                f"checkpoint of step {step}: training stood still for {still:.2f} s, {waited:.2f} of them for the one before and "
                f"{self._calls.seconds:.2f} to start copying",
                flush=True,
            )
        if not self.async_save:
            publish()
            self.finish(trainer)

    def _remove_older(self) -> None:
        for _, old in checkpoints(self.folder)[: -self.keep]:
            remove_checkpoint(old)

    def _check_space(self, trainer) -> None:
        """Raise RunError on every rank if the checkpoint that comes next does not fit beside what is there."""
        newest = newest_checkpoint(self.folder)
        need = newest and manifest_bytes(newest[1]) or self.size
        missing = [trainer.is_global_zero and need - free_bytes(self.folder)]
        if torch.distributed.is_initialized():
            torch.distributed.broadcast_object_list(missing, src=0)
        if missing[0] > 0:
            raise RunError(
                f"the disk is full: {self.folder.parent}: make space, the same command continues from "
                f"{f'step {newest[0]}' if newest else 'the start'}; the checkpoint of step {trainer.global_step} needs "
                f"{need / GIB:.2f} GiB, {missing[0] / GIB:.2f} more than are free"
            )


@contextmanager
def _state_taken_once(strategy: Any) -> Iterator[None]:
    """Let a save take the model's state once: Lightning takes it too, for NeMo to drop, and NeMo again for the optimizer's.

    Transformer Engine brings a layer's scales of FP8 from the GPU and pickles them each time.
    """
    model, taken = strategy.megatron_parallel, []
    whole = model.sharded_state_dict

    def once(**options: Any) -> dict:
        if not taken:
            taken.append(whole(**options))
        return taken[0]

    with mock.patch.object(model, "sharded_state_dict", once), mock.patch.object(strategy, "lightning_module_state_dict", dict):
        yield


def expected_bytes(trainer) -> int:
    """About what this process will have of a checkpoint: the optimizer's fp32 weights and two moments, and its share of the
    trained weights."""
    from megatron.core import parallel_state

    optimizer = trainer.optimizers[0].mcore_optimizer
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    states = sum(12 * parameter.numel() for part in parts for group in part.param_groups for parameter in group["params"])
    weights = sum(p.nbytes for chunk in trainer.strategy.megatron_parallel for p in chunk.parameters() if p.requires_grad)
    return states + int(1.05 * weights / parallel_state.get_data_parallel_world_size(with_context_parallel=True)) + (64 << 20)
