"""executor=local: the run's processes on this machine, through torchrun."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from launchers import folder
from launchers.progress import follow
from launchers.worker import AHEAD, GO, JOB, LAUNCHER, die_with_parent
from nemo_ext import faults, run_folder
from nemo_ext.disk import write_atomic
from nemo_ext.errors import ALMOST_NOTHING, RunError, UserError, free_bytes

ROOT = Path(__file__).resolve().parents[1]
RANK_REPORT = re.compile(r"rank\s*:\s*(\d+).*?exitcode\s*:\s*(-?\d+)", re.S)
WHAT_TO_DO = re.compile("; (?:the same command|logs are in)")  # follows the cause in an error's line
# Nobody but the kernel or a person sends these; torchrun ends the other ranks with SIGTERM.
SUDDEN = (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)
POLITE = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class Ahead:
    """A run's processes that are started before its data is prepared: they import what training needs and wait for `run`.

    A context: processes that were not taken when it ends are killed.
    """

    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None
        self._ticket = ""

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *unused: object) -> None:
        _kill(self.process)

    def start(self, run_dir: Path, processes: int, threads: int) -> None:
        """Start them. `run` must be asked for as many."""
        self._ticket = f"{os.getpid()} {time.time_ns()}"
        self.process = _spawn(run_dir, processes, threads, {AHEAD: self._ticket})

    def take(self, run_dir: Path) -> subprocess.Popen | None:
        """Let them train the job that is in `run_dir` now; None where there are none (any more): new ones say why."""
        process, self.process = self.process, None
        if process is None or process.poll() is not None:
            return None
        write_atomic(run_dir / GO, self._ticket)
        return process


def run(
    run_dir: Path, processes: int, threads: int, max_steps: int, restarts: int = 0, ahead: Ahead | None = None
) -> signal.Signals | None:
    """Train the job in `run_dir` on `processes` local processes of `threads` threads each, showing progress; on those that were
    started `ahead`, where some were.

    When a process dies or hangs, all start again from the newest checkpoint, `restarts` times at most; not after a failure that
    would only come again (see `comes_again`). Each is noted in the run's faults.

    Returns None when the run is complete, or the signal that stopped it after it saved. Raises RunError when a process died,
    UserError when one refused its input.
    """
    log = run_dir / run_folder.LOGS / "torchrun.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with _forwarding() as stop:
        for number in itertools.count(1):
            try:
                return _start(run_dir, log, stop, processes, threads, max_steps, ahead)
            except RunError as error:
                if number > restarts or comes_again(run_dir):
                    raise
                _go_back(run_dir, WHAT_TO_DO.split(str(error))[0], f"restart {number} of {restarts}")


def _start(
    run_dir: Path, log: Path, stop: _Stop, processes: int, threads: int, max_steps: int, ahead: Ahead | None
) -> signal.Signals | None:
    """One start of the run's processes; returns and raises as `run` does."""
    for earlier in log.parent.glob("rank*.memory.json"):
        earlier.unlink()
    began = time.time()
    run_folder.write_status(run_dir, "starting", 0, max_steps)
    stop.process = ahead.take(run_dir) if ahead else None
    if stop.process is None:
        stop.process = _spawn(run_dir, processes, threads)
    stop.pass_on()
    try:
        code = follow(run_dir, stop.process)
    except (OSError, SystemExit):  # the terminal or the pipe is gone (rich exits then); the run is not
        code = stop.process.wait()
    status = run_folder.read_status(run_dir) or {}
    if code == 0:
        if status.get("phase") == "stopped":
            return stop.received or signal.SIGTERM  # sent to the processes themselves
        return None
    if stop.received:  # before the first step there is nothing to save
        return stop.received
    _raise_cause(run_dir, status, log, began)


