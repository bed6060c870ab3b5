"""executor=slurm against a real SLURM of two machines: what ends jobs there, and runs that go on.

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
STEPS = 72
RUN = (f"steps={STEPS}", "every=12", "val_every=24", "device=cpu", "async_save=false", "tp=1", "pp=1")
SLURM = ("nodes=2", "gpus=1", "executor=slurm", "partition=batch", "time=30", "cpus=1")
UNHURRIED = Path(__file__).with_name("unhurried")  # its sitecustomize.py gives a step of a job time for something to happen
# By `platform.activate()` and process groups in this process: a job inherits what its submitter has.
SET_BY_OTHER_TESTS = ("GLOO_SOCKET_IFNAME", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

pytestmark = pytest.mark.timeout(1500)


class Desk:
    """Where a person sits: the commands of this project on the cluster's login host, with state and caches of the tests."""

    def __init__(self, cluster: slurm_cluster.SlurmCluster, small: SimpleNamespace, folder: Path) -> None:
        self.cluster, self.small, self.folder = cluster, small, folder
        self.hurry = folder / "hurry"  # made when nothing more is to happen to a run
        mine = {name: value for name, value in os.environ.items() if name not in SET_BY_OTHER_TESTS}
        self.environment = {**mine, "LLM_BUILDER_CACHE": str(small.cache), "XDG_STATE_HOME": str(folder / "state"),
                            "COLUMNS": "300", "STEP_SECONDS": "0.4", "HURRY": str(self.hurry),
                            "PYTHONPATH": os.pathsep.join(filter(None, [str(UNHURRIED), mine.get("PYTHONPATH")]))}  # fmt: skip

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

    def until_it_trains(self, out: Path, job: str, beyond: int) -> None:
        """Wait until a job's next start has made a step beyond `beyond`."""
        self.until(lambda: phase(out) == "starting", job, "going on")
        self.until(lambda: phase(out) != "starting" and steps_done(out) > beyond, job, f"a step beyond {beyond}")


@pytest.fixture(scope="module")
def desk(cluster, small, tmp_path_factory) -> Desk:
    return Desk(cluster, small, tmp_path_factory.mktemp("desk"))


@pytest.fixture(scope="module")
def alone(desk):
    """The run that nothing happens to, on this machine, which goes on beside the tests; `alone()` waits for it: its folder."""
    out = desk.folder / "alone"
    command = [sys.executable, "launchers/run.py", *desk.small.keys, *RUN, "gpus=2", f"out={out}"]
    output = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with subprocess.Popen(command, cwd=ROOT, env=desk.environment, **output) as run:

        def wait() -> Path:
            said, _ = run.communicate(timeout=PATIENCE)
            assert run.returncode == 0, said
            return out

        yield wait
        run.terminate()


def steps_done(out: Path) -> int:
    """The newest step that the run has reported."""
    return max((record["step"] for record in run_folder.read_records(out)[0]), default=0)


def newest(out: Path) -> int:
    """The step of the newest checkpoint."""
    return (run_folder.newest_checkpoint(out / "checkpoints") or (0,))[0]


def saved_when_stopped(out: Path, name: str) -> int:
    """The last step of a run that a signal stopped, which is saved."""
    status, step = run_folder.read_status(out), newest(out)
    assert (status["phase"], status["signal"], status["step"]) == ("stopped", name, step) and step == steps_done(out) < STEPS
    return step


def phase(out: Path) -> str:
    return (run_folder.read_status(out) or {}).get("phase", "")


def log(out: Path, job: str) -> str:
    """What a job printed."""
    return (out / "slurm" / f"{job}.log").read_text()


def continued(out: Path, job: str) -> list[int]:
    """The steps from which the starts of a job went on, each once."""
    return list(dict.fromkeys(map(int, re.findall(r"continuing \S+ from step (\d+)", log(out, job)))))


def workers(cluster: slurm_cluster.SlurmCluster, out: Path) -> list[int]:
    """A run's workers, each before the processes of its own; not srun, whose command line ends the same."""
    line = re.compile(rf"\S*python\S*( -\S+)* -m launchers.worker {re.escape(str(out))}")
    return sorted(process for process, arguments in cluster.processes().items() if line.fullmatch(arguments))


