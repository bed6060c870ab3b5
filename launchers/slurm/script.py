"""The batch script of a run: a pure function from what is asked to text.

    render(Job(...))    # phase=prepare, a worker on every device, phase=finish; see launchers/allocation.py

The batch shell itself runs outside the container, on the first machine, and needs bash and SLURM's commands only. Every value
of a user is quoted for the shell, or for the #SBATCH lines, which SLURM reads by rules of its own.
"""

from __future__ import annotations

import re
import shlex
import signal
from dataclasses import dataclass
from pathlib import Path

from launchers.allocation import AGAIN, COMPLETE, FINISH, PREPARE
from launchers.slurm.keys import SlurmKeys
from nemo_ext import run_folder
from nemo_ext.command_line import texts
from nemo_ext.errors import RunError, UserError

FOLDER = "slurm"  # in a run's folder: what was submitted, and the jobs' logs
SETTINGS = "settings.yaml"  # in it: the run's keys, for the steps' config=
SCRIPT = "job.sbatch"
PYXIS, APPTAINER = "pyxis", "apptainer"
PORTS = (20000, 10000)  # of the rendezvous: the first and how many, below those that systems give to clients
RETURNS = (128 + signal.SIGUSR1, 128 + signal.SIGTERM)  # exit codes of a run that its time, or its machines, were taken from
PLAIN = re.compile(r"[A-Za-z0-9_@%+=:,./\[\]-]+")
# What the steps' processes must see, also where an image has a value of its own.
FABRICS = {
    None: {},
    "infiniband": {"NCCL_IB_DISABLE": "0", "NCCL_IB_TIMEOUT": "22", "NCCL_IB_QPS_PER_CONNECTION": "4"},
    "roce": {"NCCL_IB_DISABLE": "0", "NCCL_IB_GID_INDEX": "3", "NCCL_IB_TIMEOUT": "22"},
    "ethernet": {"NCCL_IB_DISABLE": "1"},
}


@dataclass(frozen=True)
class Job:
    """What a batch script is rendered from. Several `runs` (folders) are the tasks of a job array."""

    keys: SlurmKeys
    name: str
    runs: tuple[Path, ...]
    folder: Path  # of the job's own logs
    nodes: int
    processes: int  # that train on a machine
    gpus: int  # of a machine; 0 trains on CPUs
    project: Path
    python: str
    cache: Path
    runtime: str | None = None  # PYXIS, APPTAINER or none
    mounts: tuple[tuple[str, str], ...] = ()  # (outside, inside) of the container
    requeue: bool = True
    restarts: int = 0  # of the workers within the job, after failures


def render(job: Job) -> str:
    """The whole script. Raises UserError for a value that a script, or a container's mounts, cannot hold."""
    return "\n".join([header(job), preamble(job), _steps(job)])


def header(job: Job, warning: bool = True) -> str:
    """The #SBATCH lines. `warning`: SLURM tells the batch shell (B:) before the time limit, which tells the workers while there
    are any: a signal to the steps would end `prepare`, and would be lost between two steps."""
    keys, array = job.keys, len(job.runs) > 1
    log = job.folder / ("%A_%a.log" if array else "%j.log")
    if "\\" in str(log):
        raise UserError(f"out={job.folder}: SLURM takes no folder with a backslash in its name: give another out=")
    options = {
        "job-name": job.name,
        "account": keys.account,
        "partition": keys.partition,
        "qos": keys.qos,
        "time": keys.time,
        "nodes": job.nodes,
        "ntasks-per-node": job.processes,
        "cpus-per-task": keys.cpus,
        "mem": keys.mem,
        **_gpus(job),
        "constraint": keys.constraint,
        "reservation": keys.reservation,
        "exclude": keys.exclude,
        "array": (f"0-{len(job.runs) - 1}" + (f"%{keys.parallel}" if keys.parallel else "")) if array else None,
        "output": str(log.parent).replace("%", "%%") + f"/{log.name}",
        "open-mode": "append",
        "signal": f"B:USR1@{keys.grace}" if warning and keys.grace else None,
    }
    lines = [f"--{name}={_directive(value)}" for name, value in options.items() if value is not None]
    lines += ["--exclusive"] if keys.exclusive else []
    lines += ["--requeue" if job.requeue else "--no-requeue"]
    lines += [_directive(option) for option in texts("sbatch", keys.sbatch)]
    return "\n".join(["#!/bin/bash", *(f"#SBATCH {line}" for line in lines), ""])


