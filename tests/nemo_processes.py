"""Groups of processes that have NeMo imported when they start.

A server imports it, once for each process of pytest, does nothing else, and forks. So each group is as fresh as one that torchrun
starts, with the same environment, but without the ten seconds of imports of every process.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from unittest import mock

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["nemo_imported"])


def run_group(processes: int, function: Callable[..., None], *arguments: object, log: Path, seconds: float = 500) -> None:
    """Call `function(*arguments)` in each of `processes` processes, which find each other as torchrun's do; wait for them.

    What they print goes to `log`. Raises AssertionError with its end where one of them fails, ten seconds later at the most, or
    is not done in time.
    """
    import torch

    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # torchrun's part
    shared = dict(WORLD_SIZE=processes, LOCAL_WORLD_SIZE=processes, MASTER_ADDR="127.0.0.1", MASTER_PORT=store.port,
                  TORCHELASTIC_RUN_ID="tests", TORCHELASTIC_USE_AGENT_STORE=True, TORCHELASTIC_RESTART_COUNT=0)  # fmt: skip
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):  # which the server is not told otherwise
        ensure_running()
    log.touch()
    group = []
    try:
        for rank in range(processes):
            environment = {name: str(value) for name, value in dict(shared, RANK=rank, LOCAL_RANK=rank).items()}
            group.append(FORKS.Process(target=_call, args=(environment, log, function, arguments)))
            group[-1].start()
        end = time.monotonic() + seconds
        running = list(group)
        while running and wait([each.sentinel for each in running], max(0, end - time.monotonic())):
            running = [each for each in running if each.exitcode is None]
            if any(each.exitcode for each in group):
                end = min(end, time.monotonic() + 10)  # the others may have something to say too
        codes = [each.exitcode for each in group]
        assert not any(codes) and not running, f"exit codes {codes}: {log.read_text(errors='replace')[-6000:]}"
    finally:
        for each in group:
            if each.is_alive():
                each.kill()
            each.join()


def _call(environment: dict[str, str], log: Path, function: Callable[..., None], arguments: tuple) -> None:
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(output, stream.fileno())
    try:
        assert "nemo_imported" in sys.modules, "the server could not import it, and said nothing"
        function(*arguments)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # threads of libraries may wait for processes that are gone
