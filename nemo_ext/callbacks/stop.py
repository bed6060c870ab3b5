"""A polite end: SIGUSR1, SIGTERM or SIGINT lets the step finish, saves, and ends the run."""

from __future__ import annotations

import signal

import torch
from lightning.pytorch.callbacks import Callback

from nemo_ext.signals import SIGNALS, decisive


class StopOnSignal(Callback):
    """Stops after the step in which any rank got a signal; all ranks agree, so that all save the same step.

    Agreement costs one all-reduce of four bytes a step on the gloo group, which runs on the host and waits for no GPU work. The
    signal itself is agreed on (`received`), because a cluster lets the run go on by itself after SIGUSR1 and SIGTERM, and not
    after SIGINT. A signal that came while the process started, when the worker blocks it, ends the run before its first step.
    """

    def __init__(self):
        self.received: signal.Signals | None = None
        self.group = None

    def setup(self, trainer, pl_module, stage) -> None:
        self._listen()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def on_train_start(self, trainer, pl_module) -> None:
        self._listen()  # since `setup` Lightning has put a SIGTERM handler of its own, which raises before anything is saved
        trainer._signal_connector.received_sigterm = False
        self.group = torch.distributed.new_group(backend="gloo")
        self._agree(trainer)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self._agree(trainer)

    def _agree(self, trainer) -> None:
        """Stop everywhere if any rank was told to."""
        place = torch.tensor([SIGNALS.index(self.received) if self.received else -1], dtype=torch.int32)
        torch.distributed.all_reduce(place, op=torch.distributed.ReduceOp.MAX, group=self.group)
        if place.item() >= 0:
            self.received = SIGNALS[place.item()]
            trainer.should_stop = True

    def _listen(self) -> None:
        for each in SIGNALS:
            signal.signal(each, self._note)

    def _note(self, number, frame) -> None:
        self.received = decisive([number] if self.received is None else [self.received, number])
