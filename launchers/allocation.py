"""executor=allocation: one step of a job that a cluster has started, as `phase=` says.

A cluster's job does in three steps what executor=local does in one command (`launchers/run.py`): `phase=prepare` once, on one
machine; `python -m launchers.worker RUN` on every device; `phase=finish` once. The steps share the run's folder and nothing else,
and none of them needs the cluster's own commands, so that all run inside a container.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from launchers import folder, grammar
from launchers.worker import JOB, LOCK_PATIENCE
from nemo_ext import faults, run_folder
from nemo_ext.command_line import check_choice, key, keys_of
from nemo_ext.errors import RunError, UserError

PREPARE, FINISH = PHASES = ("prepare", "finish")
COMPLETE = 10  # exit code of phase=prepare where nothing is left to train
AGAIN = 75  # exit code of phase=finish where the workers failed and may start again (sysexits.h: try again later)


@dataclass
class AllocationKeys:
    """The keys of executor=allocation."""

    phase: str = key("prepare", "which step this is", choices=PHASES)
    starts_left: int = key(0, "how often the workers may start again after a failure")


class Ready(Protocol):
    """A run that is planned and prepared: `keys` are final."""

    keys: dict[str, Any]


def phase(command: grammar.Command) -> str | None:
    """The step that a command is, or None where it is a whole run on this machine. Raises UserError."""
    if command.executor != "allocation":
        return None
    field = keys_of(AllocationKeys)["phase"]
    asked = command.executor_keys.get("phase") or field.default
    check_choice("phase", asked, field)
    return asked


def complete(command: grammar.Command) -> int:
    """The exit code where nothing is left to train."""
    return COMPLETE if phase(command) == PREPARE else 0


def hold(
    command: grammar.Command, run_dir: Path, keys: dict[str, Any], *, export: Callable[[], Any], run: Callable[[], int]
) -> int:
    """`run` with the run's folder held, unless it holds a complete run: then make up for its `export`, and say so. Returns the
    exit code. Raises UserError where the folder holds another run than `keys` ask for."""
    with folder.owned(run_dir, LOCK_PATIENCE if phase(command) else 0):
        folder.check_same_run(run_dir, command, {name: value for name, value in keys.items() if value is not None})
        if (summary := folder.complete(run_dir)) is None:
            return run()
        export()
        print(f"{run_dir} is complete at step {summary['steps']}")
        show(summary)
        return complete(command)


def show(summary: dict[str, Any]) -> None:
    """Print a complete run's result."""
    from nemo_ext import report

    print("\n".join(report.terminal_lines(summary)))


def carry_out(
    command: grammar.Command,
    run_dir: Path,
    *,
    ready: Callable[[], Ready],
    hand_over: Callable[[Ready], bool],
    train: Callable[[Ready], signal.Signals | None],
    finish: Callable[[Ready], Any],
    newest: Callable[[Path], tuple[int, Path] | None] = folder.newest_checkpoint,
) -> int:
    """A run from its plan to its report, or the step of it that the command is. Returns the exit code.

    `ready` plans and prepares, quickly where that was done before; `hand_over` writes down what workers need, or says False where
    all steps are made; `train` starts workers on this machine and returns the signal that stopped them; `finish` reports;
    `newest` finds a run's newest checkpoint.
    """
    now = phase(command)

    def report(prepared: Ready) -> None:
        finish(prepared)
        if now is not None:
            _compare(run_dir.parent)

    if now == FINISH:
        try:
            stopped = outcome(run_dir, newest(run_dir))
        except RunError as error:
            if not _starts_again(command, run_dir):
                raise
            found = newest(run_dir)
            faults.note(run_dir, "restart", found[0] if found else 0, str(error))
            print(f"{error}; starting again")
            return AGAIN
        if not stopped:
            report(ready())
    else:
        prepared = ready()
        if not hand_over(prepared):
            report(prepared)
            return complete(command)
        if now == PREPARE:
            _announce(run_dir, prepared.keys["steps"])
            return 0
        stopped = train(prepared)
        if not stopped:
            report(prepared)
    if stopped:
        print(f"stopped by {stopped.name}; the same command continues {folder.place(newest(run_dir))}")
        return 128 + stopped
    return 0


def _starts_again(command: grammar.Command, run_dir: Path) -> bool:
    """Whether the workers' failure may be tried again, as the command says, and need not come again."""
    from launchers.local import comes_again

    failed = (run_folder.read_status(run_dir) or {}).get("phase") != "stopped"
    return failed and command.executor_keys.get("starts_left", 0) > 0 and not comes_again(run_dir)


def _compare(above: Path) -> None:
    """Bring the comparison of a sweep up to date, where the folder above a run's is one's."""
    from launchers import sweep

    if (above / sweep.SWEEP_JSON).is_file():
        sweep.compare(above)


def _announce(run_dir: Path, max_steps: int) -> None:
    """Say that workers start next: what an earlier start left in status.json and of its memory is not theirs."""
    for earlier in (run_dir / run_folder.LOGS).glob("rank*.memory.json"):
        earlier.unlink()
    run_folder.write_status(run_dir, "starting", 0, max_steps)


def outcome(run_dir: Path, saved: tuple[int, Path] | None) -> signal.Signals | None:
    """How the workers of this start ended, by status.json: None when all steps are made, or the signal that they stopped for.
    `saved` is the newest checkpoint, as (step, path).

    Raises what a rank said; a RunError where they ended without a word, or where a time limit left no time for a single step,
    which would be so again.
    """
    status = run_folder.read_status(run_dir) or {}
    last, where = status.get("phase"), f"logs are in {run_dir / run_folder.LOGS}"
    if last == "finished":
        return None
    if last == "failed" and status.get("message"):
        if status.get("exit_code") == UserError.exit_code:
            raise UserError(status["message"])
        raise RunError(f"{status['message']}; {where}")
    if last != "stopped":
        raise RunError(f"the run's processes ended while {last}; {where}, the same command continues from the newest checkpoint")
    number = signal.Signals[status.get("signal") or "SIGTERM"]
    found = (run_folder.read_json(run_dir / JOB) or {}).get("resumed_from_step", 0)
    if number == signal.SIGUSR1 and (saved is None or saved[0] <= found):
        raise RunError(f"the time limit left no time to train and save a step; give a longer time=; {where}")
    return number