def preamble(job: Job) -> str:
    """From the start of the script to its first step: folder, rendezvous, environment, and how a step is started."""
    keys = job.keys
    several = len(job.runs) > 1
    run = "${runs[$SLURM_ARRAY_TASK_ID]}" if several else quote(job.runs[0])
    port, ports = PORTS
    lines = ["set -uo pipefail", ""]
    lines += ["runs=(", *(f"    {quote(folder)}" for folder in job.runs), ")"] if several else []
    lines += [
        f"run={run}",
        "",
        'mapfile -t machines < <(scontrol show hostnames "$SLURM_JOB_NODELIST")',
        'export MASTER_ADDR="${machines[0]}"',
        f"export MASTER_PORT=$(( {port} + SLURM_JOB_ID % {ports} ))",
    ]
    lines += [f"export {name}={value}" for name, value in environment(job).items()]
    if setup := texts("setup", keys.setup):
        lines += ["", *setup]
    lines += ["", *_inside(job), f"srun=({shlex.join(['srun', *texts('srun', keys.srun)])})"]
    # A step of one process has all that the job has of the first machine.
    lines += ['once=("${srun[@]}" --nodes=1 --ntasks=1 --ntasks-per-node=1 --cpu-bind=none "${inside[@]}")', ""]
    return "\n".join(lines)


def environment(job: Job) -> dict[str, str]:
    """What the script exports, as shell text: what the user gives goes over the fabric's, that over ours."""
    keys = job.keys
    sharing = max(job.processes, job.gpus)
    share = f"SLURM_CPUS_ON_NODE / {sharing}"
    cores = "$SLURM_CPUS_ON_NODE" if sharing == 1 else f"$(( {share} > 0 ? {share} : 1 ))"
    ours = {
        "OMP_NUM_THREADS": str(keys.cpus) if keys.cpus else cores,
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "LLM_BUILDER_CACHE": quote(job.cache),
    }
    sockets = {"NCCL_SOCKET_IFNAME": keys.interface, "GLOO_SOCKET_IFNAME": keys.interface}
    chosen = {name: quote(value) for name, value in sockets.items() if value}
    if job.gpus:
        ours |= {"NCCL_DEBUG": "WARN"}
        chosen |= FABRICS[keys.fabric]
    return {**ours, **chosen, **{name: quote(value) for name, value in (keys.env or {}).items()}}


def phase(job: Job) -> str:
    """The command of a step of one process, to which executor=allocation and its phase= are added."""
    return f'"${{once[@]}}" "${{python[@]}}" {quote(job.project / "launchers/run.py")} "config=$run/{FOLDER}/{SETTINGS}"'


def _steps(job: Job) -> str:
    keys = job.keys
    step = phase(job)
    cpus = f"--cpus-per-task={keys.cpus}" if keys.cpus else "--cpu-bind=none"
    train = (
        f'"${{srun[@]}}" --nodes={job.nodes} --ntasks-per-node={job.processes} {cpus} --kill-on-bad-exit=1 --label '
        '"${inside[@]}" \\\n        "${python[@]}" -m launchers.worker "$run"'
    )
    return f"""limit=no step=
trap 'limit=yes; [[ -n "$step" ]] && kill -USR1 "$step"' USR1  # the time limit is near; srun passes it on to the workers
{leave(job)}
for (( starts_left = {job.restarts}; ; starts_left-- )); do
    {step} executor=allocation phase={PREPARE}
    code=$?
    (( code == {COMPLETE} )) && exit 0  # complete: an earlier job has done it
    (( code != 0 )) && leave "$code"
    if [[ "$limit" == yes ]]; then
        echo "the time limit came before training: give a longer time=" >&2
        leave {RunError.exit_code}
    fi

    # What the workers print is in {run_folder.LOGS}/rankN.log.
    {train} &
    step=$!
    wait "$step"
    code=$?
    while kill -0 "$step" 2> /dev/null; do  # a trap ends a wait
        wait "$step"
        code=$?
    done
    step=
    [[ "$over" == yes ]] && leave "$code"
    if (( code != 0 )); then  # a machine that died? This waits until SLURM knows, and starts the job anew
        "${{srun[@]}}" --nodes={job.nodes} --ntasks={job.nodes} --ntasks-per-node=1 true
    fi

    {step} executor=allocation phase={FINISH} "starts_left=$starts_left"
    code=$?
    (( code == {AGAIN} )) || break
done
leave "$code"
"""


