"""executor=slurm against a real SLURM: two machines, of which one is told to end and one dies, and a run that goes on.

Start-up is most of a run's time, so one run goes through everything that can happen to it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import slurm_cluster

from nemo_ext import run_folder

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 240.0  # seconds for what takes fifteen on a machine with nothing else to do
RUN = ("steps=36", "every=6", "val_every=12", "device=cpu", "async_save=false")
STEPS = 36
SLURM = ("nodes=2", "gpus=1", "executor=slurm", "partition=batch", "time=30", "cpus=1")
# By `platform.activate()` and process groups in this process: a job inherits what its submitter has.
SET_BY_OTHER_TESTS = ("GLOO_SOCKET_IFNAME", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

pytestmark = pytest.mark.timeout(1500)


class Desk:
    """Where a person sits: the commands of this project on the cluster's login host, with state and caches of the tests."""

    def __init__(self, cluster: slurm_cluster.SlurmCluster, small: SimpleNamespace, folder: Path) -> None:
        self.cluster, self.small, self.folder = cluster, small, folder
        mine = {name: value for name, value in os.environ.items() if name not in SET_BY_OTHER_TESTS}
        self.environment = {**mine, "LLM_BUILDER_CACHE": str(small.cache), "XDG_STATE_HOME": str(folder / "state"),
                            "COLUMNS": "300"}  # fmt: skip

    def run(self, *keys: str) -> subprocess.CompletedProcess:
        """`python launchers/run.py` with the small model's keys and these."""
        return self.python("launchers/run.py", *self.small.keys, *keys)

    def jobs(self, *arguments: str) -> str:
        """What `python launchers/jobs.py`, which has to succeed, says."""
        done = self.python("launchers/jobs.py", *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def python(self, *arguments: str) -> subprocess.CompletedProcess:
        return self.cluster.run([sys.executable, *arguments], timeout=PATIENCE, cwd=ROOT, env=self.environment)

    def submit(self, out: Path, *keys: str) -> str:
        """Submit a run into `out`; the job's id."""
        done = self.run(*RUN, *SLURM, *keys, f"out={out}")
        assert done.returncode == 0, done.stdout + done.stderr
        return re.search(r"as job (\d+)", done.stdout)[1]

    def ended(self, job: str) -> dict[str, str]:
        """Wait until a job has ended; what SLURM says of it."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
        self.cluster.wait(lambda: self.cluster.job(job)["JobState"] in over, PATIENCE, f"job {job} ends")
        return self.cluster.job(job)

    def until(self, what, job: str, why: str) -> None:
        """Wait until `what()`, which must come while the job runs or waits."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")

        def reached() -> bool:
            if what():
                return True
            assert self.cluster.job(job)["JobState"] not in over, f"{why}: job {job} ended before"
            return False

        self.cluster.wait(reached, PATIENCE, why)


@pytest.fixture(scope="module")
def desk(cluster, small, tmp_path_factory) -> Desk:
    return Desk(cluster, small, tmp_path_factory.mktemp("desk"))


