"""What a cluster says of itself through SLURM's commands, and whether a job fits it.

check(keys, nodes=2, processes=8, gpus=8)    # UserError before anything is submitted
"""

from __future__ import annotations

import difflib
import getpass
import re
import shutil
import subprocess
from dataclasses import dataclass

from launchers.slurm.keys import SlurmKeys, seconds
from nemo_ext.errors import UserError

PATIENCE = 60.0  # seconds for a command of SLURM's
GPUS = re.compile(r"gpu:(?:[^:,()]+:)?(\d+)")


@dataclass(frozen=True)
class Partition:
    """A partition, of all kinds of machines in it: how many, and the most cores and GPUs that one has."""

    name: str
    default: bool
    up: bool
    limit: int | None  # seconds, None for no limit
    nodes: int
    cpus: int
    gpus: int


def run(command: list[str]) -> subprocess.CompletedProcess:
    """Run a command of SLURM's. Raises UserError where it is not on the path or does not answer."""
    if shutil.which(command[0]) is None:
        raise UserError(
            f"executor=slurm: {command[0]} is not on the path: start this on a login node; dryrun=true prints the script"
        )
    try:
        return subprocess.run(command, text=True, capture_output=True, timeout=PATIENCE, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]} has not answered in {PATIENCE:.0f} seconds: is the cluster's controller up?") from None


def said(done: subprocess.CompletedProcess) -> str:
    """What a command that failed said, in one line."""
    text = " ".join((done.stderr or done.stdout).split())
    parts = re.split(rf"\s*\b{re.escape(done.args[0])}: (?:(?:error|fatal): )?", text)  # each message begins so
    return "; ".join(filter(None, parts))[:300] or f"exit code {done.returncode}"


def partitions() -> list[Partition]:
    """The cluster's partitions, by sinfo. Raises UserError where it does not answer."""
    done = run(["sinfo", "--noheader", "--format=%P|%a|%l|%D|%c|%G"])
    if done.returncode:
        raise UserError(f"sinfo: {said(done)}: is this a machine of the cluster, and its controller up?")
    return parse(done.stdout)


def parse(text: str) -> list[Partition]:
    """sinfo's lines, of which a partition has one for each kind of its machines."""
    found: dict[str, Partition] = {}
    for line in text.splitlines():
        if line.count("|") != 5:
            continue
        name, up, limit, nodes, cpus, gres = line.strip().split("|")
        gpus = sum(int(count) for count in GPUS.findall(gres))
        name, default = name.removesuffix("*"), name.endswith("*")
        count, cores = int(nodes), int(cpus.rstrip("+"))
        if (other := found.get(name)) is not None:
            count, cores, gpus = count + other.nodes, max(cores, other.cpus), max(gpus, other.gpus)
        found[name] = Partition(name, default, up == "up", seconds("limit", limit), count, cores, gpus)
    return list(found.values())


def choose(keys: SlurmKeys, known: list[Partition]) -> Partition:
    """The partition that a job goes to. Raises UserError for one that the cluster lacks, or that is down."""
    names = [partition.name for partition in known]
    if keys.partition is None:
        chosen = next((partition for partition in known if partition.default), None)
        if chosen is None:
            raise UserError(f"partition= is missing: the cluster has no default one; it has {', '.join(names)}")
    else:
        wanted = keys.partition.split(",")
        for name in wanted:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(names)}"
                raise UserError(f"partition={name}: the cluster has no such partition, {hint}")
        chosen = next(partition for partition in known if partition.name == wanted[0])
    if not chosen.up:
        raise UserError(f"partition={chosen.name} is down")
    return chosen


def check(keys: SlurmKeys, partition: Partition, *, nodes: int, processes: int, gpus: int) -> None:
    """Refuse a job that the partition can never run; `processes` and `gpus` are of a machine. Raises UserError."""
    name = f"partition {partition.name}"
    if nodes > partition.nodes:
        raise UserError(f"nodes={nodes}: {name} has {partition.nodes} machine{'s' if partition.nodes != 1 else ''}")
    if gpus and keys.gpu_request != "none" and gpus > partition.gpus:
        if not partition.gpus:
            raise UserError(
                f"gpus={gpus}: no machine of {name} has GPUs that SLURM knows: another partition=, or gpu_request=none"
            )
        raise UserError(f"gpus={gpus}: a machine of {name} has at most {partition.gpus}")
    cores = processes * (keys.cpus or 1)
    if cores > partition.cpus:
        what = f"gpus={processes} processes" if keys.cpus is None else f"gpus={processes} x cpus={keys.cpus}"
        raise UserError(f"{what} are {cores} cores: a machine of {name} has at most {partition.cpus}")
    if keys.time is not None and partition.limit is not None:
        asked = seconds("time", keys.time)
        if asked is None or asked > partition.limit:
            raise UserError(
                f"time={keys.time}: the limit of {name} is {duration(partition.limit)}; the run goes on after it by itself"
            )


def check_account(account: str | None) -> None:
    """Refuse an account that accounting, where the cluster has it, does not know for this user. Raises UserError."""
    if account is None or shutil.which("sacctmgr") is None:
        return
    command = ["sacctmgr", "--noheader", "--parsable2", "show", "associations", f"user={getpass.getuser()}", "format=account"]
    done = run(command)
    accounts = sorted({line.strip() for line in done.stdout.splitlines() if line.strip()})
    if done.returncode == 0 and accounts and account not in accounts:
        raise UserError(f"account={account}: yours are {', '.join(accounts)}")


@dataclass(frozen=True)
class Queued:
    """A job, or a task of an array, that waits or runs."""

    id: str
    state: str  # PENDING, RUNNING, COMPLETING ...
    elapsed: str
    left: str
    nodes: str
    reason: str


def queued(jobs: list[str]) -> list[Queued]:
    """Those of `jobs` (ids) that wait or run, by squeue; the tasks of an array that wait are one. Raises UserError."""
    if not jobs:
        return []
    done = run(["squeue", "--noheader", f"--jobs={','.join(jobs)}", "--format=%i|%T|%M|%L|%N|%r"])
    if done.returncode:
        if "Invalid job id" in done.stderr:  # the one job asked for is forgotten
            return []
        raise UserError(f"squeue: {said(done)}")
    lines = [line.split("|") for line in done.stdout.splitlines() if line.count("|") == 5]
    return [Queued(*(part.strip() for part in line)) for line in lines]


def ended(jobs: list[str]) -> dict[str, str]:
    """How those of `jobs` ended that SLURM still knows, by scontrol, which needs no accounting: state and exit code."""
    found = {}
    for job in jobs:
        done = run(["scontrol", "show", "job", job, "--oneliner"])
        for line in done.stdout.splitlines() if done.returncode == 0 else []:
            fields = dict(part.partition("=")[::2] for part in line.split() if "=" in part)
            found[fields.get("ArrayJobId", job) + (f"_{fields['ArrayTaskId']}" if "ArrayTaskId" in fields else "")] = (
                f"{fields.get('JobState', '?')}, exit code {fields.get('ExitCode', '?').partition(':')[0]}"
            )
    return found


def has_pyxis() -> bool:
    """Whether this cluster's srun has pyxis' options. Raises UserError where there is no srun."""
    return "--container-image" in run(["srun", "--help"]).stdout


def duration(limit: int) -> str:
    """Seconds as D-HH:MM:SS."""
    days, rest = divmod(limit, 86400)
    text = f"{rest // 3600}:{rest // 60 % 60:02}:{rest % 60:02}"
    return f"{days}-{text}" if days else text
