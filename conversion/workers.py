"""Jobs in threads: what both directions of a conversion share."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

Progress = Callable[[int, int, str], None]
Job = Callable[[], Iterator[int]]


def run(jobs: Iterable[Job], workers: int, total: int, done: int = 0, progress: Progress | None = None) -> None:
    """Run all jobs in `workers` threads, which take them in order.

    A job is a generator that yields the bytes it has just written; `progress(done, total, "B")` follows, beginning with the
    `done` bytes of an earlier process. The first exception, a signal's too, ends every job at its next yield and is raised.
    """
    stop, counting = threading.Event(), threading.Lock()

    def work(job: Job) -> None:
        nonlocal done
        for written in () if stop.is_set() else job():
            with counting:
                done += written
                if progress and not stop.is_set():
                    progress(done, total, "B")
            if stop.is_set():
                return

    if progress:
        progress(done, total, "B")
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(work, job) for job in jobs]
        try:
            for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                future.result()
        finally:
            stop.set()
