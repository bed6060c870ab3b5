"""Runs through the command: killed, stopped, out of space, gone on with, and compared with the run that was left alone.

Start-up is most of a run's time, so the runs that do not depend on each other go side by side, two at a time.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from nemo_ext import run_folder

ROOT = Path(__file__).resolve().parents[2]
STEPS = 12


class Command:
    """`python launchers/run.py` with the keys of a small model, started but not waited for."""

    def __init__(self, small, *arguments: str) -> None:
        given = {argument.split("=")[0] for argument in arguments}
        keys = [] if "config" in given else [key for key in small.keys if key.split("=")[0] not in given]
        self.out = Path(next(a.partition("=")[2] for a in arguments if a.startswith("out=")))
        environment = {**os.environ, "LLM_BUILDER_CACHE": str(small.cache), "COLUMNS": "300"}
        command = [sys.executable, "launchers/run.py", *keys, *arguments]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, stdout=pipe, stderr=pipe, preexec_fn=at_ease
        )
        self.family: list[psutil.Process] = []

    def when(self, reached, patience: float = 240) -> Command:
        """Wait until `reached(out)`, remembering the processes that were started."""
        end = time.monotonic() + patience
        while not reached(self.out):
            if self.process.poll() is not None or time.monotonic() > end:
                raise AssertionError(f"not reached: {self.end()}")
            time.sleep(0.002)
        self.family = psutil.Process(self.process.pid).children(recursive=True)
        return self

    def signal(self, number: int) -> Command:
        self.process.send_signal(number)
        return self

    def workers(self) -> list[psutil.Process]:
        """By rank: torchrun's children."""
        (torchrun,) = psutil.Process(self.process.pid).children()
        return sorted(torchrun.children(), key=lambda process: int(process.environ()["RANK"]))

    def end(self) -> SimpleNamespace:
        """Exit code, what was said, and what is left of it."""
        output, error = self.process.communicate(timeout=300)
        deadline = time.monotonic() + 20
        while orphans := [p for p in self.family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]:
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        return SimpleNamespace(code=self.process.returncode, output=output, error=error, orphans=orphans, out=self.out)


def at_ease() -> None:
    """Ctrl-C means what it says, also where these tests run in the background of a shell that ignores it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def at_step(step: int):
    """True when the run in a folder has reported `step`."""
    return lambda out: any(record["step"] >= step for record in run_folder.read_records(out)[0])


def writing(step: int):
    """True while a checkpoint of `step` or later is half-written."""
    partial = re.compile(r"step-(\d+)\.partial$")

    def reached(out: Path) -> bool:
        found = (partial.match(path.name) for path in (out / "checkpoints").glob("*.partial"))
        return any(match and int(match[1]) >= step for match in found)

    return reached


def saved(step: int):
    """True when the checkpoint of `step` is complete."""
    return lambda out: (out / "checkpoints" / f"step-{step:06d}").is_dir()


def starting(out: Path) -> bool:
    """True from when the processes of a start are made until they train."""
    return (run_folder.read_status(out) or {}).get("phase") == "starting"


def figures(out: Path) -> dict:
    """What metrics.jsonl says of the mathematics, by kind and step. Every step is there once and in order."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [record["step"] for record in records if "loss" in record]
    assert steps == list(range(1, len(steps) + 1))
    assert [record["step"] for record in records] == sorted(record["step"] for record in records)
    names = ("loss", "lr", "grad_norm", "tokens", "val_loss")
    return {(record["step"], name): record[name] for record in records for name in names if name in record}


def same(one: dict, other: dict, tolerance: float) -> None:
    assert one.keys() == other.keys()
    for key in one:
        assert abs(one[key] - other[key]) <= tolerance, (key, one[key], other[key])


def summary(out: Path) -> dict:
    return json.loads((out / "summary.json").read_text())


