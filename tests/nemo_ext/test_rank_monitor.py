"""A process that cannot end itself is ended from outside, by nvidia-resiliency-ext's rank monitor."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 1.5
# Forks a process a case, in a folder of its own, which ends as the case does; the watchdog's base class is all that it takes
# from Lightning.
CASES = """
import ctypes, os, signal, sys, tempfile, time, types
from pathlib import Path

import torch

sys.modules["lightning.pytorch.callbacks"] = types.SimpleNamespace(Callback=object)
from launchers import worker
from nemo_ext.callbacks.watchdog import Watchdog
from nvidia_resiliency_ext import fault_tolerance

def compute():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert torch.ones(8, device=device).sum().item() == 8

def watched(folder, timeout):
    compute()  # the monitor is forked from a process that uses its device, as a worker's is
    dog = Watchdog(folder, timeout)
    dog.start(rank=0, world=1)
    compute()
    print("watched", dog._monitor and dog._monitor._process.pid, os.listdir(tempfile.gettempdir()), flush=True)
    return dog

def hold_the_lock():
    ctypes.PyDLL(None).sleep(120)  # unlike CDLL, it keeps Python's lock

def holds(folder, timeout):
    watched(folder, timeout)
    time.sleep(timeout)
    hold_the_lock()

def stopped(folder, timeout):
    watched(folder, timeout)
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(60)  # the monitor lets it go on before it kills it

def well(folder, timeout):
    dog = watched(folder, timeout)
    os.kill(dog._monitor._process.pid, signal.SIGTERM)  # as SLURM tells every process of a step
    until = time.monotonic() + 5 * timeout
    while time.monotonic() < until:
        time.sleep(timeout / 10)
        dog.come("a step")
    dog.end()

def forgets(folder, timeout):
    watched(folder, timeout)

def without(folder, timeout):
    sys.modules["nvidia_resiliency_ext.fault_tolerance"] = None
    watched(folder, timeout).end()

def deserted(folder, timeout):
    dog = watched(folder, timeout)
    os.kill(dog._monitor._process.pid, signal.SIGKILL)
    time.sleep(timeout)
    dog.end()

children = {}
for case in (holds, stopped, well, forgets, without, deserted):
    folder = Path(sys.argv[1]) / case.__name__
    (folder / "tmp").mkdir(parents=True)
    children[case.__name__] = child = os.fork()
    if child == 0:
        output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1), os.dup2(output, 2)
        os.environ["TMPDIR"], tempfile.tempdir = str(folder / "tmp"), None
        os.register_at_fork(after_in_child=worker.die_with_parent)  # as workers do
        case(str(folder), float(sys.argv[2]))
        sys.exit()
for name, child in children.items():
    print(name, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
ALL = "holds stopped well forgets without deserted".split()

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("nvidia_resiliency_ext") is None, reason="nvidia-resiliency-ext is not installed"
)


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """By case: exit code, what was said, and the folder."""
    folder = tmp_path_factory.mktemp("monitor")
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "LLM_BUILDER_LAUNCHER")}
    command = [sys.executable, "-c", CASES, str(folder), str(TIMEOUT)]
    done = subprocess.run(command, env={**environment, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    codes = dict(line.split() for line in done.stdout.splitlines())
    return {name: (int(code), (folder / name / "output").read_text(), folder / name) for name, code in codes.items()}


@pytest.mark.parametrize("name", ["holds", "stopped"])
def test_a_process_that_runs_no_python_is_ended(ended, name):
    code, output, folder = ended[name]
    assert code == -signal.SIGKILL and "heartbeat. Waited 6.40 seconds." in output, output  # four times, and four looks
    stacks = (folder / "logs" / "rank0.stacks").read_text()
    assert ("in hold_the_lock" in stacks) == (name == "holds")  # a process that is stopped cannot even write


def test_one_that_runs_is_not(ended):
    """Nor does the monitor end when a run is told to."""
    code, output, folder = ended["well"]
    assert code == 0 and "heartbeat" not in output and "is gone" not in output, output
    assert list((folder / "logs").iterdir()) == []


@pytest.mark.parametrize("name", ALL)
def test_nothing_is_left_of_a_monitor(ended, name):
    code, output, folder = ended[name]
    monitor = next(line for line in output.splitlines() if line.startswith("watched"))
    assert monitor.endswith("[]") and list((folder / "tmp").iterdir()) == []
    if name != "without":
        end = time.monotonic() + 60
        while psutil.pid_exists(process := int(monitor.split()[1])) and time.monotonic() < end:
            time.sleep(0.05)
        assert not psutil.pid_exists(process)


def test_a_run_goes_on_without_a_monitor(ended):
    for name, words in (
        ("without", "the run goes on without nvidia-resiliency-ext's rank monitor: import of nvidia_resiliency_ext"),
        ("deserted", "nvidia-resiliency-ext's rank monitor is gone: RankMonitorClient could not send the heartbeat"),
    ):
        code, output, _ = ended[name]
        assert code == 0 and words in output
    assert "watched None" in ended["without"][1]
