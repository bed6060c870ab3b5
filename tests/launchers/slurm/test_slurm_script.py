"""The batch scripts: golden files, and what they do when they run, with stand-ins for SLURM's commands.

    LLM_BUILDER_WRITE_GOLDEN=1 python -m pytest tests/launchers/slurm/test_slurm_script.py

writes the golden files anew; read what changed.
"""

import dataclasses
import json
import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest

from launchers.allocation import AGAIN
from launchers.slurm import ray, script
from launchers.slurm.keys import SlurmKeys
from launchers.slurm.script import Job
from nemo_ext.errors import UserError

GOLDEN = Path(__file__).parent / "golden"
RUN = Path("/scratch/me/runs/llama")
HOSTILE = Path("""/tmp/it's "quoted" $(touch x) & 100%/run""")
BARE = Job(
    keys=SlurmKeys(account="physics", partition="h100", time="4:00:00", env={}), name="llama", runs=(RUN,), folder=RUN / "slurm",
    nodes=2, processes=8, gpus=8, project=Path("/home/me/llm-builder"), python="/home/me/venv/bin/python",
    cache=Path("/home/me/.cache/llm-builder"),
)  # fmt: skip
MOUNTS = (("/home/me/llm-builder", "/home/me/llm-builder"), (str(RUN), str(RUN)), ("/data", "/mnt/data"))
NGC = "nvcr.io#nvidia/nemo:26.02.01"


def with_keys(job=BARE, /, keys=None, **changes):
    return dataclasses.replace(job, keys=dataclasses.replace(job.keys, **(keys or {})), **changes)


VARIANTS = {
    "bare": BARE,
    "cpu": with_keys(
        keys={"cpus": 4, "mem": "0", "exclusive": True, "setup": ["module load gcc"], "interface": "eth0"}, gpus=0, processes=2
    ),
    "pyxis": with_keys(
        keys={"container": NGC, "fabric": "infiniband", "env": {"NCCL_IB_HCA": "mlx5", "NCCL_DEBUG": "INFO"}, "qos": "high"},
        python="python", runtime="pyxis", mounts=MOUNTS,
    ),
    "apptainer": with_keys(
        keys={"container": "/images/nemo.sif", "gpu_request": "gres", "fabric": "roce", "srun": ["--mpi=none"]},
        python="python", runtime="apptainer", mounts=MOUNTS,
    ),
    "chain": with_keys(keys={"grace": 120, "chain": 3, "gpu_request": "none"}, requeue=False),
    "array": with_keys(
        keys={"parallel": 2, "sbatch": ["--mail-type=END"]}, runs=tuple(RUN / f"lr-{lr}" for lr in ("1e-5", "3e-5", "1e-4")),
        name="sweep", folder=RUN / "slurm",
    ),
    "hostile": with_keys(
        keys={"account": 'a "b" $(c)', "env": {"A": "it's $HOME"}},
        runs=(HOSTILE,), folder=HOSTILE / "slurm",
    ),
}  # fmt: skip
RAY = with_keys(keys={"env": {}}, processes=1, python="python", runtime="pyxis", mounts=MOUNTS, name="grpo")


def golden(name: str, text: str) -> None:
    file = GOLDEN / f"{name}.sbatch"
    if os.environ.get("LLM_BUILDER_WRITE_GOLDEN"):
        file.write_text(text)
    assert text == file.read_text()
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


@pytest.mark.parametrize("name", VARIANTS)
def test_script_is_the_golden_one(name):
    golden(name, script.render(VARIANTS[name]))


@pytest.mark.parametrize(("nodes", "version"), [(1, "v0.5.0"), (3, "v0.8.0")])
def test_script_with_ray_is_the_golden_one(nodes, version):
    job = with_keys(RAY, nodes=nodes)
    golden(f"ray_{nodes}_{version}", ray.render(dataclasses.replace(job, keys=ray.settle(job.keys, version)), version))


