"""Status, logs, cancelling and resuming of what executor=slurm has submitted; launchers/jobs.py is the command."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launchers import folder, grammar, progress
from launchers.registry import Entry
from launchers.slurm import cluster, script
from launchers.slurm.submit import SUBMISSION, submit
from nemo_ext import run_folder
from nemo_ext.errors import UserError

if TYPE_CHECKING:
    from launchers.jobs import LogKeys

POLL_SECONDS = 2.0  # between two looks into a log that is followed
ASK_SECONDS = 15.0  # and between two questions to the cluster whether the job still runs
RUNNING = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED")


def read(entry: Entry) -> dict[str, Any]:
    """What was written down when the run was submitted. Raises UserError."""
    record = run_folder.read_json(entry.folder / script.FOLDER / SUBMISSION)
    if record is None:
        raise UserError(f"{entry.folder / script.FOLDER / SUBMISSION} cannot be read: submit the run again")
    return record


def status(entry: Entry) -> list[str]:
    """Lines about a run: its jobs, as the cluster sees them, and its training, as its folder says."""
    record = read(entry)
    jobs = cluster.queued(record["jobs"])
    lines = [f"{'run':<11} {entry.name}, {record['recipe']}", f"{'folder':<11} {entry.folder}"]
    for job in jobs:
        where = f" on {job.nodes}, {job.elapsed} so far, {job.left} left" if job.state in RUNNING else f" ({job.reason})"
        lines.append(f"{'job':<11} {job.id} {job.state.lower()}{where}")
    if not jobs:
        ends = cluster.ended(record["jobs"][-1:])
        lines += [f"{'job':<11} {job} {end.lower()}" for job, end in sorted(ends.items())]
        if not ends:
            lines.append(f"{'job':<11} {record['jobs'][-1]} is over")
    for run in map(Path, record["runs"]):
        lines.append(f"{run.name if len(record['runs']) > 1 else 'training':<11} {training(run)}")
    return lines


def training(run_dir: Path) -> str:
    """Where a run is, in a line."""
    if (summary := folder.complete(run_dir)) is not None:
        return f"complete at step {summary['steps']}; {run_dir / run_folder.SUMMARY_MD}"
    found = run_folder.read_status(run_dir)
    if found is None:
        return "not started"
    steps, evaluations = run_folder.read_records(run_dir)
    parts = [found["phase"]]
    if steps:
        parts[0] += f", step {steps[-1]['step']} of {found.get('max_steps') or '?'}"
        parts += progress.what_it_learns(steps[-1])
    if evaluations:
        last = evaluations[-1]
        parts.append(f"held-out {progress.figure(last.get('val_loss', last.get('val_reward')), '.4f')}")
    if (newest := folder.newest_checkpoint(run_dir)) is not None:
        parts.append(f"saved at step {newest[0]}")
    return "  ".join([*parts, *filter(None, [found.get("message")])])


def logs(entry: Entry, options: LogKeys) -> None:
    """Print a job's log, or that of one process of its training, and what comes to it while the job goes on."""
    record = read(entry)
    file = _log(entry, record, options)
    if not file.is_file() and not options.follow:
        raise UserError(f"{file} is not there (yet): follow=true waits for it")
    lines, at = options.lines, 0
    asked, going = float("-inf"), True
    while True:
        if options.follow and time.monotonic() - asked > ASK_SECONDS:
            asked, going = time.monotonic(), bool(cluster.queued(record["jobs"]))
        if file.is_file():
            if file.stat().st_size < at:  # begun anew
                at = 0
            with open(file, "rb") as stream:
                stream.seek(at)
                text = stream.read()
            at += len(text)
            shown = text.splitlines(keepends=True)[-lines:] if lines else [text]
            print(b"".join(shown).decode(errors="replace"), end="", flush=True)
            lines = 0
        if not (options.follow and going):
            break
        time.sleep(POLL_SECONDS)


def _log(entry: Entry, record: dict[str, Any], options: LogKeys) -> Path:
    runs = [Path(run) for run in record["runs"]]
    run = next((run for run in runs if options.point in (None, run.name)), None)
    if run is None:
        raise UserError(f"point={options.point}: the runs are {', '.join(run.name for run in runs)}")
    if options.rank is not None:
        return run / run_folder.LOGS / f"rank{options.rank}.log"
    names = [f"{job}_{runs.index(run)}.log" if len(runs) > 1 else f"{job}.log" for job in record["jobs"]]
    files = [entry.folder / script.FOLDER / name for name in names]
    return next((file for file in reversed(files) if file.is_file()), files[-1])


def cancel(entry: Entry, now: bool) -> list[str]:
    """Take waiting jobs back and end running ones: with SIGINT to their processes, which save, or `now` as SLURM does.

    A SIGTERM is the cluster's, which wants the machines for another job: the run would go on by itself.
    """
    jobs = cluster.queued(read(entry)["jobs"])
    if not jobs:
        return [f"{entry.name} has no job that waits or runs"]
    lines = []
    for job in sorted(jobs, key=lambda each: each.state in RUNNING):  # else the next of a chain starts
        polite = job.state == "RUNNING" and not now
        done = cluster.run(["scancel", *(["--signal=INT"] if polite else []), job.id])
        if done.returncode:
            raise UserError(f"scancel: {cluster.said(done)}")
        lines.append(f"job {job.id} {'saves and ends' if polite else 'is cancelled'}")
    return [*lines, f"python launchers/jobs.py resume {entry.name} continues it"]


def resume(entry: Entry, given: list[str]) -> int:
    """Submit a run again, with other keys where some are `given`: it goes on from its newest checkpoint. The exit code."""
    record = read(entry)
    changes = grammar.parse([f"recipe={record['recipe']}", "executor=slurm", *given])
    if changes.plan or changes.help:
        raise UserError("plan=true and --help are for launchers/run.py")
    own = {"name": entry.name, **record["executor_keys"], **changes.executor_keys}
    own["env"] = {**record["executor_keys"].get("env", {}), **changes.executor_keys.get("env", {})}
    command = dataclasses.replace(
        changes, keys={**record["keys"], **changes.keys}, overrides={**record["overrides"], **changes.overrides},
        executor_keys=own, sweep=record["sweep"] or changes.sweep,
    )  # fmt: skip
    with contextlib.chdir(record["where"]):  # of the paths in its keys
        return submit(command)