def _spawn(run_dir: Path, processes: int, threads: int, more: dict[str, str] | None = None) -> subprocess.Popen:
    """Start torchrun with its workers; what it prints goes to logs/torchrun.log. `more` is added to their environment."""
    log = run_dir / run_folder.LOGS / "torchrun.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": _python_path(), "PYTHONUNBUFFERED": "1",
                   LAUNCHER: str(os.getpid()), **(more or {})}  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", *torchrun(run_dir, processes)]
    with open(log, "w") as output:
        streams = dict(stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        return subprocess.Popen(command, **streams, env=environment, cwd=ROOT, start_new_session=True, preexec_fn=die_with_parent)


def _kill(process: subprocess.Popen | None) -> None:
    """torchrun first, so that nothing reports; its workers die with it."""
    if process is not None and process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def torchrun(run_dir: Path, processes: int) -> list[str]:
    """torchrun's arguments: a worker on each of `processes` devices of this machine, which meet at a free port."""
    return ["--standalone", f"--nproc-per-node={processes}", "-m", "launchers.worker", str(run_dir)]


def comes_again(run_dir: Path) -> bool:
    """Whether the failure that status.json tells would end the next start too: a loss that is no number, a full disk."""
    status = run_folder.read_status(run_dir) or {}
    return status.get("phase") == "failed" and not status.get("again", True) or free_bytes(run_dir) < ALMOST_NOTHING


def _go_back(run_dir: Path, cause: str, which: str) -> None:
    """Let the job go on from the newest checkpoint, and say so."""
    found = folder.usable_checkpoint(run_dir)
    step = found[0] if found else 0
    job = run_folder.read_json(run_dir / JOB)
    run_folder.write_json(run_dir / JOB, {**job, "checkpoint": str(found[1]) if found else None, "resumed_from_step": step})
    faults.note(run_dir, "restart", step, cause)
    with suppress(OSError):  # the terminal is gone
        print(f"{cause}: {which}, {f'from step {step}' if found else 'from the start'}", flush=True)


class _Stop:
    """What a signal to the launcher does: the first goes to the workers, which save and end; the second kills them."""

    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None
        self.received: signal.Signals | None = None

    def __call__(self, number: int, frame: object) -> None:
        if self.received is not None:
            self.kill()
            return
        self.received = signal.Signals(number)
        with suppress(OSError):
            os.write(2, f"{self.received.name}: ending after this step, once it is saved; a second signal kills\n".encode())
        self.pass_on()

    def pass_on(self) -> None:
        """Tell the workers, or torchrun while it has none, if a signal was received."""
        if self.received is None or self.process is None:
            return
        with suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self.process.pid)
            for each in parent.children() or [parent]:
                with suppress(psutil.NoSuchProcess):
                    each.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End them now."""
        _kill(self.process)


@contextmanager
def _forwarding() -> Iterator[_Stop]:
    """While open, signals that ask to end are handled by the `_Stop` it gives; whatever still runs at the end is killed."""
    stop = _Stop()
    previous = {each: signal.signal(each, stop) for each in POLITE if signal.getsignal(each) != signal.SIG_IGN}  # nohup
    try:
        yield stop
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)
        stop.kill()


def _raise_cause(run_dir: Path, status: dict, log: Path, began: float) -> None:
    """Raise the one error that says why the start of `began` (seconds since the epoch) failed: a rank that died suddenly, what a
    rank said, or what torchrun saw."""
    where = f"logs are in {log.parent}"
    reports = _reports(log)
    for rank, code in [] if status.get("hung") else reports:  # torchrun kills a frozen rank after the others have said so
        if -code in SUDDEN:
            why = f"; {_why_killed(log.parent / f'rank{rank}.stacks', began)}" if code == -signal.SIGKILL else ""
            cause = f"rank {rank} was killed ({signal.Signals(-code).name}{why})"
            raise RunError(f"{cause}; the same command continues from the newest checkpoint; {where}")
    if status.get("phase") == "failed" and status.get("message"):
        if status.get("exit_code") == UserError.exit_code:
            raise UserError(status["message"])
        raise RunError(f"{status['message']}; {where}")
    if free_bytes(run_dir) < ALMOST_NOTHING:
        raise RunError(f"the disk is full: {run_dir}: make space, the same command continues from the newest checkpoint")
    if reports:
        rank, code = reports[0]
        cause = f"rank {rank} died ({signal.Signals(-code).name if code < 0 else f'exit code {code}'})"
    else:
        cause = "the run's processes failed"
    raise RunError(f"{cause}; {where}, the same command continues from the newest checkpoint")


def _why_killed(stacks: Path, began: float) -> str:
    """Why the kernel or a rank's monitor (nemo_ext/callbacks/rank_monitor.py) may have killed a rank."""
    with suppress(FileNotFoundError):
        found = stacks.stat()
        if found.st_size and found.st_mtime >= began:  # it could write them, and nothing else
            return f"it stood still: {stacks} has its stacks"
    return "out of memory?"


def _reports(log: Path) -> list[tuple[int, int]]:
    """(rank, exit code) of the processes that failed, the first one first, from torchrun's report."""
    _, _, report = log.read_text(errors="replace").partition("\nFailures:")
    others, _, root_cause = report.partition("Root Cause")
    return [(int(rank), int(code)) for rank, code in RANK_REPORT.findall(root_cause + others)]


def _python_path() -> str:
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
