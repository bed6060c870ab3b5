"""A run that stands still: the stack of every process on the disk, and a word on who did not arrive."""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback

from nemo_ext import run_folder
from nemo_ext.callbacks import rank_monitor
from nemo_ext.run_folder import LOGS

SLOW = 4  # loading, the first step, evaluating and saving may take so many times as long
PATIENCE = 10  # and any other stretch so many times as long as the slowest one so far
SUSPENDED = 30  # seconds: a look that comes so much too late finds a process that was stopped and goes on
HUNG = "hung"  # in logs/: some rank has waited too long; all others write their stacks too
# Where a process is while it waits for others.
WAITING = ("/torch/distributed/", "/megatron/core/pipeline_parallel/p2p_communication.py", "/megatron/core/distributed/",
           "/megatron/core/optimizer/clip_grads.py")  # fmt: skip


class Watchdog(Callback):
    """Ends this process when it has come no further for `timeout` seconds, with its stack in logs/rankN.stacks.

    Further is: a batch, a micro batch, the optimizer's step, a batch of an evaluation, a checkpoint. A thread looks on. The first
    process that has waited too long leaves a sign in the folder, at which all others write their stacks too and say where they
    are; then each ends, and the first one writes into status.json who did not arrive (see `late`). A process that holds Python's
    lock cannot run that thread: `faulthandler`'s own, which needs no lock, writes its stack, and where nvidia-resiliency-ext is
    installed, `rank_monitor` ends it soon after `SLOW` times `timeout`: nobody else does if it is the only one, or if all do so.

    `timeout` 0 is never. A trainer that is not Lightning's calls `start`, `come` and `end`.
    """

    def __init__(self, run_dir: str, timeout: float) -> None:
        self.run_dir, self.timeout = run_dir, timeout
        self.step, self.marks, self.place = 0, 0, "loading"
        self._allowed, self._slow, self._slowest = SLOW * timeout, True, 0.0
        self._since = time.monotonic()
        self._training = False
        self._steps = 0  # of this start
        self._ended: threading.Event | None = None  # no lock before `setup`: NeMo copies its callbacks
        self._monitor: rank_monitor.RankMonitor | None = None

    @property
    def every(self) -> float:
        """Seconds between two looks."""
        return min(max(self.timeout / 20, 0.1), 10.0)

    # Hooks, in the order in which Lightning and NeMo call them.

    def setup(self, trainer, pl_module, stage) -> None:
        self.start(trainer.global_rank, trainer.world_size)

    def on_train_start(self, trainer, pl_module) -> None:
        self.step, self._training = trainer.global_step, True  # all ranks are here: an earlier start's sign is gone

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.step = trainer.global_step + 1
        self.come("reading data", slow=self._steps == 0)

    def on_megatron_microbatch_start(self, step) -> None:
        self.come("evaluating" if step.forward_only else "forward and backward", slow=step.forward_only or self._steps == 0)

    def on_megatron_step_end(self, step) -> None:
        if not step.forward_only:
            self.come("optimizer step", slow=self._steps == 0)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self._steps += 1
        self.come("end of the step")

    def on_validation_start(self, trainer, pl_module) -> None:
        self.come("evaluating", slow=True)

    def on_save_checkpoint(self, trainer, pl_module, checkpoint) -> None:
        self.come("saving", slow=True)

    def on_train_end(self, trainer, pl_module) -> None:
        self.come("ending", slow=True)

    def teardown(self, trainer, pl_module, stage) -> None:
        self.end()

    def on_exception(self, trainer, pl_module, exception) -> None:
        self.end()

    # What the hooks call.

    def start(self, rank: int, world: int) -> None:
        """Look on from now, in process `rank` of `world`."""
        if not self.timeout or self._ended is not None:
            return
        self.rank, self.world = rank, world
        (Path(self.run_dir) / LOGS).mkdir(parents=True, exist_ok=True)
        self._file(f"rank{self.rank}.hung.json").unlink(missing_ok=True)
        if self.rank == 0:
            self._file(HUNG).unlink(missing_ok=True)
        self._stacks = open(self._file(f"rank{self.rank}.stacks"), "a")
        self._monitor = rank_monitor.start(rank, SLOW * self.timeout + 4 * self.every, self.every)
        self.come("loading", slow=True)
        self._write_later(self._allowed)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def come(self, place: str, slow: bool = False) -> None:
        """This process has come to `place`, where it may stay four times as long if that is `slow`."""
        now = time.monotonic()
        if not self._slow:
            self._slowest = max(self._slowest, now - self._since)
        self.place, self.marks, self._slow = place, self.marks + 1, slow
        self._allowed = SLOW * self.timeout if slow else max(self.timeout, PATIENCE * self._slowest)
        self._since = now

    def end(self) -> None:
        """Look away: what comes now may take its time."""
        if self._ended is not None and not self._ended.is_set():
            self._ended.set()
            self._thread.join()  # it would set faulthandler's clock again
            faulthandler.cancel_dump_traceback_later()
            if self._monitor is not None:
                self._monitor.end()
            self._stacks.close()
            with suppress(OSError):
                if not (file := self._file(f"rank{self.rank}.stacks")).stat().st_size:
                    file.unlink()

    # The thread.

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self._ended.wait(self.every):
            self._beat()
            slept, looked = time.monotonic() - looked, time.monotonic()
            if slept > SUSPENDED + self.every:
                self._since += slept  # the whole process was suspended: that is no hang of its own
            left = self._allowed - (looked - self._since)
            if left <= 0 or self._training and self._file(HUNG).exists():
                return self._bark()
            self._write_later(left)

    def _write_later(self, left: float) -> None:
        """Have the stack written in `left` seconds, or before the monitor ends a process whose thread does not look any more."""
        faulthandler.dump_traceback_later(min(left, SLOW * self.timeout) + 2 * self.every, file=self._stacks)

    def _beat(self) -> None:
        """Let the monitor know that this process runs Python; one that does not answer is given up."""
        if self._monitor is not None:
            try:
                self._monitor.beat()
            except Exception as error:  # nvidia-resiliency-ext's own, which is not imported here
                print(f"nvidia-resiliency-ext's rank monitor is gone: {error}", flush=True)
                self._monitor.end()
                self._monitor = None

    def _bark(self) -> None:
        """Write the stack and the place, wait for the others to do so, say why, and end the process."""
        faulthandler.cancel_dump_traceback_later()
        with suppress(OSError):
            self._file(HUNG).touch()
            frame = sys._current_frames().get(threading.main_thread().ident)
            found = {"rank": self.rank, "step": self.step, "marks": self.marks, "place": self.place, "host": socket.gethostname(),
                     "waits": frame is not None and any(part in frame.f_code.co_filename for part in WAITING)}  # fmt: skip
            faulthandler.dump_traceback(self._stacks)
            self._stacks.flush()
            run_folder.write_json(self._file(f"rank{self.rank}.hung.json"), found)
            time.sleep(4 * self.every)
            places = [run_folder.read_json(self._file(f"rank{rank}.hung.json")) for rank in range(self.world)]
            run_folder.write_failure(self.run_dir, self._message(places), 1, self.step, hung=True)
        os._exit(1)

    def _message(self, places: list[dict[str, Any] | None]) -> str:
        stuck = f"the run stood still for {self._allowed:.0f} s at step {self.step}"
        if len(places) == 1:
            return f"{stuck} ({self.place}): {self._file('rank0.stacks')} has the stacks"
        ranks = late(places)
        stacks = f"{self._file('rank*.stacks')} has the stack of every process"
        if not ranks:
            return f"{stuck}, and no rank is behind the others: {stacks}"
        who = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks[:8]))}"
        where = (places[ranks[0]] or {}).get("place")
        return f"{stuck}: {who} did not arrive ({where or 'the process is frozen'}): {stacks}"

    def _file(self, name: str) -> Path:
        return Path(self.run_dir) / LOGS / name


def late(places: list[dict[str, Any] | None]) -> list[int]:
    """The ranks that the others wait for, from what each said of itself; none where it cannot be known.

    Those that said nothing: their process is frozen. Else those that are not inside a communication call while others are. Else
    those that have come less far than others.
    """
    silent = [rank for rank, place in enumerate(places) if place is None]
    if silent:
        return silent if len(silent) < len(places) else []
    busy = [rank for rank, place in enumerate(places) if not place["waits"]]
    if busy and len(busy) < len(places):
        return busy
    least = min((place["step"], place["marks"]) for place in places)
    behind = [rank for rank, place in enumerate(places) if (place["step"], place["marks"]) == least]
    return behind if len(behind) < len(places) else []
