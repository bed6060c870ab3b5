"""Runs of the command in the tests: started, waited for, sent signals to, and compared."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil

from launchers.worker import LAUNCHER
from nemo_ext import run_folder

ROOT = Path(__file__).resolve().parents[2]


class Command:
    """`python launchers/run.py` with the keys of a small model, started but not waited for."""

    def __init__(self, small, *arguments: str, **environment: str) -> None:
        given = {argument.split("=")[0] for argument in arguments}
        keys = [] if "config" in given else [key for key in small.keys if key.split("=")[0] not in given]
        self.out = Path(next(a.partition("=")[2] for a in arguments if a.startswith("out=")))
        environment = {**os.environ, "LLM_BUILDER_CACHE": str(small.cache), "COLUMNS": "300", **environment}
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

    def marked(self) -> list[psutil.Process]:
        """Every process of this machine that has the run's mark in its environment, whoever its parent is by now."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(LAUNCHER) == str(self.process.pid) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def end(self) -> SimpleNamespace:
        """Exit code, what was said, and what is left of it."""
        output, error = self.process.communicate(timeout=300)
        deadline = time.monotonic() + 20
        while orphans := [p for p in self.family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] + self.marked():
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
