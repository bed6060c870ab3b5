"""A polite end: SIGTERM, SIGINT or SIGUSR1 lets the step finish, saves, and ends the run."""

from __future__ import annotations

import signal

import torch
from lightning.pytorch.callbacks import Callback

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopOnSignal(Callback):
    """Stops after the step in which any rank got a signal; all ranks agree, so that all save the same step.

    Agreement costs one all-reduce of a byte a step on the gloo group, which runs on the host and waits for no GPU work.
    """

    def __init__(self):
        self.received: signal.Signals | None = None
        self.group = None

    def setup(self, trainer, pl_module, stage) -> None:
        self._listen()

    def on_train_start(self, trainer, pl_module) -> None:
        self._listen()  # since `setup` Lightning has put a SIGTERM handler of its own, which raises before anything is saved
        trainer._signal_connector.received_sigterm = False
        self.group = torch.distributed.new_group(backend="gloo")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        flag = torch.tensor([self.received is not None], dtype=torch.uint8)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX, group=self.group)
        if flag.item():
            self.received = self.received or signal.SIGTERM
            trainer.should_stop = True

    def _listen(self) -> None:
        for each in SIGNALS:
            signal.signal(each, self._note)

    def _note(self, number, frame) -> None:
        self.received = signal.Signals(number)
