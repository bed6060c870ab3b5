"""What a process of a run takes from SLURM, and who may write the run's folder while it trains."""

import os
import socket
import subprocess
import sys

import psutil
import pytest

from launchers import worker
from nemo_ext.disk import held
from nemo_ext.errors import UserError

STEP = {
    "SLURM_JOB_ID": "71", "SLURM_PROCID": "11", "SLURM_LOCALID": "3", "SLURM_NODEID": "2", "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_NUM_NODES": "4", "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1",
}  # fmt: skip


def test_srun_says_what_torchrun_would_have_said():
    assert worker.from_slurm(STEP) == {
        "RANK": "11", "LOCAL_RANK": "3", "GROUP_RANK": "2", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "4",
        "TORCHELASTIC_RUN_ID": "slurm-71", "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip


def test_what_is_set_already_stays():
    assert worker.from_slurm({**STEP, "RANK": "0"}) == {}  # torchrun inside an allocation
    assert worker.from_slurm({"SLURM_JOB_ID": "71", "SLURM_NTASKS": "1"}) == {}  # a job's script, but no srun
    assert "GLOO_SOCKET_IFNAME" not in worker.from_slurm({**STEP, "GLOO_SOCKET_IFNAME": "ib0"})
    assert "GLOO_SOCKET_IFNAME" not in worker.from_slurm({**STEP, "SLURM_STEP_NUM_NODES": "1"})


def test_the_interface_towards_an_address():
    assert worker.interface_towards("127.0.0.1") == "lo"
    assert worker.interface_towards("no address") is None


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6")
def test_an_interface_of_the_new_protocol():
    loopback = any(each.address == "::1" for each in psutil.net_if_addrs().get("lo", []))
    assert worker.interface_towards("::1") == ("lo" if loopback else None)


def test_a_folder_is_waited_for_while_a_dead_node_seems_to_hold_it(tmp_path):
    code = """
import sys, time
from pathlib import Path
from nemo_ext.disk import held

with held(Path(sys.argv[1])):
    print(flush=True)
    time.sleep(2)
"""
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    holder.stdout.readline()
    with pytest.raises(UserError, match="another command is running there"), held(tmp_path):
        pass
    with held(tmp_path, patience=60):
        assert holder.wait(timeout=10) == 0
    holder.stdout.close()


def test_a_file_system_without_locks_says_so(tmp_path, monkeypatch):
    def no_locks(*args):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("nemo_ext.disk.fcntl.flock", no_locks)
    with pytest.raises(UserError, match=r"its file system has no locks \(Function not implemented\)"), held(tmp_path):
        pass


def test_the_first_rank_of_a_cluster_leaves_a_folder_alone_that_another_command_holds(tmp_path, monkeypatch):
    """And its status, which is the other command's."""
    environment = {**os.environ, "RANK": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop(worker.LAUNCHER, None)
    code = """
import sys
from pathlib import Path
from launchers import worker

worker.LOCK_PATIENCE = 0
sys.exit(worker.main(Path(sys.argv[1])))
"""
    (tmp_path / "status.json").write_text("theirs")
    with held(tmp_path):
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, timeout=120)
    assert done.returncode == 2
    assert (tmp_path / "status.json").read_text() == "theirs"
    assert "another command is running there" in (tmp_path / "logs" / "rank0.log").read_text()


@pytest.mark.parametrize(("started_by", "kept"), [({"RANK": "1"}, "SIGUSR1"), (STEP, "SIGINT SIGTERM SIGUSR1")])
def test_signals_that_are_kept_during_start_up(tmp_path, started_by, kept):
    """Not SIGTERM under torchrun, which ends by it what is left when a process has died."""
    code = """
import signal, sys
from pathlib import Path
from launchers import worker

def train(job, run_dir, waited):
    (run_dir / "kept").write_text(" ".join(sorted(each.name for each in signal.pthread_sigmask(signal.SIG_BLOCK, []))))

worker.train = train
sys.exit(worker.main(Path(sys.argv[1])))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)} | started_by
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, timeout=120).returncode == 0
    assert (tmp_path / "kept").read_text() == kept


def test_a_signal_during_start_up_is_kept_until_training_can_take_it(tmp_path):
    """It would end a Python that has no handler yet. Of two, that of the person counts and not that of the cluster."""
    code = """
import os, signal, sys
from pathlib import Path
from unittest import mock
from launchers import worker
from nemo_ext import platform

def train(job, run_dir, waited):
    for each in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
        os.kill(os.getpid(), each)
    platform.activate()
    from nemo_ext.callbacks.stop import StopOnSignal
    stop = StopOnSignal()
    assert stop.received is None
    stop.setup(None, None, "fit")
    assert stop.received == signal.SIGINT

with mock.patch.object(worker, "train", train):
    sys.exit(worker.main(Path(sys.argv[1])))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **STEP}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, timeout=120)
    assert done.returncode == 0, (tmp_path / "logs" / "rank11.log").read_text()
