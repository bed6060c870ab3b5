"""What the launcher says of a run that failed, from torchrun's report and the run's status."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from launchers import local, worker
from nemo_ext import run_folder
from nemo_ext.errors import RunError, UserError

REPORT = """
============================================================
launchers.worker FAILED
------------------------------------------------------------
Failures:
[1]:
  time      : 2026-11-22_13:00:01
  host      : somewhere
  rank      : 2 (local_rank: 2)
  exitcode  : {other} (pid: 12)
  error_file: <N/A>
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-11-22_13:00:00
  host      : somewhere
  rank      : 1 (local_rank: 1)
  exitcode  : {first} (pid: 11)
  error_file: <N/A>
============================================================
"""


def cause(run_dir, first=None, other=1, message="", **status):
    log = run_dir / "logs" / "torchrun.log"
    log.parent.mkdir(exist_ok=True)
    log.write_text("" if first is None else REPORT.format(first=first, other=other))
    run_folder.write_status(run_dir, "failed" if message else "training", message=message, **status)
    with pytest.raises((RunError, UserError)) as raised:
        local._raise_cause(run_dir, run_folder.read_status(run_dir), log, began=1000.0)
    return raised.value


def test_reports_the_root_cause_first(tmp_path):
    log = tmp_path / "log"
    log.write_text("warning: rank : 7\n" + REPORT.format(first=-9, other=1))
    assert local._reports(log) == [(1, -9), (2, 1)]
    log.write_text("no report")
    assert local._reports(log) == []


def test_a_rank_that_died_suddenly_comes_before_what_the_others_say(tmp_path):
    error = cause(tmp_path, first=1, other=-9, message="RuntimeError: something about a socket")
    assert str(error).startswith("rank 2 was killed (SIGKILL; out of memory?); the same command continues")
    assert str(cause(tmp_path, first=-11)).startswith("rank 1 was killed (SIGSEGV);")


def test_a_rank_that_its_monitor_killed(tmp_path):
    stacks = tmp_path / "logs" / "rank1.stacks"
    stacks.parent.mkdir()
    stacks.touch()  # as every start does
    assert str(cause(tmp_path, first=-9)).startswith("rank 1 was killed (SIGKILL; out of memory?);")
    stacks.write_text("Timeout!")
    os.utime(stacks, (999, 999))  # of an earlier start
    assert str(cause(tmp_path, first=-9)).startswith("rank 1 was killed (SIGKILL; out of memory?);")
    os.utime(stacks, (1001, 1001))
    assert str(cause(tmp_path, first=-9)).startswith(f"rank 1 was killed (SIGKILL; it stood still: {stacks} has its stacks);")
    assert str(cause(tmp_path, first=-11)).startswith("rank 1 was killed (SIGSEGV);")


def test_a_frozen_rank_was_not_killed_by_anybody_else(tmp_path):
    error = cause(tmp_path, first=1, other=-9, message="the run stood still for 8 s: rank 2 did not arrive", hung=True)
    assert str(error) == f"the run stood still for 8 s: rank 2 did not arrive; logs are in {tmp_path / 'logs'}"


def test_what_a_rank_said_comes_before_its_exit_code(tmp_path):
    error = cause(tmp_path, first=1, message="loss is nan at step 3")
    assert isinstance(error, RunError) and str(error) == f"loss is nan at step 3; logs are in {tmp_path / 'logs'}"
    error = cause(tmp_path, first=2, message="wandb= is set", exit_code=2)
    assert isinstance(error, UserError) and str(error) == "wandb= is set"


def test_a_rank_that_said_nothing(tmp_path, monkeypatch):
    assert str(cause(tmp_path, first=7)).startswith("rank 1 died (exit code 7); logs are in")
    assert str(cause(tmp_path, first=-6, other=-6)).startswith("rank 1 died (SIGABRT);")
    assert str(cause(tmp_path)).startswith("the run's processes failed;")
    monkeypatch.setattr(local, "free_bytes", lambda folder: 0)  # nobody could write why
    assert str(cause(tmp_path, first=1)).startswith(f"the disk is full: {tmp_path}")


def test_a_process_whose_launcher_is_gone_ends():
    """It was started by a process that died before it could ask to die with it."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    code = "from launchers.worker import die_with_parent; die_with_parent(); print('lives')"
    environment = {"PYTHONPATH": str(local.ROOT), local.LAUNCHER: str(gone.pid)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-9, "")


WORKER = """
import contextlib, json, sys, types
from pathlib import Path
from launchers import worker
from nemo_ext import platform
from nemo_ext.platform import lean

def train(job, run_dir, waited):
    (run_dir / "trained").write_text(json.dumps([job["number"], waited]))

def sleep(seconds, pause=worker.time.sleep):
    Path(sys.argv[1], "waits").touch()
    pause(seconds)

worker.time.sleep = sleep
worker.train, platform.activate, lean.lean = train, lambda: True, contextlib.nullcontext
sys.modules["recipes.training"] = types.ModuleType("recipes.training")
sys.exit(worker.main(Path(sys.argv[1])))
"""


def test_processes_that_are_ahead_of_their_job_wait_for_it(tmp_path, monkeypatch):
    started = []

    def spawn(run_dir, processes, threads, more):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "RANK": "0", **more}
        started.append(subprocess.Popen([sys.executable, "-c", WORKER, str(run_dir)], env=environment, start_new_session=True))
        return started[-1]

    monkeypatch.setattr(local, "_spawn", spawn)
    with local.Ahead() as ahead:
        assert ahead.take(tmp_path) is None  # nobody was sent ahead: the run starts its own
        assert not (tmp_path / worker.GO).exists()
        run_folder.write_json(tmp_path / worker.JOB, {"number": 1})
        (tmp_path / "logs").mkdir()
        (tmp_path / worker.GO).write_text("of an earlier start")
        ahead.start(tmp_path, 1, 1)
        end = time.monotonic() + 60
        while not (tmp_path / "waits").exists() and time.monotonic() < end:
            time.sleep(0.02)
        assert (tmp_path / "waits").exists() and started[0].poll() is None
        run_folder.write_json(tmp_path / worker.JOB, {"number": 2})
        assert ahead.take(tmp_path) is started[0]
        assert started[0].wait(60) == 0
        number, waited = json.loads((tmp_path / "trained").read_text())
        assert number == 2 and waited > 0
        ahead.start(tmp_path, 1, 1)
    assert started[1].wait(60) == -signal.SIGKILL  # whoever was not needed


def test_a_process_ahead_whose_torchrun_was_killed_ends(tmp_path):
    """The launcher is there, and lives on: what stood between them died before the process could ask to die with it."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "RANK": "0", worker.AHEAD: "a job"}
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        environment[worker.LAUNCHER] = str(stranger.pid)
        assert subprocess.run([sys.executable, "-c", WORKER, str(tmp_path)], env=environment, timeout=50).returncode == 1
    finally:
        stranger.kill()
        stranger.wait()
