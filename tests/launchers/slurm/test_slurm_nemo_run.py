"""Our batch scripts ask SLURM for what NeMo-Run's SlurmExecutor asks for; docs/slurm.md says why that is not used."""

from __future__ import annotations

import shlex

import pytest
from test_slurm_script import RAY, VARIANTS, with_keys

from launchers.slurm import script
from launchers.slurm.script import Job

# What the two call the same thing, or only one of them says: where logs go, and who requeues.
OURS_ALONE = {"output", "requeue", "no-requeue"}


def options(text: str) -> dict[str, str]:
    """A script's #SBATCH lines: by option, its value, which is empty where it has none."""
    words = [shlex.split(line.removeprefix("#SBATCH "))[0] for line in text.splitlines() if line.startswith("#SBATCH ")]
    return {name: value for name, _, value in (word.removeprefix("--").partition("=") for word in words)}


def nemo_runs(job: Job) -> str:
    """What NeMo-Run renders for a job's settings."""
    from nemo_run.core.execution.slurm import SlurmBatchRequest, SlurmExecutor

    keys, array = job.keys, len(job.runs) > 1
    gpus = {} if keys.gpu_request == "none" or not job.gpus else (
        {"gres": f"gpu:{job.gpus}"} if keys.gpu_request == "gres" else {"gpus_per_node": job.gpus})  # fmt: skip
    executor = SlurmExecutor(
        account=keys.account, partition=keys.partition, qos=keys.qos, time=keys.time, nodes=job.nodes,
        ntasks_per_node=job.processes, cpus_per_task=keys.cpus, mem=keys.mem, exclusive=keys.exclusive or None,
        constraint=keys.constraint, exclude=keys.exclude, signal=f"B:USR1@{keys.grace}", container_image=keys.container,
        array=(f"0-{len(job.runs) - 1}" + (f"%{keys.parallel}" if keys.parallel else "")) if array else None,
        container_mounts=[":".join(mount) for mount in job.mounts], **gpus,
        additional_parameters=dict(option.removeprefix("--").split("=", 1) for option in keys.sbatch or []),
    )  # fmt: skip
    executor.job_details.job_name = job.name
    executor.job_dir = "/scratch/me/jobs/1"
    return SlurmBatchRequest(
        cmd=["sbatch"], jobs=[job.name], command_groups=[["true"]], slurm_config=executor, max_retries=0, extra_env={}
    ).materialize()


@pytest.mark.parametrize("name", sorted(VARIANTS.keys() - {"chain"}))
def test_the_same_is_asked_of_slurm(name):
    job = with_keys(VARIANTS[name], {"constraint": "h100&nvlink", "exclude": "node[1-3]"})
    ours, theirs = options(script.render(job)), options(nemo_runs(job))
    assert len(theirs) >= 10 and ours.keys() - theirs.keys() <= OURS_ALONE and theirs.keys() <= ours.keys()
    assert {name: ours[name] for name in theirs if name != "output"} == {n: v for n, v in theirs.items() if n != "output"}
    assert ours["output"].endswith("%A_%a.log" if len(job.runs) > 1 else "%j.log")


@pytest.mark.parametrize("job", [VARIANTS["pyxis"], RAY], ids=["pyxis", "ray"])
def test_the_same_container_is_asked_of_pyxis(job):
    job = with_keys(job, {"container": "nvcr.io#nvidia/nemo:26.02.01"})
    (line,) = (line for line in nemo_runs(job).splitlines() if line.startswith("srun --output"))
    theirs = shlex.split(line)
    wanted = {word: theirs[theirs.index(word) + 1] for word in ("--container-image", "--container-mounts")}
    ours = " ".join(script.preamble(job).split())
    assert f"--container-image={script.quote(wanted['--container-image'])} " in ours
    mounts = wanted["--container-mounts"].rpartition(",")[0]  # the last one is the folder of its own packed code
    assert f"--container-mounts={mounts})" in ours


def test_the_same_tasks_are_started():
    """Their srun starts as many tasks as the job asks for, on all of its machines. So does ours, which says both numbers, because
    the steps before and after it are of one task."""
    job = VARIANTS["pyxis"]
    (line,) = (line for line in nemo_runs(job).splitlines() if line.startswith("srun --output"))
    theirs = {word.partition("=")[0] for word in shlex.split(line) if word.startswith("--")}
    (train,) = (line for line in script.render(job).replace("\\\n", " ").splitlines() if "launchers.worker" in line)
    ours = {word.partition("=")[0]: word.partition("=")[2] for word in shlex.split(train) if word.startswith("--")}
    asked = options(nemo_runs(job))
    assert (ours["--nodes"], ours["--ntasks-per-node"]) == (asked["nodes"], asked["ntasks-per-node"]) == ("2", "8")
    assert ours["--kill-on-bad-exit"] == "1" and "--kill-on-bad-exit" in theirs
    inside = {word.partition("=")[0] for word in shlex.split(script.preamble(job).partition("inside=(")[2].partition(")\n")[0])}
    # A log of its own for each rank is written by the rank; who ends first need not wait for the others' last minute.
    assert theirs - ours.keys() - inside == {"--output", "--wait"}
    assert inside - theirs == {"--container-env"}  # what goes over the image's own values


def test_what_its_requeueing_cannot_tell_apart():
    """Why the script is ours: it starts again whatever did not end with 0, bad input and a person's end too."""
    text = nemo_runs(VARIANTS["bare"])
    assert 'if [ $exitcode -ne 0 ]; then\n    if [ "$TORCHX_MAX_RETRIES" -gt' in text and "trap" not in text
    assert "--container-mounts" in text  # though there is no container