@pytest.mark.parametrize(
    ("job", "says"),
    [
        (with_keys(keys={"account": "a\nb"}), "holds a character that a batch script cannot"),
        (with_keys(keys={"env": {"A": "a\nb"}}), "holds a line break"),
        (with_keys(folder=Path("/a\\b/slurm")), "SLURM takes no folder with a backslash"),
        (with_keys(VARIANTS["pyxis"], mounts=(("/a b", "/a b"),)), "cannot have spaces, commas, colons or quotes"),
        (with_keys(VARIANTS["apptainer"], mounts=(("/a:b", "/a"),)), "cannot have spaces, commas, colons or quotes"),
    ],
)
def test_what_a_script_cannot_hold(job, says):
    with pytest.raises(UserError, match=says):
        script.render(job)


def test_ray_needs_pyxis():
    with pytest.raises(UserError, match="runtime=apptainer: engine=nemo_rl enters a running container"):
        ray.settle(SlurmKeys(container="a.sif", runtime="apptainer"), "v0.8.0")


SRUN = """
import signal, time
words = sys.argv[1:]
phase = next((word.partition("=")[2] for word in words if word.startswith("phase=")), "train")
phase = "probe" if words[-1] == "true" else phase
seen = [phase, os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], os.environ["A"], words]
log = lambda: open(os.path.join(folder, "steps"), "a").write(json.dumps(seen) + "\\n")
if phase == "train":
    got = []
    signal.signal(signal.SIGUSR1, lambda *_: got.append(1))
    log()
    while os.environ["WAIT"] == "yes" and not got:
        time.sleep(0.02)
else:
    log()
codes = os.environ.get(phase.upper(), "0").split()  # of its first call, its second ...; the last one stays
before = sum(json.loads(line)[0] == phase for line in open(os.path.join(folder, "steps"))) - 1
sys.exit(int(codes[min(before, len(codes) - 1)]))
"""


