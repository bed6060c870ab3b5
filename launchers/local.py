"""executor=local: the run's processes on this machine, through torchrun."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import psutil

from launchers.progress import follow
from launchers.worker import die_with_parent
from nemo_ext import run_folder
from nemo_ext.errors import RunError

ROOT = Path(__file__).resolve().parents[1]
DEAD_RANK = re.compile(r"rank\s*:\s*(\d+).*?exitcode\s*:\s*(-?\d+)", re.S)


def run(run_dir: Path, processes: int, threads: int) -> signal.Signals | None:
    """Train the job in `run_dir` on `processes` local processes of `threads` threads each, showing progress.

    Returns None when the run is complete, or the signal that stopped it after it saved. Raises RunError when a process died.
    """
    log = run_dir / run_folder.LOGS / "torchrun.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": _python_path(), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
               "-m", "launchers.worker", str(run_dir)]  # fmt: skip
    with open(log, "w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment,
                                   cwd=ROOT, start_new_session=True, preexec_fn=die_with_parent)  # fmt: skip
        with _forwarding(process) as received:
            code = follow(run_dir, process)
    status = run_folder.read_status(run_dir) or {}
    if code == 0:
        return received[0] if received and status.get("phase") != "finished" else None
    if received:  # before the first step there is nothing to save
        return received[0]
    if status.get("phase") == "failed" and status.get("message"):
        raise RunError(f"{status['message']}; logs are in {log.parent}")
    raise RunError(f"{_cause(log)}; logs are in {log.parent}, the same command continues from the newest checkpoint")


@contextmanager
def _forwarding(process: subprocess.Popen):
    """While open, SIGTERM, SIGINT and SIGUSR1 go to the workers, which save and end; a second one kills them."""
    received: list[signal.Signals] = []

    def forward(number, frame):
        received.append(signal.Signals(number))
        if len(received) > 1:
            os.killpg(process.pid, signal.SIGKILL)
            return
        for worker in psutil.Process(process.pid).children():
            worker.send_signal(signal.SIGTERM)

    previous = {s: signal.signal(s, forward) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        yield received
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def _cause(log: Path) -> str:
    """Which rank died of what, from torchrun's report."""
    text = log.read_text(errors="replace")
    found = DEAD_RANK.search(text[text.find("Root Cause") :])
    if not found:
        return "the run's processes failed"
    rank, code = int(found[1]), int(found[2])
    if code == -signal.SIGKILL:
        return f"rank {rank} was killed (SIGKILL; out of memory?)"
    return f"rank {rank} died ({signal.Signals(-code).name if code < 0 else f'exit code {code}'})"


def _python_path() -> str:
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