def leave(job: Job) -> str:
    """The shell function that ends the job with a step's exit code, or lets it start again, and what it has to know.

    SLURM tells this shell (SIGTERM) when it ends the job: by its limit, scancel or scontrol requeue. It has told the workers too,
    and would kill them with their srun if the shell ended before they have saved. A job that is to be preempted is not told: its
    steps are, and one that cannot save then (`prepare`, workers that load) fails.
    """
    again = """
    if [[ "$over" == no ]] && goes_on "$1"; then
        scontrol requeue "$SLURM_JOB_ID" && exec sleep 60  # which ends this
        echo "the cluster does not requeue: submit again to go on" >&2
    fi"""
    rule = f"""
goes_on() {{
    (( {" || ".join(f"$1 == {code}" for code in RETURNS)} )) && return  # saved
    (( $1 == {RunError.exit_code} )) && [[ "$(scontrol show job --oneliner "$SLURM_JOB_ID")" == *" PreemptTime="[0-9]* ]]
}}
"""
    return f"""over=no
trap over=yes TERM  # SLURM ends this job, and starts it again where it is to be
{rule if job.requeue else ""}
leave() {{{again if job.requeue else ""}
    exit "$1"
}}
"""


def _gpus(job: Job) -> dict[str, str | int]:
    if not job.gpus or job.keys.gpu_request == "none":
        return {}
    return {"gres": f"gpu:{job.gpus}"} if job.keys.gpu_request == "gres" else {"gpus-per-node": job.gpus}


def _inside(job: Job) -> list[str]:
    """The arrays `inside`, srun's options that put a step into its place, and `python`, the program there."""
    project, python = quote(job.project), quote(job.python)
    if job.runtime is None:
        return [f"inside=(--chdir={project})", f"python=({python})"]
    for outside, within in job.mounts:
        if re.search(r"[\s,:\"'\\]", outside + within):
            raise UserError(
                f"{outside!r}: a folder that a container mounts cannot have spaces, commas, colons or quotes in its name"
            )
    mounts = quote(",".join(f"{outside}:{within}" for outside, within in job.mounts))
    image = quote(job.keys.container)
    if job.runtime == PYXIS:
        kept = ",".join(["MASTER_ADDR", "MASTER_PORT", *environment(job)])
        return [
            f"inside=(--container-image={image} --container-workdir={project} --container-env={kept}",
            f"    --container-mounts={mounts})",
            f"python=({python})",
        ]
    nv = " --nv" if job.gpus else ""
    return ["inside=()", f"python=(apptainer exec{nv} --pwd {project} --bind {mounts} {image} {python})"]


def quote(value: object) -> str:
    """A value as one word of the shell. Raises UserError for one with a line break."""
    text = str(value)
    if "\n" in text or "\0" in text:
        raise UserError(f"{text!r} holds a line break, which a batch script cannot")
    return shlex.quote(text)


def _directive(value: object) -> str:
    """A value for a #SBATCH line: SLURM knows double quotes and backslashes there, and nothing of the shell's."""
    text = str(value)
    if not text.isprintable():
        raise UserError(f"{text!r} holds a character that a batch script cannot")
    if PLAIN.fullmatch(text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
