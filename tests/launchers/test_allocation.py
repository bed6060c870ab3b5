"""executor=allocation: a run in three steps, as a cluster's job makes it."""

import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from launchers import allocation, grammar, run
from launchers.worker import JOB
from nemo_ext import run_folder
from nemo_ext.errors import RunError, UserError

SAVED = (5, "checkpoints/step-5")


def command(phase=None, executor="allocation"):
    return grammar.Command(recipe="cpt_llama3", executor=executor, executor_keys={"phase": phase} if phase else {})


class TestOutcome:
    def end(self, tmp_path, phase, resumed_from=0, **more):
        run_folder.write_json(tmp_path / JOB, {"resumed_from_step": resumed_from})
        run_folder.write_status(tmp_path, phase, 5, 10, **more)
        return allocation.outcome(tmp_path, SAVED)

    def test_all_steps_are_made(self, tmp_path):
        assert self.end(tmp_path, "finished") is None

    @pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
    def test_a_signal_stopped_it(self, tmp_path, name):
        assert self.end(tmp_path, "stopped", signal=name) == signal.Signals[name]

    def test_a_time_limit_that_leaves_no_step_would_do_so_again(self, tmp_path):
        with pytest.raises(RunError, match="the time limit left no time to train and save a step; give a longer time="):
            self.end(tmp_path, "stopped", resumed_from=5, signal="SIGUSR1")
        assert self.end(tmp_path, "stopped", resumed_from=5, signal="SIGTERM") == signal.SIGTERM
        with pytest.raises(RunError, match="the time limit left no time"):
            run_folder.write_status(tmp_path, "stopped", 0, 10, signal="SIGUSR1")
            allocation.outcome(tmp_path, None)

    def test_what_a_rank_said(self, tmp_path):
        with pytest.raises(RunError, match="the disk is full; logs are in .*logs"):
            self.end(tmp_path, "failed", message="the disk is full", exit_code=1)
        with pytest.raises(UserError, match="^lr=2 is wrong$"):
            self.end(tmp_path, "failed", message="lr=2 is wrong", exit_code=2)

    def test_processes_that_ended_without_a_word(self, tmp_path):
        with pytest.raises(RunError, match="the run's processes ended while training; logs are in"):
            self.end(tmp_path, "training")


class TestSteps:
    """`carry_out` with functions that write down that they were called."""

    @pytest.fixture
    def carry_out(self, tmp_path):
        def carry_out(command, left=True, stopped=None, phase=None):
            calls = []
            if phase:
                run_folder.write_status(tmp_path, phase, 5, 10, signal="SIGUSR1")
            prepared = SimpleNamespace(keys={"steps": 10})
            code = allocation.carry_out(
                command, tmp_path, newest=lambda run_dir: SAVED,
                ready=lambda: (calls.append("ready"), prepared)[1],
                hand_over=lambda ready: (calls.append("hand over"), left)[1],
                train=lambda ready: (calls.append("train"), stopped)[1],
                finish=lambda ready: calls.append("finish"),
            )  # fmt: skip
            return code, calls

        return carry_out

    def test_a_whole_run_on_this_machine(self, carry_out):
        local = command(executor="local")
        assert carry_out(local) == (0, ["ready", "hand over", "train", "finish"])
        assert carry_out(local, left=False) == (0, ["ready", "hand over", "finish"])
        assert carry_out(local, stopped=signal.SIGINT) == (130, ["ready", "hand over", "train"])

    def test_prepare(self, carry_out, tmp_path):
        (tmp_path / "logs").mkdir()
        (tmp_path / "logs" / "rank7.memory.json").write_text("{}")
        assert carry_out(command("prepare"), phase="failed") == (0, ["ready", "hand over"])
        assert run_folder.read_status(tmp_path)["phase"] == "starting"  # and not an earlier start's
        assert not list((tmp_path / "logs").iterdir())
        assert carry_out(command(), left=False) == (allocation.COMPLETE, ["ready", "hand over", "finish"])

    def test_finish(self, carry_out, capsys):
        assert carry_out(command("finish"), phase="finished") == (0, ["ready", "finish"])
        assert carry_out(command("finish"), phase="stopped") == (128 + signal.SIGUSR1, [])
        assert "stopped by SIGUSR1; the same command continues from step 5" in capsys.readouterr().out

    def test_finish_lets_a_failure_be_tried_again_as_often_as_it_may(self, carry_out, tmp_path):
        again = command("finish")
        again.executor_keys["starts_left"] = 1
        run_folder.write_failure(tmp_path, "a process hangs", 1, again=True)
        assert carry_out(again) == (allocation.AGAIN, [])
        with pytest.raises(RunError, match="a process hangs; logs are in"):
            carry_out(command("finish"))
        run_folder.write_status(tmp_path, "failed", message="the loss is nan", exit_code=1, again=False)
        with pytest.raises(RunError, match="the loss is nan"):  # would only come again
            carry_out(again)

    def test_a_stage_that_is_none(self, carry_out):
        with pytest.raises(UserError, match="phase=train is none of prepare, finish"):
            carry_out(command("train"))


def test_three_steps_make_a_run(small, cached, tmp_path, capsys):
    """The real thing in one process a machine, without a cluster; the second prepare finds the run complete."""
    keys = [*small.keys, "steps=4", "device=cpu", "gpus=1", "nodes=1", f"out={tmp_path / 'run'}", "executor=allocation"]
    assert run.main([*keys, "phase=prepare"]) == 0
    assert not (tmp_path / "run" / run_folder.METRICS).exists()
    worker = [sys.executable, "-m", "launchers.worker", str(tmp_path / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0",
                   "LOCAL_RANK": "0", "WORLD_SIZE": "1"}  # fmt: skip
    subprocess.run(worker, env=environment, check=True, cwd=run.folder.__file__.rpartition("/launchers/")[0])
    assert run.main([*keys, "phase=finish"]) == 0
    summary = run_folder.read_json(tmp_path / "run" / run_folder.SUMMARY_JSON)
    assert summary["steps"] == 4 and summary["resumed_from_step"] == 0
    capsys.readouterr()
    assert run.main([*keys, "phase=prepare"]) == allocation.COMPLETE
    assert "is complete at step 4" in capsys.readouterr().out


def test_signals_to_all_processes_of_a_step_leave_the_checkpoint_writers_queue_alone():
    """SLURM signals what multiprocessing started anew too: the last checkpoint goes through it."""
    check = (
        "import runpy, signal; runpy.run_path('launchers/worker.py', run_name='__mp_main__'); "
        "print(*(signal.getsignal(each).name for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)))"
    )
    root = run.folder.__file__.rpartition("/launchers/")[0]
    done = subprocess.run([sys.executable, "-c", check], cwd=root, capture_output=True, text=True)
    assert done.stdout == "SIG_IGN SIG_IGN SIG_IGN\n", done.stderr
