"""Submitting a run: checks, the batch script, sbatch, and what is written down about it.

RUN/slurm holds job.sbatch, settings.yaml (the run's keys, which the job's steps read), submission.json (job ids, executor keys,
the command) and a log of each job. The name of a run is kept in the user's state folder (`launchers/registry.py`).
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from launchers import folder, registry, submission
from launchers.grammar import Command
from launchers.prepare import cache_folder
from launchers.slurm import cluster, keys, script
from launchers.slurm.keys import SlurmKeys
from launchers.submission import NEMO_RL, Submission
from nemo_ext import run_folder
from nemo_ext.disk import write_atomic
from nemo_ext.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SUBMISSION = "submission.json"


def submit(command: Command) -> int:
    """Submit the run, or each point of a sweep, that a command describes. Returns the exit code."""
    own, machine = keys.build(command.executor_keys)
    offline = command.dryrun or command.plan
    partition = None if offline else cluster.choose(own, cluster.partitions())
    if partition is not None and partition.gpus and command.keys.get("device") != "cpu":
        machine = {"gpus": partition.gpus, **machine}
    command = submission.with_defaults(command, machine)
    points = _points(command)
    first = points[0]
    if command.plan:
        if not first.lines:
            raise UserError("planning for a cluster's GPUs: give gpu= (such as h100) or gpu_memory= in GiB, or let site= say it")
        print("\n".join(first.lines))
        return 0
    own = dataclasses.replace(own, name=own.name or _name(_home(command, points)), container=_image(own.container))
    gpus = first.keys["gpus"] if first.keys["device"] == "gpu" else 0
    if partition is not None:
        cluster.check(own, partition, nodes=first.keys["nodes"], processes=first.processes, gpus=gpus)
        cluster.check_account(own.account)
    job = _job(own, points, _home(command, points), gpus, offline)
    text = _render(job, first)
    if command.dryrun:
        print(text, end="")
        return 0
    return _send(command, own, points, job, text)


def _points(command: Command) -> list[Submission]:
    """The runs to submit: one, or a sweep's, whose jobs are alike in what they ask of the cluster."""
    shared = not (command.dryrun or command.plan)
    if not command.sweep:
        return [submission.describe(command, shared=shared)]
    from launchers import sweep

    expanded = sweep.expand(command)
    if changed := next((name for name in command.sweep if name in keys.keys_of(SlurmKeys)), None):
        raise UserError(f"sweep.{changed}: the jobs of an array are alike: a command for each {changed}=")
    points = [submission.describe(point.command, shared=shared) for point in expanded]
    for name in ("nodes", "gpus", "device", "engine", "nemo_rl_version", "restarts"):
        if len({point.keys.get(name) for point in points}) > 1:
            raise UserError(f"sweep.{name}: the jobs of an array are alike: a command for each {name}=")
    return points


def _home(command: Command, points: list[Submission]) -> Path:
    """The folder that the job belongs to: the run's, or the sweep's."""
    return points[0].run_dir.parent if command.sweep else points[0].run_dir


def _name(home: Path) -> str:
    """A job's name from a folder's."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", home.name).strip("-.") or "run"


def _job(own: SlurmKeys, points: list[Submission], home: Path, gpus: int, offline: bool) -> script.Job:
    """What the script is rendered from. Raises UserError for a container that does not run here, or a mount that is missing."""
    first = points[0]
    if first.engine == NEMO_RL:
        from launchers.slurm import ray

        own = ray.settle(own, first.keys["nemo_rl_version"])
    runtime = _runtime(own, offline)
    project = Path(own.project).expanduser() if own.project else ROOT
    python = os.path.expanduser(own.python) if own.python else "python" if runtime else sys.executable
    if runtime is None and not offline and shutil.which(python) is None:
        raise UserError(f"python={python}: there is no such program")
    runs = tuple(point.run_dir for point in points)
    cache = cache_folder().absolute()
    mounts = _mounts(own, [*([] if own.project else [ROOT]), home, cache, *(path for point in points for path in point.paths())])
    return script.Job(
        keys=own, name=own.name, runs=runs, folder=home / script.FOLDER, nodes=first.keys["nodes"], processes=first.processes,
        gpus=gpus, project=project, python=python, cache=cache, runtime=runtime, mounts=mounts if runtime else (),
        requeue=own.requeue if own.requeue is not None else own.chain == 1, restarts=first.keys.get("restarts", 0),
    )  # fmt: skip


def _render(job: script.Job, first: Submission) -> str:
    if first.engine == NEMO_RL:
        from launchers.slurm import ray

        return ray.render(job, first.keys["nemo_rl_version"])
    return script.render(job)


def _image(container: str | None) -> str | None:
    """A container's image, as an absolute path where it is a file."""
    is_file = container is not None and (container.endswith((".sif", ".sqsh")) or container.startswith(("/", ".", "~")))
    return str(Path(container).expanduser().absolute()) if is_file else container