@pytest.fixture(scope="module")
def runs(small, tmp_path_factory):
    """The results of all runs, by name."""
    folder = tmp_path_factory.mktemp("runs")
    keys = (f"steps={STEPS}", "every=4", "val_every=4")

    def whole():
        return [Command(small, *keys, f"out={folder / 'whole'}").end()]

    def killed_while_saving():
        """The launcher is killed while a checkpoint is half-written; what it left goes on at another layout."""
        out = folder / "killed"
        first = Command(small, *keys, f"out={out}", "async_save=false").when(writing(8)).signal(signal.SIGKILL).end()
        left = sorted(path.name for path in (out / "checkpoints").iterdir())
        yield SimpleNamespace(**vars(first), left=left)
        yield Command(small, *keys, f"out={out}", "gpus=2", "tp=2").end()

    def stopped():
        """Stopped by a signal, gone on with by the same command, with a stop before the first step in between."""
        out = folder / "stopped"
        one = ("config=" + str(folder / "given.yaml"), f"out={out}")
        (folder / "given.yaml").write_text("\n".join(key.replace("=", ": ", 1) for key in (*small.keys, *keys)))
        yield Command(small, *one).when(at_step(1)).signal(signal.SIGTERM).end()
        yield Command(small, *one).when(starting).signal(signal.SIGINT).end()
        yield Command(small, *one).end()

    def dead_rank():
        command = Command(small, "steps=100000", "every=100000", f"out={folder / 'dead'}", "gpus=2", "tp=1").when(at_step(2))
        command.workers()[1].kill()
        return [command.end()]

    def not_a_number():
        return [Command(small, "steps=100", "lr=1e30", "clip=0", "warmup=0", f"out={folder / 'nan'}").end()]

    def full_disk():
        """A file system of 40 MB fills up behind the first checkpoint and is made space on; then two signals, whose second does
        not wait."""
        disk = folder / "disk"
        disk.mkdir()
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(disk)], capture_output=True, text=True)
        if mounted.returncode:
            return [mounted.stderr.strip()]
        try:
            keys = ("steps=100000", "every=40", f"out={disk / 'run'}", "async_save=true")
            command = Command(small, *keys).when(saved(40))
            with contextlib.suppress(OSError), open(disk / "ballast", "wb", buffering=0) as ballast:
                while ballast.write(bytes(100_000)):
                    pass
            full = command.end()
            newest = run_folder.newest_checkpoint(disk / "run" / "checkpoints")
            (disk / "ballast").unlink()
            command = Command(small, *keys).when(saved(newest[0] + 40))
            command.workers()[0].suspend()
            command.signal(signal.SIGTERM)
            time.sleep(0.3)
            again = command.signal(signal.SIGTERM).end()
            shutil.copytree(disk / "run", folder / "filled")
            again.out = folder / "filled"
            return [full, newest, again]
        finally:
            subprocess.run(["umount", "-l", str(disk)], check=True)

    scenarios = (stopped, killed_while_saving, full_disk, dead_rank, whole, not_a_number)
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda scenario: (scenario.__name__, list(scenario())), scenarios)
        return SimpleNamespace(folder=folder, **dict(results))


def test_a_whole_run(runs):
    (result,) = runs.whole
    assert (result.code, result.error) == (0, ""), result
    found = summary(runs.folder / "whole")
    assert found["steps"] == STEPS and found["tokens"] == STEPS * 256 and found["resumed_from_step"] == 0
    assert found["val_loss_after"] < found["val_loss_before"] - 0.02
    assert {"layout", "tokens_per_s", "val_ppl_before", "val_ppl_after"} <= found.keys()
    assert sorted(p.name for p in (runs.folder / "whole" / "checkpoints").iterdir()) == ["step-000008", "step-000012"]
    assert {p.stem for p in (runs.folder / "whole" / "plots").iterdir()} == {"loss", "val_loss", "lr", "grad_norm", "throughput"}
    assert [step for step, name in figures(runs.folder / "whole") if name == "val_loss"] == [0, 4, 8, 12]


def test_sigkill_while_a_checkpoint_is_written(runs):
    first, again = runs.killed_while_saving
    assert first.code == -signal.SIGKILL and first.orphans == []
    assert first.left == ["step-000004", "step-000008.partial"]
    assert again.code == 0 and "from step 4" in again.output
    assert summary(again.out)["resumed_from_step"] == 4
    assert sorted(p.name for p in (again.out / "checkpoints").iterdir()) == ["step-000008", "step-000012"]
    same(figures(runs.folder / "whole"), figures(again.out), 1e-5)


def test_a_signal_saves_and_the_same_command_goes_on(runs):
    first, early, last = runs.stopped
    assert first.code == 128 + signal.SIGTERM and first.orphans == []
    step = int(re.search(r"stopped by SIGTERM; the same command continues from step (\d+)", first.output)[1])
    assert 1 <= step < STEPS
    assert early.code == 128 + signal.SIGINT and f"stopped by SIGINT; the same command continues from step {step}" in early.output
    assert early.orphans == [] and last.code == 0 and f"from step {step}" in last.output
    assert summary(last.out)["resumed_from_step"] == step
    same(figures(runs.folder / "whole"), figures(last.out), 0)  # config= repeated it, stopped or not, to the last bit


def test_a_dead_rank(runs):
    (result,) = runs.dead_rank
    assert result.code == 1 and result.orphans == []
    assert re.fullmatch(r"error: rank 1 was killed \(SIGKILL; out of memory\?\); .*continues.*\n", result.error)


def test_a_loss_that_is_no_number(runs):
    (result,) = runs.not_a_number
    assert result.code == 1
    said = r"error: (loss|gradient|gradient norm) is (nan|inf) at step \d+: lower lr=.*\n"
    assert re.fullmatch(said, result.error), result.error


def test_a_disk_that_fills_while_training(runs):
    """The checkpoints before it stay, and the run goes on when there is space again."""
    if isinstance(runs.full_disk[0], str):
        pytest.skip(f"a small file system needs the right to mount one: {runs.full_disk[0]}")
    full, (step, _), again = runs.full_disk
    assert full.code == 1 and full.orphans == []
    assert re.fullmatch(r"error: the disk is full: \S+: make space, the same command continues.*\n", full.error)
    assert f"from step {step}\n" in again.output
    assert again.code == 128 + signal.SIGTERM and again.orphans == []
    assert f"continues from step {step + 40}" in again.output
    figures(again.out)