class Runs:
    """Runs of a script with a place of its own, whose steps end as they are told."""

    def __init__(self, cluster, tmp_path) -> None:
        self.cluster = cluster
        self.folder = cluster.bin.parent
        srun = cluster.bin / "srun"
        srun.write_text(srun.read_text().replace("answer =", SRUN + "\nanswer =", 1))
        cluster.answer("scontrol", "node7\nnode8\n")
        self.run = tmp_path / """it's "quoted" $(touch x) & 100%""" / "run"
        self.job = with_keys(VARIANTS["hostile"], runs=(self.run,), folder=self.run / "slurm")

    def start(self, job=None, prepare=0, train=0, finish=0, wait="no", **more) -> subprocess.Popen:
        environment = {**os.environ, "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_ID": "123456", "SLURM_CPUS_ON_NODE": "32",
                       "PREPARE": str(prepare), "TRAIN": str(train), "FINISH": str(finish), "WAIT": wait, **more}  # fmt: skip
        text = script.render(job or self.job).replace("exec sleep 60", 'exit "$1"')
        file = self.folder / "job.sbatch"
        file.write_text(text)
        return subprocess.Popen(["bash", str(file)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def __call__(self, *arguments, **more) -> tuple[int, str]:
        process = self.start(*arguments, **more)
        _, errors = process.communicate(timeout=30)
        return process.returncode, errors

    def steps(self) -> list[list]:
        file = self.folder / "steps"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def phases(self) -> list[str]:
        return [step[0] for step in self.steps()]

    def requeued(self) -> bool:
        return ["requeue", "123456"] in self.cluster.calls("scontrol")


@pytest.fixture
def runs(cluster, tmp_path):
    return Runs(cluster, tmp_path)


def test_hostile_names_reach_the_steps_as_they_are(runs, tmp_path):
    assert runs() == (0, "")
    prepare, train, finish = runs.steps()
    assert [prepare[0], train[0], finish[0]] == ["prepare", "train", "finish"]
    assert prepare[1:4] == ["node7", "23456", "it's $HOME"]
    python = runs.job.python
    settings = f"config={runs.run}/slurm/settings.yaml"
    assert prepare[4][prepare[4].index(python) :] == [
        python, f"{runs.job.project}/launchers/run.py", settings, "executor=allocation", "phase=prepare",
    ]  # fmt: skip
    assert train[4][train[4].index(python) :] == [python, "-m", "launchers.worker", str(runs.run)]
    assert "--ntasks-per-node=8" in train[4] and "--nodes=2" in train[4] and "--kill-on-bad-exit=1" in train[4]
    assert "--ntasks=1" in prepare[4] and not list(tmp_path.rglob("x"))
    assert not runs.requeued()


@pytest.mark.parametrize(
    ("ends", "phases", "code", "requeued"),
    [
        ({"prepare": script.COMPLETE}, ["prepare"], 0, False),
        ({"prepare": 2}, ["prepare"], 2, False),
        (
            {"train": 1, "finish": 1},
            ["prepare", "train", "probe", "finish"],
            1,
            False,
        ),  # were a machine dead, the probe would wait
        ({"finish": 130}, ["prepare", "train", "finish"], 130, False),  # cancelled
        ({"prepare": 130}, ["prepare"], 130, False),
        ({"finish": 138}, ["prepare", "train", "finish"], 138, True),  # the time limit
        ({"finish": 143}, ["prepare", "train", "finish"], 143, True),  # preempted
        ({"prepare": 143}, ["prepare"], 143, True),
    ],
)
def test_what_follows_how_a_step_ends(runs, ends, phases, code, requeued):
    assert runs(**ends)[0] == code
    assert runs.phases() == phases and runs.requeued() is requeued


@pytest.mark.parametrize(("when", "requeued"), [("2026-11-23T02:26:33", True), ("None", False)])
def test_what_fails_because_it_is_preempted_starts_again(runs, when, requeued):
    """A step that SIGTERM ends before it can save."""
    runs.cluster.answer(
        "scontrol", f"node7\nnode8\nJobId=123456 PreemptEligibleTime=2026-11-23T02:26:29 PreemptTime={when} A=1\n"
    )
    assert runs(train=143, finish=1)[0] == 1
    assert runs.requeued() is requeued


def test_workers_that_failed_start_again_in_the_same_job(runs):
    job = dataclasses.replace(runs.job, restarts=2)
    assert runs(job, train="1 0", finish=f"{AGAIN} 0")[0] == 0
    assert runs.phases() == ["prepare", "train", "probe", "finish", "prepare", "train", "finish"]
    assert [step[4][-1] for step in runs.steps() if step[0] == "finish"] == ["starts_left=2", "starts_left=1"]


def test_a_chain_does_not_requeue(runs):
    assert runs(dataclasses.replace(runs.job, requeue=False), finish=138)[0] == 138
    assert not runs.requeued()


def test_the_warning_before_the_time_limit_reaches_the_workers(runs):
    process = runs.start(wait="yes", finish=138)
    deadline = time.monotonic() + 20
    while "train" not in runs.phases() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)  # SLURM's, to the batch shell
    assert process.wait(20) == 138
    assert runs.phases() == ["prepare", "train", "finish"] and runs.requeued()


def test_what_slurm_ends_waits_for_the_workers_and_leaves_the_rest_to_slurm(runs):
    """scancel, scontrol requeue, the end of the time: SLURM tells the steps and the batch shell."""
    process = runs.start(wait="yes", train=0)
    deadline = time.monotonic() + 20
    while "train" not in runs.phases() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):  # the workers save
        process.wait(0.3)
    process.send_signal(signal.SIGUSR1)  # this stand-in for srun ends at once
    process.wait(20)
    assert runs.phases() == ["prepare", "train"] and not runs.requeued()


