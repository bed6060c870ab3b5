"""launchers/jobs.py: status, logs, cancel and resume of submitted runs."""

import json
import threading
import time

import pytest

from launchers import jobs
from nemo_ext import run_folder

RUN = ("device=cpu", "nodes=2", "gpus=1", "out=runs/mine", "time=20:00", "env.A=1")


@pytest.fixture
def mine(submit, tmp_path):
    """The folder of a submitted run."""
    assert submit(*RUN)[0] == 0
    return tmp_path / "runs" / "mine"


@pytest.fixture
def act(capsys):
    def act(*arguments):
        capsys.readouterr()
        code = jobs.main(list(arguments))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return act


def test_status_joins_the_queue_and_the_run(cluster, mine, act):
    cluster.answer("squeue", "100|PENDING|0:00|20:00||Priority\n")
    code, out, _ = act("status", "mine")
    assert code == 0 and "job         100 pending (Priority)\n" in out and "training    not started\n" in out
    cluster.answer("squeue", "100|RUNNING|3:10|16:50|node[1-2]|None\n")
    run_folder.write_status(mine, "training", 0, 40)
    (mine / run_folder.METRICS).write_text(
        json.dumps({"step": 7, "loss": 2.5}) + "\n" + json.dumps({"step": 5, "val_loss": 2.75}) + "\n"
    )
    (mine / "checkpoints" / "step-5").mkdir(parents=True)
    _, out, _ = act("status", "mine")
    assert "job         100 running on node[1-2], 3:10 so far, 16:50 left\n" in out
    assert "training    training, step 7 of 40  loss 2.5000  held-out 2.7500  saved at step 5\n" in out


def test_status_of_a_job_that_is_over(cluster, mine, act):
    cluster.fail("squeue", "slurm_load_jobs error: Invalid job id specified\n")
    cluster.answer("scontrol", "JobId=100 JobName=mine JobState=FAILED Reason=NonZeroExitCode ExitCode=1:0 Restarts=0\n")
    run_folder.write_failure(mine, "the loss is nan", 1)
    code, out, _ = act("status", "mine")
    assert code == 0 and "job         100 failed, exit code 1\n" in out and "failed  the loss is nan\n" in out


def test_logs(cluster, mine, act):
    code, _, err = act("logs", "mine")
    assert code == 2 and "100.log is not there (yet)" in err
    (mine / "slurm" / "100.log").write_text("".join(f"line {i}\n" for i in range(100)))
    (mine / "logs").mkdir()
    (mine / "logs" / "rank3.log").write_text("of rank 3\n")
    assert act("logs", "mine", "lines=2")[1] == "line 98\nline 99\n"
    assert act("logs", "mine", "rank=3")[1] == "of rank 3\n"
    assert act("logs", "mine", "rank=x")[2] == "error: rank=x must be a whole number\n"


def test_logs_are_followed_until_the_job_ends(cluster, mine, act, monkeypatch):
    monkeypatch.setattr("launchers.slurm.jobs.POLL_SECONDS", 0.05)
    monkeypatch.setattr("launchers.slurm.jobs.ASK_SECONDS", 0.1)
    cluster.answer("squeue", "100|RUNNING|3:10|16:50|node[1-2]|None\n")

    def job() -> None:
        for i in range(3):
            time.sleep(0.3)
            with open(mine / "slurm" / "100.log", "a") as log:
                log.write(f"line {i}\n")
        cluster.answer("squeue", "")

    thread = threading.Thread(target=job)
    thread.start()
    code, out, _ = act("logs", "mine", "follow=true")
    thread.join()
    assert (code, out) == (0, "line 0\nline 1\nline 2\n")


def test_cancel_takes_waiting_jobs_first_and_lets_running_ones_save(cluster, mine, act):
    cluster.answer("squeue", "100|RUNNING|3:10|16:50|node[1-2]|None\n101|PENDING|0:00|20:00||Dependency\n")
    code, out, _ = act("cancel", "mine")
    assert code == 0 and out.startswith("job 101 is cancelled\njob 100 saves and ends\n") and "jobs.py resume mine" in out
    assert cluster.calls("scancel") == [["101"], ["--signal=INT", "100"]]
    act("cancel", "mine", "now=true")
    assert cluster.calls("scancel")[2:] == [["101"], ["100"]]
    cluster.answer("squeue", "")
    assert act("cancel", "mine")[1] == "mine has no job that waits or runs\n"


def test_resume_submits_the_same_with_other_keys(cluster, mine, act, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    code, out, err = act("resume", "mine", "time=25:00", "env.B=2", "nodes=1")
    assert (code, err) == (0, "") and "submitted mine as job 101" in out
    script = (mine / "slurm" / "job.sbatch").read_text()
    assert "--time=25:00\n" in script and "export A=1\nexport B=2\n" in script and "--nodes=1\n" in script
    assert run_folder.read_json(mine / "slurm" / "submission.json")["jobs"] == ["100", "101"]
    assert act("resume", "mine", "tme=1")[2].startswith("error: unknown key tme, did you mean time?")


def test_names(cluster, mine, act):
    assert act("status", "mien")[2] == "error: no submitted run is called mien, did you mean mine?\n"
    assert act("stats", "mine")[2].startswith("error: stats is none of status, logs, cancel, resume")
    assert act("status")[2].startswith("error: status needs a run's name")
    assert act()[1] == f"mine  slurm   {mine}\n"
    assert act("--help")[1].startswith("Submitted runs by their names.")
