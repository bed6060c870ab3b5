"""Submitted runs by their names.

python launchers/jobs.py                                   lists them
python launchers/jobs.py status NAME                       where its jobs and its training are
python launchers/jobs.py logs NAME rank=3 follow=true      what the job, or a process of it, prints
python launchers/jobs.py cancel NAME                       lets it save and ends it; now=true does not wait
python launchers/jobs.py resume NAME time=8:00:00          submits it again, with other keys where they are given

Exit codes: 0 done, 2 bad input, 130 after Ctrl-C.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launchers import registry
from nemo_ext.command_line import HELP, NO_DEFAULT, ending, key, parse
from nemo_ext.errors import UserError

ACTIONS = ("status", "logs", "cancel", "resume")
EXAMPLE = "python launchers/jobs.py status NAME"


@dataclass
class LogKeys:
    """The keys of `logs`."""

    name: str = key(NO_DEFAULT, "the run")
    rank: int | None = key(None, "process whose own log it is", auto="the job's log")
    point: str | None = key(None, "run of a sweep, by its folder's name", auto="the first")
    lines: int = key(40, "last lines to begin with; 0 is all")
    follow: bool = key(False, "go on until the job ends")


@dataclass
class CancelKeys:
    """The keys of `cancel`."""

    name: str = key(NO_DEFAULT, "the run")
    now: bool = key(False, "end it at once, without saving")


@dataclass
class StatusKeys:
    """The keys of `status`."""

    name: str = key(NO_DEFAULT, "the run")


def main(arguments: list[str]) -> int:
    with ending("debug=true" in arguments, "the job goes on") as end:
        arguments = [each for each in arguments if not each.startswith("debug=")]
        if not arguments:
            show_all()
        elif arguments[0] in HELP:
            print(__doc__.strip())
        else:
            end.code = act(*arguments)
    return end.code


def act(action: str, *rest: str) -> int:
    """Do `action` to the run that `rest` names first. Returns the exit code; raises UserError."""
    if action not in ACTIONS:
        raise UserError(f"{action} is none of {', '.join(ACTIONS)} (for example: {EXAMPLE})")
    if not rest or "=" in rest[0]:
        raise UserError(f"{action} needs a run's name (for example: python launchers/jobs.py {action} NAME)")
    name, given = rest[0], list(rest[1:])
    entry = registry.find(name)
    module = importlib.import_module(f"launchers.{entry.executor}.jobs")
    if action == "resume":
        return module.resume(entry, given)
    schema = {"status": StatusKeys, "logs": LogKeys, "cancel": CancelKeys}[action]
    options = parse(schema, [f'name="{name}"', *given], EXAMPLE)
    if action == "status":
        print("\n".join(module.status(entry)))
    elif action == "logs":
        module.logs(entry, options)
    else:
        print("\n".join(module.cancel(entry, options.now)))
    return 0


def show_all() -> None:
    """A line for each submitted run."""
    entries = registry.entries()
    if not entries:
        print("no run has been submitted from here (launchers/run.py with executor=slurm or executor=k8s does that)")
    width = max((len(entry.name) for entry in entries), default=0)
    for entry in entries:
        print(f"{entry.name:<{width}}  {entry.executor:<6}  {entry.folder}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
