"""What Megatron's checkpoint writers report, passed on as bytes.

Megatron keeps the reports in a queue that a process of its own serves. That process starts without torch, and imports it, for
seconds of every rank's first checkpoint, only to unpickle what it hands on. And it may start because a job is about to end: a
cluster's signals, which go to every process, would end it before it can ignore them, and with it the last checkpoint.
"""

from __future__ import annotations

import functools
import pickle
import signal
from multiprocessing import resource_tracker
from typing import Any

from nemo_ext.signals import SIGNALS


class PickledQueue:
    """The two ends of a manager's queue that Megatron uses; what its server sees is bytes."""

    def __init__(self, queue: Any) -> None:
        self.queue = queue

    def put(self, item: Any) -> None:
        self.queue.put(pickle.dumps(item))

    def get_nowait(self) -> Any:
        """The oldest item; raises queue.Empty where there is none."""
        return pickle.loads(self.queue.get_nowait())


def install() -> None:
    """Give Megatron's writers such a queue, in this process."""
    import megatron.core.dist_checkpointing.strategies.filesystem_async as writers

    upstream = writers._get_write_results_queue

    @functools.cache
    def queue() -> PickledQueue:
        resource_tracker.ensure_running()  # starting, it would take signals out of the mask that the new process inherits
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            return PickledQueue(upstream())
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    writers._get_write_results_queue = queue