def figures(out: Path) -> dict[tuple[int, str], float]:
    """What metrics.jsonl says of the mathematics, by step and name; every step is there once and in order."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [record["step"] for record in records if "loss" in record]
    assert steps == list(range(1, len(steps) + 1))
    names = ("loss", "grad_norm", "lr", "val_loss")
    return {(record["step"], name): record[name] for record in records for name in names if name in record}


@pytest.mark.slow
def test_a_run_goes_on_whatever_ends_its_job(desk, alone):
    """The time limit's warning, a job that is more urgent, a machine that loses power, a person who cancels, a process that dies,
    a job that SLURM ends: a run on two machines goes on from what was saved last, and learns what one machine learns."""
    cluster, out = desk.cluster, desk.folder / "on"
    # With restarts: up to a minute after n2 is back, SLURM tells it what it could not while n2 was gone: to end step 1 of this
    # job, which by then is that of the next start.
    job = desk.submit(out, "restarts=3")
    desk.until(lambda: steps_done(out) >= 2, job, "two steps")
    cluster.check("scancel", "--signal=USR1", "--batch", job)  # what #SBATCH --signal=B:USR1@300 does
    cluster.wait(lambda: cluster.job(job)["Restarts"] == "1", PATIENCE, "requeued after the warning")
    warned = saved_when_stopped(out, "SIGUSR1")
    assert warned >= 2

    desk.until(lambda: steps_done(out) > warned, job, "a step after the warning")
    urgent = cluster.check("sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null",
                           "--wrap=true").strip()  # fmt: skip
    cluster.wait(lambda: cluster.job(job)["Restarts"] == "2", PATIENCE, "requeued for a job that is more urgent")
    preempted = saved_when_stopped(out, "SIGTERM")
    assert preempted > warned and desk.ended(urgent)["JobState"] == "COMPLETED"

    desk.until(lambda: steps_done(out) > preempted, job, "a step after it was preempted")
    cluster.crash("n2")
    cluster.wait(lambda: cluster.job(job)["Restarts"] == "3", PATIENCE, "requeued after a machine died")
    survived, reached = newest(out), steps_done(out)
    assert preempted <= survived < STEPS
    cluster.wait(lambda: "(" in desk.jobs("status", "on").split("\n")[2], PATIENCE, "why it waits")
    cluster.boot("n2")

    desk.until_it_trains(out, job, beyond=survived)
    assert "running on n[1-2]" in desk.jobs("status", "on")
    assert f"job {job} saves and ends" in desk.jobs("cancel", "on")
    ended = desk.ended(job)
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "130:0")
    cancelled = saved_when_stopped(out, "SIGINT")
    assert cancelled > survived, (reached, desk.jobs("status", "on"))

    first, last = re.search(r"as jobs (\d+) to (\d+)", desk.jobs("resume", "on", "chain=2", "restarts=3")).groups()
    desk.until(lambda: steps_done(out) > cancelled, first, "a step after it was resumed")  # the job may have begun long ago
    kept = newest(out)
    cluster.check("kill", "-9", str(workers(cluster, out)[0]))
    desk.until_it_trains(out, first, beyond=kept)
    kept = newest(out)
    cluster.check("scancel", first)  # SLURM ends it, and gives it KillWait for that; what comes next in the chain goes on
    assert desk.ended(first)["JobState"] == "CANCELLED"
    desk.hurry.touch()
    ended = desk.ended(last)
    assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), desk.jobs("logs", "on", "lines=0")
    ended_by_slurm, *_ = continued(out, last)
    assert ended_by_slurm > kept  # it was saved when it was told to end

    assert figures(out) == figures(alone())
    status, summary = run_folder.read_status(out), run_folder.read_json(out / "summary.json")
    assert (status["phase"], status["step"], summary["steps"]) == ("finished", STEPS, STEPS)
    assert summary["faults"]["restarts"] >= 1 and "held-out" in log(out, last)
    assert continued(out, job) == sorted({warned, preempted, survived})
    assert cancelled in continued(out, first) and max(continued(out, first)) <= kept
    assert f"continuing {out} from step {ended_by_slurm}" in desk.jobs("logs", "on", "lines=0")
    assert desk.jobs("logs", "on", "rank=1", "lines=0").count(" on n2 starts") >= 7
    assert [set(re.findall(r" on (\w+) starts", (out / "logs" / f"rank{rank}.log").read_text())) for rank in (0, 1)] == [
        {"n1"},
        {"n2"},
    ]
    assert sorted(path.name for path in (out / "logs").glob("rank*.memory.json")) == ["rank0.memory.json", "rank1.memory.json"]
    assert f"complete at step {STEPS}" in desk.jobs("status", "on")
    again = desk.run(*RUN, *SLURM, f"out={out}")  # nothing to do: nothing is submitted
    assert again.returncode == 0 and f"is complete at step {STEPS}" in again.stdout


@pytest.mark.slow
def test_a_sweep_is_an_array_of_jobs(desk):
    """Its two runs train at the same time, a machine each, and the last one to end compares them."""
    out, decays = desk.folder / "sweep", [0.0, 0.5]
    one_machine = ("nodes=1", "gpus=1", "executor=slurm", "partition=batch", "time=30", "exclusive=true")
    done = desk.run("steps=4", "val_every=4", "device=cpu", *one_machine, "sweep.weight_decay=[0.0,0.5]", f"out={out}")
    assert done.returncode == 0, done.stdout + done.stderr
    job = re.search(r"as job (\d+), an array of 2 points", done.stdout)[1]
    tasks = [desk.ended(f"{job}_{task}") for task in range(2)]
    assert [(task["JobState"], task["ExitCode"]) for task in tasks] == [("COMPLETED", "0:0")] * 2, log(out, f"{job}_0")
    assert {task["NodeList"] for task in tasks} == {"n1", "n2"}
    points = json.loads((out / "sweep.json").read_text())["points"]
    assert sorted(point["values"]["weight_decay"] for point in points) == decays
    assert [point["status"] for point in points] == ["complete"] * 2
    assert points[0]["val_loss_after"] < points[1]["val_loss_after"]
    assert desk.jobs("status", "sweep").count("complete at step 4") == 2
    first_losses = [figures(out / point["name"])[1, "loss"] for point in points]
    assert first_losses[0] == first_losses[1]  # the decay has not told yet


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
        cluster.wait(lambda: any(line.endswith("/sleep 1000") for line in cluster.processes().values()), 30, "the job's process")
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