def _runtime(own: SlurmKeys, offline: bool) -> str | None:
    """What runs the container, by the image and by what the cluster has."""
    if own.container is None:
        return None
    if own.container.startswith("/") and not offline and not Path(own.container).exists():
        raise UserError(f"container={own.container}: there is no such file")
    if own.runtime:
        return own.runtime
    if own.container.endswith(".sif"):
        return script.APPTAINER
    if offline or cluster.has_pyxis():
        return script.PYXIS
    if shutil.which("apptainer") is None:
        raise UserError(
            f"container={own.container}: this cluster has neither pyxis nor apptainer: leave it out to use this Python"
        )
    return script.APPTAINER


def _mounts(own: SlurmKeys, needed: list[Path]) -> tuple[tuple[str, str], ...]:
    """(outside, inside) of what the container sees: what is needed, under its own path, and what `mounts=` names."""
    mounts: dict[str, str] = {}
    for text in keys.texts("mounts", own.mounts):
        outside, _, inside = text.partition(":")
        path = Path(outside).expanduser()
        if not path.exists():
            raise UserError(f"mounts={text}: there is no {outside} here")
        mounts[str(path.absolute())] = inside or str(path.absolute())
    for path in sorted(set(needed), key=lambda each: len(each.parts)):
        place = path.parent if path.is_file() else path
        if not any(outside == inside and place.is_relative_to(outside) for outside, inside in mounts.items()):
            mounts[str(place)] = str(place)
    return tuple(mounts.items())


def _send(command: Command, own: SlurmKeys, points: list[Submission], job: script.Job, text: str) -> int:
    """Write the files and call sbatch, as often as the chain is long. The folder is held meanwhile."""
    home = job.folder.parent
    registry.refuse_other(own.name, home)
    _refuse_active(home)
    with folder.owned(home):
        summaries = [point.check_folder() for point in points]
        if all(summaries):
            what = f"is complete at step {summaries[0]['steps']}" if len(points) == 1 else f"has {len(points)} complete runs"
            print(f"{home} {what}")
            return 0
        if command.sweep:
            from launchers import sweep

            sweep.begin(command, sweep.expand(command))
        for point in points:
            write_atomic(point.run_dir / script.FOLDER / script.SETTINGS, point.settings_text())
        job.cache.mkdir(parents=True, exist_ok=True)  # a container's mount must be there
        file = job.folder / script.SCRIPT
        write_atomic(file, text)
        jobs: list[str] = []
        try:
            for _ in range(own.chain):
                jobs.append(_sbatch(file, jobs[-1:]))
        finally:
            if jobs:
                _record(command, own, points, home, jobs)
    what = f"job {jobs[0]}" if len(jobs) == 1 else f"jobs {jobs[0]} to {jobs[-1]}, one after the other"
    array = f", an array of {len(points)} points" if len(points) > 1 else ""
    for line in points[0].lines[:2]:
        print(line)
    print(f"submitted {own.name} as {what}{array}; python launchers/jobs.py status {own.name}")
    return 0


def _refuse_active(home: Path) -> None:
    """Refuse a folder whose last submission waits or runs. Raises UserError."""
    record = run_folder.read_json(home / script.FOLDER / SUBMISSION) or {}
    active = cluster.queued(record.get("jobs", []))
    if active:
        what = ", ".join(f"job {job.id} is {job.state.lower()}" for job in active[:3])
        raise UserError(f"out={home}: {what}; python launchers/jobs.py cancel {record['name']} ends it")


def _sbatch(file: Path, after: list[str]) -> str:
    """Submit the script, to run after the job `after` has ended however; the new job's id. Raises UserError."""
    dependency = [f"--dependency=afterany:{job}" for job in after]
    done = cluster.run(["sbatch", "--parsable", *dependency, str(file)])
    if done.returncode:
        raise UserError(f"sbatch refused the job: {cluster.said(done)}; the script is {file}")
    return done.stdout.strip().splitlines()[-1].partition(";")[0]


def _record(command: Command, own: SlurmKeys, points: list[Submission], home: Path, jobs: list[str]) -> None:
    file = home / script.FOLDER / SUBMISSION
    earlier = (run_folder.read_json(file) or {}).get("jobs", [])
    record: dict[str, Any] = {
        "executor": "slurm", "name": own.name, "jobs": [*earlier, *jobs], "submitted": time.time(),
        "runs": [str(point.run_dir) for point in points], "where": str(Path.cwd()), "executor_keys": command.executor_keys,
        "recipe": command.recipe, "keys": command.keys, "overrides": command.overrides, "sweep": command.sweep,
    }  # fmt: skip
    run_folder.write_json(file, record)
    registry.enter(own.name, "slurm", home)
