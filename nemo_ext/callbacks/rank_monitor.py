"""nvidia-resiliency-ext's rank monitor, where it is installed: a process beside this one that ends it when it runs no Python."""

from __future__ import annotations

import atexit
import importlib.util
import multiprocessing
import os
import signal
import tempfile
from pathlib import Path
from unittest import mock

from nemo_ext.signals import SIGNALS

# seconds. The monitor's look at the GPUs' health is of all that the machine has, and any error of NVML counts as illness
NEVER = 1e9
START_SECONDS = 20.0  # in which a monitor must be there; it takes a few hundredths of one
ANSWER_SECONDS = 10.0  # a monitor that does not answer within is given up: it must not hold up the thread that calls it


class RankMonitor:
    """Ends this process (SIGCONT, then SIGKILL) when it has not called `beat` for `patience` seconds, looking every `every`.

    What a thread cannot do for its own process: one that holds Python's lock, or is stopped, runs no thread that could end it.
    nvidia-resiliency-ext's launcher starts such a monitor for each rank; here the rank forks it, so that torchrun, srun and pods
    start workers as ever. That takes a few hundredths of a second, and memory only for what either of them changes. Signals that
    ask a run to save and end, which SLURM sends to every process of a step, do not reach the monitor.

    Raises what nvidia-resiliency-ext raises where it does not start.
    """

    def __init__(self, rank: int, patience: float, every: float) -> None:
        from nvidia_resiliency_ext.fault_tolerance import FaultToleranceConfig, RankMonitorClient, RankMonitorServer

        config = FaultToleranceConfig(
            workload_check_interval=every,
            initial_rank_heartbeat_timeout=patience,
            rank_heartbeat_timeout=patience,
            node_health_check_interval=NEVER,
            enable_nic_monitor=False,
        )
        self._client = RankMonitorClient()
        with tempfile.TemporaryDirectory(prefix="rank-monitor-", dir=_folder()) as folder:  # nobody looks for it once connected
            socket = str(Path(folder) / "rank")
            blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            try:
                patience_to_start = mock.patch.object(RankMonitorServer, "RANK_MONITOR_INIT_TIMEOUT", START_SECONDS)
                with mock.patch.object(tempfile, "tempdir", folder), patience_to_start:
                    context = multiprocessing.get_context("fork")
                    self._process = RankMonitorServer.run_in_subprocess(config, socket, mp_ctx=context)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            atexit.register(self.end)  # multiprocessing would send SIGTERM at the end, and wait
            with mock.patch.dict(os.environ, FT_RANK_MONITOR_IPC_SOCKET=socket, RANK=str(rank)):
                self._client.init_workload_monitoring()
        self._client.rank_monitor_socket.settimeout(ANSWER_SECONDS)

    def beat(self) -> None:
        """Say that this process runs, in a third of a millisecond. Raises RankMonitorClientError where nobody listens."""
        self._client.send_heartbeat()

    def end(self) -> None:
        """Watch no more."""
        atexit.unregister(self.end)
        self._process.kill()
        self._process.join()


def _folder() -> str:
    """Where sockets may lie: a socket's path has at most 107 bytes, of which the monitor's own names take up to 64."""
    return tempfile.gettempdir() if len(os.fsencode(tempfile.gettempdir())) <= 40 else "/tmp"


def start(rank: int, patience: float, every: float) -> RankMonitor | None:
    """A monitor of this process; None where nvidia-resiliency-ext is not installed or, with a line in the log, does not work."""
    if importlib.util.find_spec("nvidia_resiliency_ext") is None:
        return None
    try:
        return RankMonitor(rank, patience, every)
    except Exception as error:
        print(f"the run goes on without nvidia-resiliency-ext's rank monitor: {error}", flush=True)
        return None
