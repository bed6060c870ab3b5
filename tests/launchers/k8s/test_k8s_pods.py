"""Pods of one run: two processes of this machine that stand for two pods, one killed and replaced as a Job would."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from commands import Command, at_step, figures, same, summary

from launchers.k8s import manifest, pod
from launchers.k8s.meeting import Meeting
from nemo_ext import run_folder
from nemo_ext.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
STEPS = 6


class Pod:
    """`python -m launchers.k8s.pod`, as the pod of an index runs it."""

    def __init__(self, index: int, out: Path, settings: Path, cache: Path):
        self.index = index
        environment = {**os.environ, "JOB_COMPLETION_INDEX": str(index), "POD_IP": "127.0.0.1", "LLM_BUILDER_CACHE": str(cache),
                       "OMP_NUM_THREADS": "1"}  # fmt: skip
        command = [sys.executable, "-m", "launchers.k8s.pod", f"run={out}", f"settings={settings}", "attempt=a", "nodes=2",
                   "processes=1", "retries=3"]  # fmt: skip
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=pipe, stderr=pipe)

    def workers(self) -> list[psutil.Process]:
        return [each for each in psutil.Process(self.process.pid).children() if "launchers.worker" in " ".join(each.cmdline())]

    def end(self) -> tuple[int, str]:
        output, error = self.process.communicate(timeout=500)
        return self.process.returncode, output + error


def wait_for(reached, *pods: Pod, patience: float = 500) -> None:
    end = time.monotonic() + patience
    while not reached():
        ended = [each.end() for each in pods if each.process.poll() is not None]
        assert not ended and time.monotonic() < end, ended
        time.sleep(0.01)


@pytest.fixture(scope="module")
def runs(small, tmp_path_factory, request):
    """One run in two pods, one of them killed, gone on with to the end; and the same run left alone on one machine."""
    folder = tmp_path_factory.mktemp("pods")
    out, settings = folder / "run", folder / "settings.yaml"
    keys = {**dict(key.split("=", 1) for key in small.keys), "steps": STEPS, "every": 2, "val_every": 2, "out": str(out)}
    keys = {**keys, "nodes": 2, "gpus": 1, "device": "cpu", "tp": 1, "pp": 1}
    settings.write_text("".join(f"{name}: {value}\n" for name, value in keys.items()))

    started: list[Pod] = []

    def start() -> list[Pod]:
        started.extend(Pod(index, out, settings, small.cache) for index in (0, 1))
        return started[-2:]

    def end_all() -> None:
        for each in started:
            each.process.kill()  # what it started dies with it

    request.addfinalizer(end_all)
    pods = start()
    wait_for(lambda: at_step(3)(out), *pods)
    orphans = pods[1].workers()
    pods[1].process.kill()
    results = {"killed": [each.end() for each in pods]}
    results["orphans"] = [each for each in orphans if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]
    results["finished"] = [each.end() for each in start()]
    whole = Command(small, f"steps={STEPS}", "every=2", "val_every=2", "gpus=1", f"out={folder / 'whole'}").end()
    assert whole.code == 0, whole.error
    return {**results, "out": out, "whole": whole.out}


@pytest.mark.slow
def test_a_killed_pod_ends_the_others_start_which_is_tried_again(runs):
    (code, text), (killed, _) = runs["killed"]
    assert killed == -signal.SIGKILL and len(runs["orphans"]) == 0
    assert code == manifest.AGAIN, text


@pytest.mark.slow
def test_the_pods_that_replace_them_finish_the_run(runs):
    assert [code for code, _ in runs["finished"]] == [0, 0], runs["finished"]
    assert "start 2: pod 0 of 2" in runs["finished"][0][1]
    assert summary(runs["out"])["resumed_from_step"] == 2
    same(figures(runs["out"]), figures(runs["whole"]), 1e-5)


FAKE = """
import os, signal, sys, time
from pathlib import Path
out, rank = Path(sys.argv[1]), os.environ["RANK"]
def stop(number, frame):
    (out / f"stopped-{rank}").touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