@pytest.fixture(scope="module")
def alone(desk) -> Path:
    """The folder of the run that nothing happens to, on this machine."""
    out = desk.folder / "alone"
    command = [sys.executable, "launchers/run.py", *desk.small.keys, *RUN, "gpus=2", f"out={out}"]
    done = subprocess.run(command, cwd=ROOT, env=desk.environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def steps_done(out: Path) -> int:
    """The newest step that the run has reported."""
    return max((record["step"] for record in run_folder.read_records(out)[0]), default=0)


def newest(out: Path) -> int:
    """The step of the newest checkpoint."""
    return (run_folder.newest_checkpoint(out / "checkpoints") or (0,))[0]


def phase(out: Path) -> str:
    return (run_folder.read_status(out) or {}).get("phase", "")


def log(out: Path, job: str) -> str:
    """What a job printed."""
    return (out / "slurm" / f"{job}.log").read_text()


def figures(out: Path) -> dict[tuple[int, str], float]:
    """What metrics.jsonl says of the mathematics, by step and name; every step is there once and in order."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [record["step"] for record in records if "loss" in record]
    assert steps == list(range(1, len(steps) + 1))
    names = ("loss", "grad_norm", "lr", "val_loss")
    return {(record["step"], name): record[name] for record in records for name in names if name in record}


def test_a_run_on_two_machines_learns_what_one_machine_learns(desk, alone):
    out = desk.folder / "two"
    job = desk.submit(out)
    ended = desk.ended(job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "0"), log(out, job)
    assert figures(out) == figures(alone)
    status, summary = run_folder.read_status(out), run_folder.read_json(out / "summary.json")
    assert (status["phase"], status["step"], summary["steps"]) == ("finished", STEPS, STEPS)
    assert [re.search(r" on (\w+) starts", (out / "logs" / f"rank{rank}.log").read_text())[1] for rank in (0, 1)] == ["n1", "n2"]
    assert sorted(path.name for path in (out / "logs").glob("rank*.memory.json")) == ["rank0.memory.json", "rank1.memory.json"]
    assert "held-out" in log(out, job)
    again = desk.run(*RUN, *SLURM, f"out={out}")  # nothing to do: nothing is submitted
    assert again.returncode == 0 and f"is complete at step {STEPS}" in again.stdout


def test_a_run_goes_on_whatever_ends_its_job(desk, alone):
    """The time limit's warning, a machine that loses power, a person who cancels: it goes on from what was saved last, and learns
    what the run has learnt to which nothing happened."""
    cluster, out = desk.cluster, desk.folder / "on"
    job = desk.submit(out)
    desk.until(lambda: steps_done(out) >= 2, job, "two steps")
    cluster.check("scancel", "--signal=USR1", "--batch", job)  # what #SBATCH --signal=B:USR1@300 does
    cluster.wait(lambda: cluster.job(job)["Restarts"] == "1", PATIENCE, "requeued after the warning")
    warned = newest(out)
    assert 2 <= warned == steps_done(out) < STEPS
    status = run_folder.read_status(out)
    assert (status["phase"], status["signal"], status["step"]) == ("stopped", "SIGUSR1", warned)

    desk.until(lambda: steps_done(out) > warned, job, "a step after the warning")
    cluster.crash("n2")
    cluster.wait(lambda: cluster.job(job)["Restarts"] == "2", PATIENCE, "requeued after a machine died")
    survived, reached = newest(out), steps_done(out)
    assert warned <= survived < STEPS
    assert "(" in desk.jobs("status", "on").split("\n")[2]  # why it waits
    cluster.boot("n2")

    desk.until(lambda: phase(out) == "starting", job, "going on")
    desk.until(lambda: phase(out) != "starting" and steps_done(out) > survived, job, "a step after the machine died")
    assert "running on n[1-2]" in desk.jobs("status", "on")
    assert f"job {job} saves and ends" in desk.jobs("cancel", "on")
    ended = desk.ended(job)
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "143:0")
    cancelled = newest(out)
    assert survived < cancelled == steps_done(out) < STEPS, (reached, desk.jobs("status", "on"))

    again = re.search(r"as job (\d+)", desk.jobs("resume", "on"))[1]
    ended = desk.ended(again)
    assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), desk.jobs("logs", "on", "lines=0")
    assert figures(out) == figures(alone)
    assert run_folder.read_json(out / "summary.json")["steps"] == STEPS
    assert re.findall(r"continuing \S+ from step (\d+)", log(out, job)) == [str(warned), str(survived)]
    assert f"continuing {out} from step {cancelled}" in desk.jobs("logs", "on", "lines=0")
    assert desk.jobs("logs", "on", "rank=1", "lines=0").count(" on n2 starts") == 4
    assert f"complete at step {STEPS}" in desk.jobs("status", "on")


REFUSALS = {
    "partition=bacht": "partition=bacht: the cluster has no such partition, did you mean batch?",
    "partition=small nodes=1 time=9": "time=9: the limit of partition small is 0:02:00",
    "partition=batch nodes=3": "nodes=3: partition batch has 2 machines",
    "partition=batch device=gpu gpus=4": "gpus=4: a machine of partition batch has at most 2",
    "partition=batch time=soon": "time=soon is no duration",
    "partition=batch sbatch=[--no-such-option]": "--no-such-option",
}


@pytest.mark.parametrize("keys", REFUSALS)
def test_what_the_cluster_cannot_do_is_one_line(desk, keys):
    out = desk.folder / "refused"
    wanted = {"device": "cpu", "nodes": "2", "gpus": "1"} | dict(key.split("=", 1) for key in keys.split())
    done = desk.run("executor=slurm", *(f"{name}={value}" for name, value in wanted.items()), f"out={out}")
    assert (done.returncode, done.stdout) == (2, "")
    assert REFUSALS[keys] in done.stderr and len(done.stderr.splitlines()) == 1
    assert desk.cluster.check("squeue", "--noheader", "--name=refused") == ""


def test_nothing_is_left_of_a_cluster(tmp_path):
    if reason := slurm_cluster.unavailable():
        pytest.skip(reason)
    with slurm_cluster.SlurmCluster(tmp_path, nodes=1) as cluster:
        cluster.popen(["srun", "sleep", "1000"])
        cluster.wait(lambda: any(line.endswith("/sleep 1000") for line in cluster.processes()), 30, "the job's process")
    deadline = time.monotonic() + 20  # the kernel ends the rest of a namespace after its first process
    while left := processes_of(tmp_path):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def processes_of(folder: Path) -> list[str]:
    """Processes of this machine that have a folder in their command line or environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            text = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
        except OSError:  # ended meanwhile
            continue
        if str(folder).encode() in text:
            found.append(text.decode(errors="replace"))
    return found
