"""What the launcher says of a run that failed, from torchrun's report and the run's status."""

import os
import subprocess
import sys

import pytest

from launchers import local
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
