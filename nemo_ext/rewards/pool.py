"""Worker processes that score answers: started once, used by any thread, replaced when an answer makes one hang or die."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_ext.errors import RunError
from nemo_ext.rewards import worker
from nemo_ext.rewards.worker import Job

GRACE = 30.0  # seconds that a worker may take beyond an answer's limit before it is given up itself
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Outcome:
    """The values of a task, numbers or texts as its job has it, or why there are none."""

    values: list | None
    error: str = ""


class Pool:
    """`size` workers of a job, started when first used. They end with this process, however it ends."""

    def __init__(self, job: Job, size: int) -> None:
        self.job = job
        self.size = size
        self._idle: queue.SimpleQueue[_Worker | None] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(size, "reward")
        self._started: weakref.WeakSet[_Worker] = weakref.WeakSet()
        self._lock = threading.Lock()
        for _ in range(size):
            self._idle.put(None)

    def map(self, tasks: Sequence[tuple[list[str], list[dict[str, Any]]]], timeout: float) -> list[Outcome]:
        """The outcome of each (answers, rows), in order, none of which may take more than `timeout` seconds.

        Raises RunError where a worker cannot be started.
        """
        return list(self._threads.map(lambda task: self._one(task, timeout), tasks))

    def start(self) -> None:
        """Start every worker and wait until all are ready."""
        taken = [self._idle.get() or self._worker() for _ in range(self.size)]
        try:
            for each in taken:
                each.wait_ready()
        finally:
            for each in taken:
                self._idle.put(each if each.alive else None)

    def close(self) -> None:
        """End the workers."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for each in list(self._started):
            each.kill()

    def _one(self, task: tuple[list[str], list[dict[str, Any]]], timeout: float) -> Outcome:
        worker_ = self._idle.get() or self._worker()
        try:
            return worker_.ask(task, timeout)
        finally:
            self._idle.put(worker_ if worker_.alive else None)

    def _worker(self) -> _Worker:
        new = _Worker(self.job)
        with self._lock:
            self._started.add(new)
        return new


class _Worker:
    """The keeper process of worker.py, from outside."""

    def __init__(self, job: Job) -> None:
        environment = os.environ | job.settings
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from nemo_ext.rewards import worker; worker.main()"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, start_new_session=True,
        )  # fmt: skip
        self._in, self._out = self._process.stdin.fileno(), self._process.stdout.fileno()
        self._waiting = True
        self.alive = True
        worker.send(self._in, pickle.dumps(job))

    def wait_ready(self) -> None:
        """Raises RunError where the scoring process could not get ready."""
        if not self._waiting:
            return
        try:
            said = json.loads(worker.receive(self._out, time.monotonic() + worker.LOADING + GRACE)[1])
        except (EOFError, TimeoutError, OSError):
            said = {"error": "ended before it was ready"}
        self._waiting = False
        if "error" in said:
            self.kill()
            raise RunError(f"a process that scores answers could not start: {said['error']}")

    def ask(self, task: Any, timeout: float) -> Outcome:
        """The outcome of one task."""
        self.wait_ready()
        try:
            worker.send(self._in, pickle.dumps(task), timeout)
            said = json.loads(worker.receive(self._out, time.monotonic() + timeout + worker.LOADING + GRACE)[1])
        except (EOFError, TimeoutError, OSError):
            self.kill()
            return Outcome(None, "the process that scores ended")
        values = said.get("values")
        if values is None:
            return Outcome(None, said["error"])
        return Outcome(values)

    def kill(self) -> None:
        """End the process; its scoring process ends with it."""
        self.alive = False
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()
