"""Work spread over processes that end with their parent and leave Ctrl-C to it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from nemo_ext.errors import RunError

_job: Any = None


def spread(function: Callable[[Any, Any], Any], job: Any, tasks: Iterable[Any], workers: int, name: str) -> Iterator[Any]:
    """function(job, task) of every task, in any order. `job` is pickled once to each of `workers` processes (none for 1).

    Raises RunError where a process is killed; `name` is what it worked on.
    """
    if workers <= 1:
        for task in tasks:
            yield function(job, task)
        return
    import multiprocessing

    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start, (job, os.getpid()))
    running: set[Future] = set()
    try:
        for task in tasks:
            running.add(pool.submit(_call, function, task))
            if len(running) >= 3 * workers:
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in finished)
        while running:
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in finished)
    except BrokenProcessPool:
        raise RunError(
            f"data={name}: a process that tokenises was killed, most likely for want of memory: the same command goes on where "
            "it stopped; use fewer workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start(job: Any, parent: int) -> None:
    global _job
    _job = job
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["RAYON_NUM_THREADS"] = "1"  # the processes are the parallelism
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _call(function: Callable[[Any, Any], Any], task: Any) -> Any:
    return function(_job, task)