def test_a_task_of_an_array_takes_its_own_run(runs, tmp_path):
    several = tuple(tmp_path / f"it's {i}" for i in range(3))
    job = dataclasses.replace(runs.job, runs=several, folder=tmp_path / "slurm")
    assert runs(job, SLURM_ARRAY_TASK_ID="1")[0] == 0
    assert [step[4][-1] for step in runs.steps() if step[0] == "train"] == [str(several[1])]


def test_directives_are_quoted_for_slurm(runs):
    """SLURM reads double quotes and backslashes in #SBATCH lines, which here are as Python's shlex reads them."""
    lines = [line for line in script.render(runs.job).splitlines() if line.startswith("#SBATCH --")]
    words = [shlex.split(line.removeprefix("#SBATCH "))[0] for line in lines]
    assert '--account=a "b" $(c)' in words
    assert f"--output={str(runs.run).replace('%', '%%')}/slurm/%j.log" in words


RAY_SRUN = """
words = " ".join(sys.argv[1:])
kinds = {"--head": "head", "--address": "worker", "ray status": "status", "nemo_rl.train": "driver"}
kind = next((kind for word, kind in kinds.items() if word in words), None)
kind = kind or next(word.partition("=")[2] for word in sys.argv if word.startswith("phase="))
steps = os.path.join(folder, "steps")
with open(steps, "a") as file:
    file.write(f"{kind} {os.environ.get('RAY_HEAD')} {sys.argv[-1] if kind == 'driver' else ''}".strip() + "\\n")
if kind in ("head", "worker"):
    os.execv("/bin/sleep", ["sleep", "30"])
if kind == "status":
    said = open(steps).read()
    all_there = "head" in said and "worker" in said and said.count("status") > 1
    print(" 0.0/16.0 worker_units" if all_there else " 0.0/8.0 worker_units")
sys.exit(3 if kind == "driver" else 138 if kind == "finish" else 0)
"""


def test_ray_starts_in_order_and_ends(cluster, tmp_path):
    folder = cluster.bin.parent
    srun = cluster.bin / "srun"
    srun.write_text(srun.read_text().replace("answer =", RAY_SRUN + "\nanswer =", 1))
    ends = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + 7200))
    for name, content in {
        "scontrol": f"""
            [[ $2 == job ]] && echo "JobId=1 EndTime={ends} Deadline=N/A" || printf "node1\\nnode2\\n"
            echo "$@" >> {folder}/scontrol""",
        "getent": "echo '10.0.0.1 STREAM node1'",
        "sleep": '[[ $1 == 5 ]] && exec /bin/sleep 0.1 || exec /bin/sleep "$1"',
    }.items():
        (cluster.bin / name).write_text(f"#!/bin/bash\n{content}\n")
        (cluster.bin / name).chmod(0o755)
    job = with_keys(RAY, runs=(tmp_path / "run",))
    text = ray.render(dataclasses.replace(job, keys=ray.settle(job.keys, "v0.8.0")), "v0.8.0")
    text = text.replace("exec sleep 60", 'exit "$1"')
    environment = {**os.environ, "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": "1", "SLURM_CPUS_ON_NODE": "8"}
    done = subprocess.run(["bash"], input=text, text=True, env=environment, timeout=60, capture_output=True)
    assert done.returncode == 138, done.stderr  # phase=finish's
    steps = (folder / "steps").read_text().splitlines()
    assert steps[0] == "prepare None"
    *before, driver, last = steps[1:]
    assert set(before) == {"head 10.0.0.1", "worker 10.0.0.1", "status 10.0.0.1"} and before.count("status 10.0.0.1") > 1
    assert last == "finish 10.0.0.1"
    kind, _, within = driver.rpartition("=")  # once all GPUs were there
    assert kind == "driver 10.0.0.1 save_within" and 7200 - 300 - 60 < int(within) <= 7200 - 300
    assert "requeue 1" in (folder / "scontrol").read_text().splitlines()