(out / f"{rank}.new").write_text(" ".join(os.environ[n] for n in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")))
(out / f"{rank}.new").rename(out / f"up-{rank}")
while not (out / f"die-{rank}").exists():
    time.sleep(0.02)
sys.exit(7)
"""


@pytest.fixture
def workers(tmp_path, monkeypatch):
    """Three stand-ins for the workers of the second of two pods, which wait for a file or a signal."""
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setattr(pod, "WORKER", [str(tmp_path / "fake.py")])
    monkeypatch.setattr(pod, "LOOK_SECONDS", 0.1)
    monkeypatch.setattr(pod, "LAST_WORDS", 0.2)
    first, second = (Meeting(tmp_path / "k8s", index, 2) for index in (0, 1))
    first.open()
    second._write("pod-1.json", {"token": second.token})
    first.gather("10.0.0.1", _never)
    start = second.join(lambda: False, _never)
    with pod.Workers(tmp_path, 1, 2, 3, start, second) as found:
        end = time.monotonic() + 60
        while len(list(tmp_path.glob("up-*"))) < 3 and time.monotonic() < end:
            time.sleep(0.02)
        yield found


def test_workers_know_their_rank_and_where_rank_0_is(workers, tmp_path):
    found = {path.name: path.read_text() for path in tmp_path.glob("up-*")}
    assert found == {f"up-{3 + local}": f"{local} 6 10.0.0.1 29501" for local in range(3)}


def test_sigterm_goes_to_the_workers(workers, tmp_path):
    os.kill(os.getpid(), signal.SIGTERM)
    assert workers.wait() == 0
    assert len(list(tmp_path.glob("stopped-*"))) == 3


def test_when_a_worker_dies_the_others_die(workers, tmp_path):
    (tmp_path / "die-4").touch()
    assert workers.wait() == 7
    assert sorted(process.poll() for process in workers.processes) == [-signal.SIGKILL, -signal.SIGKILL, 7]


@pytest.mark.parametrize("change", [lambda folder: Meeting(folder, 0, 2).open(), lambda folder: _replace(folder)])
def test_workers_of_a_start_that_is_over_die(workers, tmp_path, change):
    change(tmp_path / "k8s")
    assert workers.wait() == -signal.SIGKILL


def test_a_pod_takes_part_only_in_a_start_after_its_own(tmp_path):
    zero, one = Meeting(tmp_path, 0, 2), Meeting(tmp_path, 1, 2)
    zero.open()
    one._write("pod-1.json", {"token": one.token})
    assert zero.gather("a", _never).number == one.join(lambda: False, _never).number == 1
    assert not zero.broken() and not one.broken()
    again = Meeting(tmp_path, 0, 2)
    again.open()
    assert zero.broken() and one.broken()
    waited = []

    def replaced() -> None:
        waited.append(True)
        _replace(tmp_path)

    assert (again.gather("b", replaced).number, len(waited)) == (2, 1)  # the old pod's token counted for nothing


def test_a_pod_that_comes_when_all_is_done_ends(tmp_path):
    assert Meeting(tmp_path, 1, 2).join(lambda: True, _never) is None


def test_failures_count_until_a_checkpoint_is_new(tmp_path):
    meeting = Meeting(tmp_path, 0, 2)
    meeting.open()
    assert [meeting.failed(step, 2) for step in (0, 0, 4, 4, 4)] == [False, False, False, False, True]


@pytest.mark.parametrize(
    "phase, exit_code, code",
    [("finished", None, 0), ("stopped", None, 143), ("failed", 1, 138), ("failed", 2, 2)],
)
def test_the_other_pods_end_as_rank_0_says(tmp_path, phase, exit_code, code):
    run_folder.write_status(tmp_path, phase, exit_code=exit_code)
    assert pod._other_pods_code(tmp_path, None) == code


def test_a_pod_without_a_number_is_refused():
    assert pod._index({"JOB_COMPLETION_INDEX": "1"}, 2) == pod._index({"RANK": "1"}, 2) == 1
    for environment in ({}, {"RANK": "2"}, {"RANK": "x"}):
        with pytest.raises(UserError, match="which of 2 pods"):
            pod._index(environment, 2)


def _never() -> None:
    raise AssertionError("nothing to wait for")


def _replace(folder: Path) -> None:
    other = Meeting(folder, 1, 2)
    other._write("pod-1.json", {"token": other.token})
